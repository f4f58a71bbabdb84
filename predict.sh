#!/bin/sh
# The organisers' entry: segment every CT in inputs/ into outputs/, from the folder that holds both.
# Options are those of `fastorgan predict`.
set -eu
exec python3 -m fastorgan predict "${INPUTS:-inputs}" "${OUTPUTS:-outputs}" "$@"
