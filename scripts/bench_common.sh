# Shared by the measuring scripts: sets everything up, and turns their variables into options of `cxlmq bench`.
# To be sourced.

source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh" || exit 1

# Fills CXLMQ_OPTIONS from the variables that are set. What they hold is checked by the command, before it starts anything.
cxlmq_workload_options() {
    local pair name
    CXLMQ_OPTIONS=()
    for pair in NUM_BROKERS=brokers NUM_PUBLISHERS=publishers MESSAGE_SIZE=message-bytes TOTAL_MESSAGE_SIZE=total-bytes \
        BATCH_SIZE=batch-bytes ORDER=order ACK=ack REPLICATION_FACTOR=replication-factor NUM_TRIALS=trials \
        SEQUENCER_LOCK=sequencer-lock WAIT=waiting TRANSPORT=transport REGION_SIZE=region-bytes SCANNERS=scanners \
        NETWORK=network MEMORY=memory PROFILE=profile; do
        name="${pair%%=*}"
        if [ -n "${!name+set}" ]; then
            CXLMQ_OPTIONS+=("--${pair#*=}=${!name}")
        fi
    done
}

# Becomes the command: signals reach it directly, and its exit code is the script's.
cxlmq_bench() {
    export PYTHONPATH="$CXLMQ_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    exec "$CXLMQ_PYTHON" -m client.cli.main bench "$@"
}
