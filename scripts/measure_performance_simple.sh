#!/usr/bin/env bash
# Repeats one throughput run and says how far its figures can be trusted.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: [VARIABLE=value ...] scripts/measure_performance_simple.sh [--json FILE] [--csv FILE]

Repeats one run (NUM_TRIALS, here 5 unless set) and prints mean, median, deviation, p95 and p99 of every figure as a
table; the same as CSV goes to results/performance.csv, or to FILE. All variables of scripts/run_throughput.sh work.

Example:
  NUM_TRIALS=10 BATCH_SIZE=64KiB scripts/measure_performance_simple.sh --csv runs.csv
HELP
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage && exit 0 ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/bench_common.sh"
cxlmq_workload_options
mkdir -p "$CXLMQ_ROOT/results"
cxlmq_bench repeat --results "$CXLMQ_ROOT/results" --csv "$CXLMQ_ROOT/results/performance.csv" \
    "${CXLMQ_OPTIONS[@]}" "$@"
