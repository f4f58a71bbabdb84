#!/bin/sh
# Run the checks and the tests; arguments go to pytest, such as -m slow, or -n 0 for one process.
# TORCH names the torch to install, where the one from the package index is not wanted.
set -eu
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}" ".[dev,evaluation,train]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A process of tests for each core; a module stays in one, with its fixtures.
.venv/bin/pytest -n auto --dist loadscope "$@"
