"""`make lock`: writes requirements/lock-*.txt, the exact versions that `make train` and `make test`
install, for every Python that has tests.

All are resolved on one machine, without installing anything but uv (into
build/lock). What only torch's CUDA build brings goes to requirements/cuda.txt: a machine without
a GPU installs torch's CPU build, and nothing of that. Arguments go to `uv pip compile`: none
upgrades everything, `--upgrade-package numpy` only that.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"  # another takes the same versions
FOLDER = ROOT / "requirements"
TOOLS = ROOT / "build" / "lock"
HEADER = "# Made by `make lock`; do not edit.\n"
OF_CUDA = re.compile(r"(nvidia|cuda)-|triton==")
TORCH = ("torch", "cuda-toolkit", "cuda-bindings", "nvidia-")  # who asks for CUDA packages


def resolve(uv: Path, python: str, arguments: list[str]) -> str:
    """uv's answer, each package followed by the `# via` lines of who asks for it."""
    lock = FOLDER / f"lock-{python}.txt"
    resolved = TOOLS / lock.name
    if not arguments:
        arguments = ["--upgrade"]
    elif lock.exists():  # the versions to keep
        resolved.write_text(
            lock.read_text(encoding="utf-8") + (FOLDER / "cuda.txt").read_text(encoding="utf-8"),
            encoding="utf-8",
        )
    command = [uv, "pip", "compile", "--quiet", "--no-header"]
    command += ["--python-version", python, "--python-platform", PLATFORM, "--extra", "test"]
    command += [*arguments, "pyproject.toml", "requirements/lock.in", "--output-file", resolved]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return resolved.read_text(encoding="utf-8")


def markers() -> dict[str, str]:
    """What pyproject.toml asks for on some machines only: name -> " ; marker"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = (r.partition(";") for extra in project["optional-dependencies"].values() for r in extra)
    return {re.match(r"[\w.-]+", r)[0]: f" ; {marker.strip()}" for r, _, marker in asked if marker}


def split(resolved: str) -> tuple[str, str]:
    """(what every machine installs, what only torch's CUDA build asks for), one package a line."""
    common, cuda, where = [HEADER], [HEADER], markers()
    for line, via in re.findall(r"^(\S.*)\n((?: +#.*\n)*)", resolved, re.MULTILINE):
        asked_by = re.sub(r"#( via)?", "", via).split()
        only_torch = OF_CUDA.match(line) and all(who.startswith(TORCH) for who in asked_by)
        lock = cuda if only_torch else common
        lock.append(line + where.get(line.partition("==")[0], "") + "\n")
    return "".join(common), "".join(cuda)


def main() -> None:
    venv.create(TOOLS, with_pip=True)
    pip = [TOOLS / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--upgrade", "uv"], check=True)
    answers = {p: split(resolve(TOOLS / "bin" / "uv", p, sys.argv[1:])) for p in PYTHONS}
    if len({cuda for _, cuda in answers.values()}) > 1:
        sys.exit("the CUDA packages differ by Python: one requirements/cuda.txt does not do")
    for python, (common, cuda) in answers.items():
        (FOLDER / f"lock-{python}.txt").write_text(common, encoding="utf-8")
        (FOLDER / "cuda.txt").write_text(cuda, encoding="utf-8")
        print(f"requirements/lock-{python}.txt: {common.count('==')} packages")


if __name__ == "__main__":
    main()
