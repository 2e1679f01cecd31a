#!/usr/bin/env bash
# A launcher for stages of `prefopt pipeline`: `all_nodes.sh WORDS...` runs `prefopt WORDS...` on every GPU of every node of this Slurm job.
# ACCELERATE_CONFIG names the accelerate config (default: accelerate_configs/deepspeed_zero3_multinode.yaml).
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
config=${ACCELERATE_CONFIG:-accelerate_configs/deepspeed_zero3_multinode.yaml}
# one task a node; SLURM_PROCID is the node's number
# shellcheck disable=SC2016
exec srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$1" --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_PROCID" --main_process_ip "$0" --main_process_port "${MAIN_PORT:-29500}" --module prefopt "${@:2}"
' "$head" "$config" "$@"
