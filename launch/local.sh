#!/usr/bin/env bash
# Train on all devices of this machine:  launch/local.sh [CONFIG.yaml] [key=value ...]
# One rank per GPU; without a GPU, two ranks on the CPU. RANKS=N asks for another number.
set -euo pipefail

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "local.sh: RANKS is '$ranks', not a number of ranks" >&2
    exit 2
fi
train=$(dirname "$0")/../train.py

for arg; do # these do not train, and need one process only
    if [[ $arg == --help || $arg == --print-config ]]; then exec env WORLD_SIZE="$ranks" python "$train" "$@"; fi
done
# First, one process checks the command line, without torch: a mistake then prints one line and exits with code 2. Accelerate's
# launcher would add a report of thirty lines and exit with 1. WORLD_SIZE is set to check that the batch divides among the ranks.
WORLD_SIZE=$ranks python "$train" --print-config "$@" >/dev/null || exit

# --multi_gpu makes accelerate start several processes, on a CPU too; with a single process it is refused.
several=()
if ((ranks > 1)); then several=(--multi_gpu); fi
exec accelerate launch ${several[@]+"${several[@]}"} --num_processes "$ranks" --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no "$train" "$@"
