#!/usr/bin/env bash
# Sets up what is needed and runs the tests. Arguments go to pytest: scripts/run_tests.sh -k region -x
set -euo pipefail
CXLMQ_EXTRAS=plots,dev
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$CXLMQ_ROOT"
exec "$CXLMQ_PYTHON" -m pytest "$@"
