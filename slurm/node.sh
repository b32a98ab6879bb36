#!/usr/bin/env bash
# One node's part of a job, started by srun: becomes the launcher of the node's processes.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1))}"
# The launcher forwards these to its processes, and gives them time to save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-165}"
# Downloaded, unpacked and decoded files: once per node, on the node's own disk if it has one.
export XDG_CACHE_HOME="${SLURM_TMPDIR:-${XDG_CACHE_HOME:-$HOME/.cache}}"
# shellcheck disable=SC2206 # words of a command
in_environment=(${RUN_IN:-})

if ((SLURM_NNODES * PROCESSES == 1)); then
    exec "${in_environment[@]}" python -m "$@"
fi
# The address of the first node, where srun runs; host names may not resolve.
first="$SLURM_LAUNCH_NODE_IPADDR"
if ((SLURM_NNODES > 1)) && command -v ip >/dev/null; then
    way="$(ip -o addr show to "$first" | awk '{ print $2; exit }')"
    way="${way:-$(ip -o route get "$first" | sed 's/.* dev \([^ ]*\).*/\1/')}"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$way}"
fi
# Each job on a node has its own port, below those that the system assigns to connections.
exec "${in_environment[@]}" accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * PROCESSES))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$first" --main_process_port "$((10000 + SLURM_JOB_ID % 20000))" \
    --rdzv_backend static --mixed_precision no --dynamo_backend no -m "$@"
