#!/usr/bin/env bash
# Several machines, by torchrun; start the same line on each of them:
#   NODES=4 HEAD=node0:29500 bash recipes/accelerate/multi_node.sh --config recipes/configs/1b.yaml --output_dir /shared/runs/1b
# output_dir lies on a file system that all machines share. ACCELERATE_USE_FSDP=true FSDP_VERSION=2 before it: FSDP2.
# When a machine is lost, torchrun starts all processes again, up to RESTARTS times, and they continue from the last
# checkpoint. SIGTERM to torchrun reaches every process; 30 seconds later torchrun kills those that still save.
set -euo pipefail
exec torchrun \
    --nnodes "${NODES:?how many machines}" \
    --nproc_per_node "${GPUS_PER_NODE:-gpu}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${HEAD:?host:port of one of them}" \
    --rdzv_id "${RUN_ID:-nt_hf}" \
    --max_restarts "${RESTARTS:-3}" \
    recipes/pretrain_c4.py "$@"
