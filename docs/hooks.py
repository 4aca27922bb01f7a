"""What mkdocs fills into a page before it renders it: lists that follow from the code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "moekernels"
OPS = PACKAGE / "ops"


def public(path: Path) -> list[str]:
    """The full names of what a stem offers, where they are defined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    homes, names = {}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    here = f"moekernels.ops.{path.stem}"
    return [f"{homes.get(name, here)}.{name}" for name in names]


def entry(name: str) -> str:
    """mkdocstrings' words for a function, or for a NamedTuple whose fields have comments."""
    options = "\n    options:\n      show_if_no_docstring: true"
    return f"::: {name}" + options * name.rpartition(".")[2][0].isupper()


def formulas(*registers: str) -> str:
    """A table of the entries of the reference's registers, and what each means."""
    tree = ast.parse((PACKAGE / "reference" / "__init__.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def meaning(value: ast.expr) -> str:
        if isinstance(value, ast.Lambda):
            return ast.unparse(value.body)
        if isinstance(value, ast.Name) and value.id in functions:
            return "; ".join(map(ast.unparse, functions[value.id].body)).replace("return ", "")
        return ast.unparse(value)

    rows = ["| name | meaning |", "|---|---|"]
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in registers:
            for name, value in zip(node.value.keys, node.value.values):
                rows.append(f"| `{name.value}` | `{meaning(value)}` |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    stems = [path for path in sorted(OPS.glob("*.py")) if path.name[0] != "_"]
    lists = {
        "ops": lambda: "\n\n".join(entry(name) for path in stems for name in public(path)),
        "activations": lambda: formulas("GATED", "UNGATED"),
        "scores": lambda: formulas("SCORES"),
    }
    for name, made in lists.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", made())
    return markdown
