#!/usr/bin/env bash
# Makes the virtual environment VENV of PYTHON: torch first (its CPU build where there is no GPU), then all else, then this package.
# VERSIONS=locked: exactly those of requirements/lock-*.txt; newest: the newest of everything; a file: pip's constraints.
# PACKAGE=no leaves the package itself out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} venv=${VENV:-.venv} versions=${VERSIONS:-locked}
stop() { echo "moekernels: $*" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  stop "needs Python 3.11 or newer, $python is $("$python" -V 2>&1); try make PYTHON=python3.12"
of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
version=$(of "$python")
lock=requirements/lock-$version.txt
case $versions in locked | newest) ;; *) [ -f "$versions" ] || stop "VERSIONS must be locked, newest or a file of constraints, got $versions" ;; esac
if [ "$versions" = locked ] && [ ! -f "$lock" ]; then
  stop "no tested versions for Python $version (there are $(ls requirements | sed -n 's/^lock-\(.*\)\.txt$/\1/p' | xargs)): take one" \
    "of those, make PYTHON=python3.13, or the newest of everything, make NEWEST=1"
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
[ "$(of "$venv/bin/python")" = "$version" ] ||
  stop "$venv is of Python $(of "$venv/bin/python"), $python is $version: add VENV=.venv-$version, or remove $venv"

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
has_torch() { "$venv/bin/python" -c "from importlib.metadata import version as v; import sys; sys.exit(v('torch').split('+')[0] != '$1')" 2>/dev/null; }

# The plain name would bring gigabytes of CUDA packages from PyPI: an index that has the CPU build is asked first.
cuda_build=${GPU:-}
cpu_torch() { # VERSION (empty: the newest) OPTIONS...
  local version=$1 index=(--index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15)
  shift
  { [ -n "$version" ] && pip install "$@" "torch==$version+cpu" 2>/dev/null; } ||
    pip install "$@" "${index[@]}" "torch${version:+==$version}" 2>/dev/null
}
without_cpu_build() {
  cuda_build=1
  echo "moekernels: no CPU build of torch ${1:-} is to be had here; taking the CUDA build, which runs without a GPU, too" >&2
}

case $versions in
locked)
  pip install "$(grep '^pip==' "$lock")"
  torch=$(sed -n 's/^torch==//p' "$lock")
  has_torch "$torch" || [ -n "$cuda_build" ] || cpu_torch "$torch" --no-deps || without_cpu_build "$torch"
  pip install --no-deps -r "$lock" ${cuda_build:+-r requirements/cuda.txt}
  ;;
newest)
  pip install --upgrade pip
  [ -n "$cuda_build" ] || cpu_torch "" --upgrade || without_cpu_build
  grep -v '^torch' requirements/lock.in | pip install --upgrade ${cuda_build:+torch} -r /dev/stdin
  ;;
*)
  torch=$(sed -n 's/^torch==//p' "$versions")
  has_torch "$torch" || [ -n "$cuda_build" ] || cpu_torch "$torch" || without_cpu_build "$torch"
  grep -v '^torch' requirements/lock.in | pip install -c "$versions" "torch==$torch" -r /dev/stdin
  ;;
esac
[ "${PACKAGE:-}" = no ] && exit
case $versions in
locked) how=(--no-deps) ;;
newest) how=(--upgrade --upgrade-strategy eager) ;;
*) how=(-c "$versions") ;;
esac
PYTHONWARNINGS=ignore PATH="$PWD/$venv/bin:$PATH" pip install --no-build-isolation "${how[@]}" --editable '.[test]'
pip check
