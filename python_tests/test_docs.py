"""What the documentation says of commands, files and values is so."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
from pathlib import Path

import pytest

from moekernels import cli, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
ROOMS = sorted(
    path.name if path.suffix else f"{path.name}/"
    for path in (ROOT / "moekernels").iterdir()
    if path.name[0] != "_" and (path.suffix == ".py" or (path / "__init__.py").exists())
)
# At the start of a line of code, or behind torchrun.
COMMAND = re.compile(r"^ *(?:\S.* -m )?moekernels ((?:train|verify|plan|info|bench)\b.*)$", re.M)
FOLDERS = "moekernels|csrc|python_tests|bench|examples|docs|requirements|tools|model|train"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_are_ones_that_the_command_line_takes(page):
    for line in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        if words[0] != "bench":  # what follows is pytest's
            cli.build_parser().parse_args(words)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_files_that_are_named_exist(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    missing = [
        n for n in named if not (ROOT / n).exists() and not (ROOT / "moekernels" / n).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_give_what_they_say(page):
    test = doctest.DocTestParser().get_doctest(
        page.read_text(encoding="utf-8"), {}, page.stem, str(page), 0
    )
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_room_is_on_the_map(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [room for room in ROOMS if room not in text]


def test_every_op_has_its_place():
    text = (ROOT / "docs" / "api" / "ops.md").read_text(encoding="utf-8")
    path = ROOT / "docs" / "hooks.py"
    page = runpy.run_path(str(path))["on_page_markdown"](text)
    assert set(re.findall(r"^::: moekernels\S*\.(\w+)$", page, re.M)) == set(ops.__all__)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert set(re.findall(r": (\S+\.md)$", navigation, re.M)) == {
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES
    }
