"""`release_notes.py v0.1.0`: what CHANGELOG.md says of that version; exit code 2 where the tag is
not the package's version, or the changelog has no such section."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, version: str, changelog: str) -> str:
    """The section of `version`; ValueError where there is none, or the tag is another version's."""
    if tag != f"v{version}":
        raise ValueError(f"tag {tag}: moekernels/__init__.py says {version}; tag v{version}")
    parts = re.split(r"^## \[(.+?)\].*\n", changelog, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    if not sections.get(version, "").strip():
        raise ValueError(f"CHANGELOG.md has nothing under ## [{version}]; give it that section")
    return sections[version].strip() + "\n"


def main(tag: str) -> None:
    source = (ROOT / "moekernels" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    try:
        print(notes(tag, version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")), end="")
    except ValueError as error:
        print(f"release_notes: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
