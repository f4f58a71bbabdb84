#!/bin/sh
# No command: segment every CT in /inputs into /outputs, and write the run report. Options alone are those of
# `fastorgan predict`. A command, such as the organisers' /bin/bash -c "sh predict.sh", runs in place of all that.
set -eu
case ${1:-} in
    '' | -*) ;;
    *) exec "$@" ;;
esac
# An empty REPORT, unlike none, means that there shall be no report.
report=${REPORT-/outputs/run.json}
[ -z "$report" ] || set -- --report "$report" "$@"
exec python3 -m fastorgan predict /inputs /outputs "$@"
