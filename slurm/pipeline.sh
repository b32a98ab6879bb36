#!/usr/bin/env bash
# Submits a pretraining, its probe and a report, each of which waits for the previous one:
#   bash slurm/pipeline.sh [--nodes=2 ...] configs/pretrain/cifar10.yaml [key=value ...] \
#       -- configs/probe/cifar10.yaml [key=value ...]
# Options in front, written with =, go to sbatch for the first two jobs. The probe starts when the
# pretraining is done, however often it is requeued; the report runs in any case.
set -euo pipefail
[[ -f slurm/setup.sh ]] || { echo "error: start this in the root of moco_dist, not in $PWD" >&2; exit 66; }
# shellcheck source=slurm/setup.sh
source slurm/setup.sh

options=() pretrain=()
while (($#)) && [[ "$1" == -?* && "$1" != -- ]]; do options+=("$1") && shift; done
while (($#)) && [[ "$1" != -- ]]; do pretrain+=("$1") && shift; done
(($# > 1 && ${#pretrain[@]})) || fail 78 "give CONFIG [key=value ...] -- PROBE_CONFIG [key=value ...]"
shift
run="$(run_directory pretrain "${pretrain[@]}")" || exit
probe=("$@" "encoder=$run" "output=$(dirname -- "$run")")
probe_run="$(run_directory probe "${probe[@]}")" || exit

submit() {
    sbatch --parsable "$@" | cut -d ';' -f 1 # the name of the cluster may follow
}
first="$(submit "${options[@]}" slurm/pretrain.sbatch "${pretrain[@]}")"
second="$(submit "--dependency=afterok:$first" --kill-on-invalid-dep=yes "${options[@]}" \
    slurm/probe.sbatch "${probe[@]}")"
third="$(submit "--dependency=afterany:$second" slurm/report.sbatch "$run" "$probe_run")"
echo "pretrain $first  $run"
echo "probe    $second  $probe_run"
echo "report   $third  slurm-report-$third.out"
