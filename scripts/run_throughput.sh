#!/usr/bin/env bash
# Launches a cluster, publishes, reads everything back, verifies it, prints a report and stops the cluster.
# Everything it needs is set up first. Settings are environment variables; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: [VARIABLE=value ...] scripts/run_throughput.sh [--json FILE] [option of `cxlmq bench throughput` ...]

Publishes through a cluster on simulated CXL memory, reads everything back through a subscriber, verifies every byte
and the order, and prints GB/s (10^9 bytes) beside the limits of this machine, measured in the same run.

  NUM_BROKERS=4             broker processes, 1 to 64
  NUM_PUBLISHERS=1          publisher processes, 1 to 64
  MESSAGE_SIZE=1KiB         bytes of a message; 65536, 64KiB and 64KB (1000) are understood here and below
  TOTAL_MESSAGE_SIZE=2GiB   bytes that all publishers publish together
  BATCH_SIZE=1MiB           bytes of a batch, or "adaptive"
  ORDER=5                   0 none, 1 per broker, 2 total, 5 total and per session (4 is an alias of 5)
  ACK=1                     0 none, 1 ordered in memory, 2 durable on the disks of REPLICATION_FACTOR - 1 other brokers
  REPLICATION_FACTOR=1      copies of the data, the memory included; ACK=2 needs at least 2
  NUM_TRIALS=1              repetitions
  SEQUENCER_LOCK=atomic     mutex, semaphore or atomic
  WAIT=balanced             what idle threads do: latency, balanced or saver
  TRANSPORT=both            grpc, attached or both
  REGION_SIZE=1GiB          shared memory of the cluster
  SCANNERS=1                threads of the sequencer
  NETWORK=unix              sockets that gRPC uses: unix or tcp
  MEMORY=mapped             mapped; noncoherent: hosts with private caches; checked: the same, every access checked
  PROFILE=                  a device's latencies and bandwidths, when MEMORY is not mapped; `cxlmq profiles` lists them

  --json FILE               write the report as JSON as well; - writes it to standard output
  --help                    this text

A wrong value is refused before anything starts. Results are kept in results/. Exit codes: 0 everything verified,
1 it failed or a byte differs, 2 wrong usage.

Examples:
  scripts/run_throughput.sh
  NUM_PUBLISHERS=2 BATCH_SIZE=64KiB scripts/run_throughput.sh --no-limits
  TOTAL_MESSAGE_SIZE=8GiB scripts/run_throughput.sh --json report.json
HELP
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage && exit 0 ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/bench_common.sh"

cxlmq_workload_options
cxlmq_bench throughput --results "$CXLMQ_ROOT/results" "${CXLMQ_OPTIONS[@]}" "$@"
