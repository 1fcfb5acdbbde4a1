#!/usr/bin/env bash
# Profiles a throughput run, brokers and publishers together: a table of hot functions and a flame graph.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: [VARIABLE=value ...] scripts/profile_hot_paths.sh

Runs scripts/run_throughput.sh's measurement (same variables) under a profiler and leaves in results/<time>-profile/:

  hot_functions.txt   the functions that took most time, over all processes   (perf)
  flamegraph.svg      where the time goes, for a browser                      (py-spy with native frames, or perf)
  run-*.txt           what each run reported; profiled runs are slower

perf is used where there is one that works, py-spy otherwise. Wrong values are refused before anything starts.
HELP
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage && exit 0 ;; *) usage >&2 && exit 2 ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/bench_common.sh"
cxlmq_workload_options
export PYTHONPATH="$CXLMQ_ROOT${PYTHONPATH:+:$PYTHONPATH}"

folder="$CXLMQ_ROOT/results/$(date +%Y%m%d-%H%M%S)-profile"
mkdir -p "$folder"
run=("$CXLMQ_PYTHON" -m client.cli.main bench throughput --no-limits --quiet "${CXLMQ_OPTIONS[@]}")
perf="" perf_event=() pyspy="$CXLMQ_ROOT/.venv/bin/py-spy"

# Virtual machines often have no cycle counter: the clock will do. Without privilege, the kernel's part stays dark.
for event in cycles cpu-clock cycles:u cpu-clock:u; do
    if perf record -q -e "$event" -o "$folder/perf.data" -- true >/dev/null 2>&1; then
        perf=1 perf_event=(-e "$event")
        break
    fi
done
[ -x "$pyspy" ] || pyspy=""
if [ -z "$perf$pyspy" ]; then
    rmdir "$folder"
    echo "cxlmq: neither perf nor py-spy works here. Install one: pip install py-spy, or linux-perf." >&2
    exit 1
fi

if [ -n "$perf" ]; then
    echo "profiling with perf ..." >&2
    perf record -q "${perf_event[@]}" -F 299 -g -o "$folder/perf.data" -- "${run[@]}" >"$folder/run-perf.txt" ||
        { status=$?; cat "$folder/run-perf.txt" >&2; exit "$status"; }
    perf report --stdio --no-children -g none --percent-limit 0.3 -s dso,symbol -i "$folder/perf.data" 2>/dev/null |
        sed 's/ *- *- *$//' >"$folder/hot_functions.txt"
    grep -v '^#' "$folder/hot_functions.txt" | grep -v '^$' | head -n 25 || true
fi

if [ -n "$pyspy" ]; then
    echo "profiling with py-spy ..." >&2
    # py-spy starts the run itself: looking at one's own children needs no privilege.
    "$pyspy" record --native --subprocesses --rate 99 --format flamegraph --output "$folder/flamegraph.svg" \
        -- "${run[@]}" >"$folder/run-py-spy.txt" 2>"$folder/py-spy.log" || pyspy=""
    [ -s "$folder/flamegraph.svg" ] || pyspy=""
fi
if [ -z "$pyspy" ] && [ -n "$perf" ]; then
    perf script -i "$folder/perf.data" 2>/dev/null | "$CXLMQ_PYTHON" -m client.bench.flamegraph >"$folder/flamegraph.svg"
fi
rm -f "$folder/perf.data" "$folder/perf.data.old"
[ -s "$folder/flamegraph.svg" ] || { echo "cxlmq: no flame graph came out; see $folder/py-spy.log" >&2; exit 1; }
echo "profile: $folder"
