#!/usr/bin/env bash
# Checks style and types. Arguments go to ruff: scripts/lint.sh --fix
set -euo pipefail
CXLMQ_EXTRAS=plots,dev
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$CXLMQ_ROOT"
"$CXLMQ_PYTHON" -m ruff check --extend-exclude .venv,build "$@" .
"$CXLMQ_PYTHON" -m mypy
