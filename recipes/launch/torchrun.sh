#!/usr/bin/env bash
# One machine, all of its GPUs:      recipes/launch/torchrun.sh recipes/qwen3-moe.yaml model.path=/data/Qwen3-30B-A3B
# Several machines, on each of them: NNODES=8 HEAD=first-machine recipes/launch/torchrun.sh recipes/qwen3-235b.yaml
# On a CPU with gloo, two processes: GPUS=2 ACCELERATE_USE_CPU=true recipes/launch/torchrun.sh recipes/tiny.yaml …
#
# The job saves on SIGTERM and SIGUSR1 and continues with --resume, which is always given: without a checkpoint it begins.
set -euo pipefail
NNODES=${NNODES:-1}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
HEAD=${HEAD:-localhost}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONFAULTHANDLER=1
exec torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 --max-restarts "${RESTARTS:-0}" qat/train.py "$@" --resume
