"""What runs elsewhere: the workflows' commands and versions, and the notes of a release."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = sorted(path.stem.partition("-")[2] for path in ROOT.glob("requirements/lock-*.txt"))
notes = runpy.run_path(str(ROOT / "tools" / "release_notes.py"))["notes"]
LOG = """# Changelog
## [Unreleased]
- later
## [0.2.0] - 2026-12-01
### Added
- a thing
## [0.1.0] - 2026-11-01
- the first
"""


def jobs(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()


def test_workflows_take_every_python_that_has_versions():
    matrices = [
        job["strategy"]["matrix"] for path in WORKFLOWS for job in jobs(path) if "strategy" in job
    ]
    asked = [matrix["python"] for matrix in matrices if "python" in matrix]
    assert asked == [PYTHONS, PYTHONS]  # the tests, and the wheels


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_there_is(path):
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for job in jobs(path):
        for step in job["steps"]:
            run = step.get("run", "")
            assert set(re.findall(r"^make ([\w-]+)", run, re.MULTILINE)) <= set(targets)
            for file in re.findall(r"\b(?:tools|examples|requirements)/[\w./-]+", run):
                assert (ROOT / file).exists(), file


def test_notes_are_the_versions_section():
    assert notes("v0.2.0", "0.2.0", LOG) == "### Added\n- a thing\n"
    assert notes("v0.1.0", "0.1.0", LOG) == "- the first\n"


def test_a_tag_of_another_version_or_without_notes_is_refused():
    with pytest.raises(ValueError, match="tag v0.3.0: .* says 0.2.0"):
        notes("v0.3.0", "0.2.0", LOG)
    with pytest.raises(ValueError, match=r"nothing under ## \[0.3.0\]"):
        notes("v0.3.0", "0.3.0", LOG)
