#!/usr/bin/env bash
# Sets up what is needed and runs the tests, two files at a time. Arguments go to pytest, which then runs one test after
# the other: scripts/run_tests.sh -k region -x
set -euo pipefail
CXLMQ_EXTRAS=plots,dev
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$CXLMQ_ROOT"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$CXLMQ_PYTHON" -m pytest "$@"
