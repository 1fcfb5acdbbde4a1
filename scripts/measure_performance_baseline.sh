#!/usr/bin/env bash
# Measures several cases several times and holds them against a stored baseline.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: [VARIABLE=value ...] scripts/measure_performance_baseline.sh [--store] [--baseline FILE] [--json FILE] [--csv FILE]

Measures several cases (batch and message sizes, order, durability), NUM_TRIALS times each (here 5 unless set), prints
mean, median, deviation, p95 and p99 as a table and writes them as CSV. The first run stores the baseline; later runs
are compared with it. A change counts when the medians differ by more than a tenth and by more than two deviations.

  --store           store these results as the new baseline
  --baseline FILE   where the baseline is [results/baseline.json]
  --json, --csv     as for scripts/measure_performance_simple.sh
  --help            this text

Exit codes: 0 nothing became worse, 1 something did (or a run failed), 2 wrong usage.
HELP
}

baseline="" store="" arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --store) store=1 ;;
        --baseline) baseline="${2:?--baseline needs a file}" && shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
source "$(dirname "${BASH_SOURCE[0]}")/bench_common.sh"
baseline="${baseline:-$CXLMQ_ROOT/results/baseline.json}"
cxlmq_workload_options
mkdir -p "$CXLMQ_ROOT/results"
[ -e "$baseline" ] || store=1
cxlmq_bench repeat --matrix --results "$CXLMQ_ROOT/results" --csv "$CXLMQ_ROOT/results/baseline.csv" \
    --baseline "$baseline" ${store:+--store-baseline} "${CXLMQ_OPTIONS[@]}" "${arguments[@]}"
