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

# --multi_gpu is what makes accelerate start several processes, on a CPU too; it does not take it for one.
several=()
if ((ranks > 1)); then several=(--multi_gpu); fi
exec accelerate launch ${several[@]+"${several[@]}"} --num_processes "$ranks" --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no "$(dirname "$0")/../train.py" "$@"
