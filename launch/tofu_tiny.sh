#!/usr/bin/env bash
# Unlearning with a retrain oracle on a laptop: a tiny model that has memorised forty authors, its twin that never saw
# the last four, then every method of a comparison on two cores, one audit each, and the tables and plots in
# launch/results/unlearning. Goes on where it was stopped.
#   POSTTRAIN_DATA=folder launch/tofu_tiny.sh [tofu_tiny | tofu_tiny_constraint] ...   TOFU; the folder holds tofu/ and text/
#   launch/tofu_tiny.sh authors_tiny                                                   invented authors, without any data
#   launch/tofu_tiny.sh models                                                         TOFU's models alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() { # FOLDER NAME
  if [[ ! -e "runs/unlearning/$1/$2/resources.json" ]]; then
    python -m posttrain train "configs/unlearning/$1/$2.yaml" overwrite=true
  fi
}

evaluate() { # FOLDER NAME [KEY=VALUE ...]
  if [[ ! -e "runs/unlearning/$1/$2/evaluation.json" ]]; then
    python -m posttrain evaluate "configs/unlearning/$1/unlearn.yaml" --suite tofu \
      model.name_or_path="runs/unlearning/$1/$2" trainer.output_dir="runs/unlearning/$1/$2" "${@:3}"
  fi
}

twins() { # FOLDER
  train "$1" full
  train "$1" retain
  evaluate "$1" retain evaluation.tofu.retain_model=null
  evaluate "$1" full
  python launch/tofu_tiny.py check "runs/unlearning/$1" --results "launch/results/unlearning/$1_models.json"
}

audit() { # MODEL NAME
  local folder="runs/unlearning/tofu_tiny/audit/$2"
  if [[ -e "$1/config.json" && ! -e "$folder/evaluation.json" ]]; then
    python -m posttrain evaluate configs/unlearning/tofu_tiny/audit.yaml --suite audit model.name_or_path="$1" \
      trainer.output_dir="$folder"
  fi
}

names=("$@")
if [[ $# -eq 0 ]]; then
  names=(tofu_tiny tofu_tiny_constraint authors_tiny)
fi
for name in "${names[@]}"; do
  if [[ "$name" == authors_tiny* ]]; then
    folder=authors_tiny
  else
    folder=tofu_tiny
    : "${POSTTRAIN_DATA:?name the folder that holds tofu/ and text/}"
    if [[ ! -e runs/unlearning/tofu_tiny/retain.jsonl ]]; then
      python launch/tofu_tiny.py prepare runs/unlearning/tofu_tiny --tofu "$POSTTRAIN_DATA/tofu" \
        --text "$POSTTRAIN_DATA/text/wikitext2_valid.txt"
    fi
    train tofu_tiny base
  fi
  twins "$folder"
  if [[ "$name" == models ]]; then
    continue
  fi
  # a failed run is a result too: the table names it
  python -m posttrain compare "configs/compare/unlearning/$name.yaml" || [[ $? -eq 1 ]]
  audits=()
  if [[ "$name" == tofu_tiny ]]; then
    audits=(--audits runs/unlearning/tofu_tiny/audit)
    audit runs/unlearning/tofu_tiny/full untouched
    audit runs/unlearning/tofu_tiny/retain oracle
    for run in runs/compare/unlearning/tofu_tiny/runs/*-seed0; do
      name_of_run="$(basename "$run")"
      audit "$run" "${name_of_run%%-*}"
    done
  fi
  python launch/unlearning_plots.py "$name" --oracle "runs/unlearning/$folder/retain" "${audits[@]}"
done
