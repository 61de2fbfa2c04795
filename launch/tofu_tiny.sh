#!/usr/bin/env bash
# Unlearning TOFU with a retrain oracle on a laptop: a tiny base, a model that has memorised forty authors, its twin
# that never saw the last four, then every method of configs/compare/unlearning on two cores, and the tables and plots
# in launch/results/unlearning. Goes on where it was stopped. POSTTRAIN_DATA names a folder that holds tofu/ and text/.
#   POSTTRAIN_DATA=folder launch/tofu_tiny.sh models            the base and both twins, ten minutes on one core
#   POSTTRAIN_DATA=folder launch/tofu_tiny.sh [NAME] ...        and the comparisons NAME; all where none is given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${POSTTRAIN_DATA:?name the folder that holds tofu/ and text/}"
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

configs=configs/unlearning/tofu_tiny
folder=runs/unlearning/tofu_tiny

train() { # NAME
  if [[ ! -e "$folder/$1/resources.json" ]]; then
    python -m posttrain train "$configs/$1.yaml" overwrite=true
  fi
}

evaluate() { # NAME [KEY=VALUE ...]
  if [[ ! -e "$folder/$1/evaluation.json" ]]; then
    python -m posttrain evaluate "$configs/unlearn.yaml" --suite tofu model.name_or_path="$folder/$1" \
      trainer.output_dir="$folder/$1" "${@:2}"
  fi
}

if [[ ! -e "$folder/retain.jsonl" ]]; then
  python launch/tofu_tiny.py prepare "$folder" --tofu "$POSTTRAIN_DATA/tofu" \
    --text "$POSTTRAIN_DATA/text/wikitext2_valid.txt"
fi
for name in base full retain; do
  train "$name"
done
evaluate retain evaluation.tofu.retain_model=null
evaluate full
python launch/tofu_tiny.py check "$folder"

names=("$@")
if [[ $# -eq 0 ]]; then
  names=(tofu_tiny tofu_tiny_constraint)
fi
for name in "${names[@]}"; do
  if [[ "$name" == models ]]; then
    continue
  fi
  # a failed run is a result too: the table names it
  python -m posttrain compare "configs/compare/unlearning/$name.yaml" || [[ $? -eq 1 ]]
  python launch/unlearning_plots.py "$name" --oracle "$folder/retain"
done
