#!/usr/bin/env bash
# Makes the virtual environment: torch first (its CPU build where there is no GPU), then everything else, then this package.
set -euo pipefail
python=${PYTHON:-python3}
venv=${VENV:-.venv}
torch=2.13.0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "moekernels needs Python 3.11 or newer, $python is $("$python" -V 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

if ! "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
  if [ -n "${GPU:-}" ]; then
    pip install "torch==$torch"
  else
    # The plain name would bring gigabytes of CUDA packages from PyPI; an index that has the CPU build is asked first.
    pip install "torch==$torch+cpu" 2>/dev/null ||
      pip install "torch==$torch" --index-url https://download.pytorch.org/whl/cpu
  fi
fi
pip install setuptools cmake ninja pybind11 numpy
PATH="$PWD/$venv/bin:$PATH" pip install --no-build-isolation --editable '.[test]'
