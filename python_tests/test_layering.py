"""The arrows of the design: who includes and imports whom, one stem in every layer, short files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moekernels"
STEMS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))
SOURCE_LINES, TEST_LINES = 420, 600  # readable in one sitting
HEAVY = {"numpy", "rich", "tokenizers", "matplotlib", "transformers", "safetensors", "pybind11"}
HEAVY |= {"megatron", "torchtitan", "kernels"}


def cpp_files(layer: str) -> list[Path]:
    found = (ROOT / "csrc" / layer).rglob("*")
    return sorted(p for p in found if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


CPP_LAYERS = {
    # layer: what must not be included there
    "include": r"torch|cuda|c10|ATen|Python|pybind11|cpu/|\.\./",
    "cpu": r"torch|cuda|c10|ATen|Python|pybind11|omp\.h|\.\./",
    "cuda": r"torch|c10|ATen|Python|pybind11|cpu/|\.\./",
    "cutlass": r"torch|c10|ATen|Python|pybind11|cpu/|\.\./",
    "torch": r"ATen|c10|cuda|pybind11|\.\./|torch/(?!csrc/stable|csrc/inductor/aoti|headeronly)",
    "host": r"torch|c10|ATen|cuda|\.\./",
}


@pytest.mark.parametrize("layer", CPP_LAYERS)
def test_cpp_includes(layer):
    forbidden = re.compile(rf"^({CPP_LAYERS[layer]})")
    bad = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in cpp_files(layer)
        for name in includes(path)
        if forbidden.match(name)
    ]
    assert not bad


def test_layers_do_not_include_each_other():
    """cpu, cuda and torch see only csrc/include and their own headers."""
    bad = [
        f"{path.relative_to(ROOT)} includes {name}"
        for layer in ("cpu", "cuda", "torch", "host")
        for path in cpp_files(layer)
        for name in includes(path)
        if not (ROOT / "csrc" / layer / name).exists()
        and any(
            (ROOT / "csrc" / other / name).exists() for other in CPP_LAYERS if other != "include"
        )
    ]
    assert not bad


def test_the_contract_layer_is_plain():
    """Headers of csrc/include need no more than <cstdint> and each other."""
    allowed = re.compile(r"^(cstdint|cstddef|moekernels/\w+\.h)$")
    bad = [
        f"{path.name} includes {name}"
        for path in cpp_files("include")
        for name in includes(path)
        if not allowed.match(name)
    ]
    assert not bad


def test_cpu_kernels_leave_threads_to_the_binding():
    """No OpenMP and no standard threads; no standard algorithm either, whose weak symbols would be
    shared between ISA levels."""
    forbidden = re.compile(r"#pragma omp|std::thread|std::(sort|nth_element|vector|map)\b")
    kernels = [p for p in cpp_files("cpu") if p.name != "isa.cpp"]
    bad = [
        f"{path.name}: {found.group()}"
        for path in kernels
        for found in forbidden.finditer(path.read_text())
    ]
    assert not bad


def test_bindings_hold_no_kernel_code():
    bad = [p.name for p in cpp_files("torch") if re.search(r"__global__|_mm\d*_", p.read_text())]
    assert not bad


@pytest.mark.parametrize("stem", STEMS)
def test_stem_is_present_in_every_layer(stem):
    for path in (
        f"csrc/include/moekernels/{stem}.h",
        f"csrc/cpu/{stem}.cpp",
        f"csrc/torch/{stem}.cpp",
    ):
        assert (ROOT / path).exists(), path


def test_no_op_lacks_its_python():
    """What has a contract, a kernel and a binding of one name is an op."""
    layers = [{p.stem for p in cpp_files(layer)} for layer in ("include", "cpu", "torch")]
    assert set.intersection(*layers) == set(STEMS)


def modules(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all that a module imports, wherever in it; relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def reaches(names: set[str], target: str) -> bool:
    return any(name == target or name.startswith(target + ".") for name in names)


def offenders(folder: str, targets: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in modules(folder)
        for target in sorted(targets)
        if reaches(imports(path), target)
    ]


def ours(*folders: str) -> set[str]:
    return {f"moekernels.{folder}" for folder in folders}


# Every room of the package, from the bottom up. A room imports those on floors below it only,
# inside functions, too; rooms on one floor do not know each other.
FLOORS = (
    ("errors", "jsonio", "files", "console", "canvas", "reference", "_host"),
    ("model", "pipeline", "ops", "data", "balance", "interop", "predict"),
    ("run", "parallel"),
    ("nn",),
    ("assembly", "integrations"),
    ("plan",),
    ("train", "verify", "audit"),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_has_a_floor():
    rooms = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert rooms - {"__init__"} == FLOOR_OF.keys() - {"_host"}


def test_the_architecture_page_shows_the_floors():
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    shown = {room: int(floor) - 1 for floor, rooms in rows for room in re.findall(r"`(\w+)", rooms)}
    assert shown == {r: f for r, f in FLOOR_OF.items() if not r.startswith("_")}


def test_arrows_point_down():
    back = set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        room = inside.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        seen = {name.split(".")[1] for name in imports(path) if name.startswith("moekernels.")}
        below = {other for other in FLOOR_OF if FLOOR_OF[other] < FLOOR_OF[room]}
        back |= {(inside.as_posix(), other) for other in seen & FLOOR_OF.keys() - below - {room}}
    assert not back


FORBIDDEN = {
    # folder: what must not be imported there, though it may be on a floor below
    "ops": HEAVY | {"torch.distributed"},
    "parallel": ours("pipeline") | HEAVY,
    "nn": ours("pipeline", "run", "data", "ops._library") | HEAVY,
    "model": ours("_host") | HEAVY | {"torch"},
    "pipeline": ours("reference") | HEAVY,
    "plan": ours("ops", "reference", "_C"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_python_imports(folder):
    assert not offenders(folder, FORBIDDEN[folder])


def test_ops_imports_little_enough_to_ship_alone():
    """Only the standard library, torch, and of this package the ops and their reference."""
    import sys

    allowed = sys.stdlib_module_names | {"torch", "moekernels", "__future__"}
    inside = ("moekernels.ops", "moekernels.reference")
    bad = [
        f"{path.name} imports {name}"
        for path in modules("ops")
        for name in imports(path)
        if name.split(".")[0] not in allowed
        or (name.startswith("moekernels.") and not name.startswith(inside))
    ]
    assert not bad


def test_reference_stands_alone():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("reference")
        for name in imports(path)
        if reaches({name}, "moekernels") and not reaches({name}, "moekernels.reference")
    ]
    assert not bad


def test_only_ops_loads_the_library():
    bad = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if "torch.ops.moekernels" in path.read_text() and path.parent.name != "ops"
    ]
    assert not bad


def test_test_files_do_not_import_each_other():
    """What two of them share lies in python_tests/support, which imports no test either."""
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "python_tests").rglob("*.py")
        for name in imports(path)
        if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", name)
        or (name.startswith("python_tests.") and not name.startswith("python_tests.support"))
    ]
    assert not bad


def test_the_ptx_emulator_stands_alone():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "ptx_emulator").rglob("*.py")
        for name in imports(path)
        if reaches({name}, "moekernels") or reaches({name}, "python_tests")
    ]
    assert not bad


def test_files_are_short():
    long = []
    for pattern, limit in {
        "moekernels/**/*.py": SOURCE_LINES,
        "bench/**/*.py": SOURCE_LINES,
        "csrc/**/*": SOURCE_LINES,
        "ptx_emulator/**/*.py": SOURCE_LINES,
        "python_tests/**/*.py": TEST_LINES,
    }.items():
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                lines = path.read_text().count("\n")
                if lines > limit:
                    long.append(f"{path.relative_to(ROOT)}: {lines} lines, more than {limit}")
    assert not long
