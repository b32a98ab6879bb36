# What a site edits: sourced at the start of every job, in the root of the clone.
# shellcheck shell=bash

# Modules, as in: module load cuda

# The Python that has moco_dist, or a container with it, as in:
#   RUN_IN="apptainer exec --nv moco_dist.sif"
RUN_IN="${RUN_IN:-}"
# shellcheck disable=SC1091
if [[ -z "$RUN_IN" && -e .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Compute nodes often have no way out: sync later, or set online.
export WANDB_MODE="${WANDB_MODE:-offline}"
