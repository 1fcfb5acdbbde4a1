#!/usr/bin/env bash
# Compares the locks of the sequencer over 1, 2 and 4 scanner threads.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/measure_mutex_contention.sh [--json FILE] [--quick] [--stage-only]

Compares mutex, semaphore and lock-free order: the sequencer's stage alone, on headers that were delegated in advance,
and end to end with tiny batches (where the publisher hides the lock). Shows batches/s, acquisitions, contended ones,
contentions/s, wait and hold times, and what they mean.

  --json FILE     write the results as JSON as well; - writes them to standard output
  --quick         fewer rounds, and the cluster only with the most scanners
  --stage-only    no cluster
  --help          this text

Results are kept in results/.
HELP
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage && exit 0 ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/bench_common.sh"
cxlmq_bench contention --results "$CXLMQ_ROOT/results" "$@"
