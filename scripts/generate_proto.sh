#!/usr/bin/env bash
# Regenerates broker/proto/cxlmq_pb2.py and its .pyi from cxlmq.proto. tests/test_tidy.py fails when they are stale.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. broker/proto/cxlmq.proto
