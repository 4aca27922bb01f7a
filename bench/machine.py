"""Where a measurement was made, for whoever reads its file later."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def where() -> dict[str, str]:
    """Machine, date and commit of a measurement."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "when": time.strftime("%Y-%m-%d"),
    }
