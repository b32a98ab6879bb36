# Settings of your site, sourced at the start of every job in the root of the clone.
# shellcheck shell=bash

# Modules, for example: module load cuda

# The Python that has moco_dist, or a container with it, for example:
#   RUN_IN="apptainer exec --nv moco_dist.sif"
RUN_IN="${RUN_IN:-}"
# shellcheck disable=SC1091
if [[ -z "$RUN_IN" && -e .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Compute nodes often have no internet access: sync later, or set online.
export WANDB_MODE="${WANDB_MODE:-offline}"
