#!/usr/bin/env bash
# Preference and binary feedback on the embedded base, without a name all three; and on real data with a checkpoint. Goes on
# where it was stopped. Each of the first three takes about a quarter of an hour on two quiet cores, real a few minutes.
#   launch/preference_experiments.sh [graded | binary | topics] ...
#   POSTTRAIN_DATA=folder launch/preference_experiments.sh real CHECKPOINT
# Runs and reports go to runs/preference; tables, plots and verdicts to launch/results/preference.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

configs=configs/compare/preference
rows=runs/preference/data

annotate() { # KIND CONFIG OUTPUT [KEY=VALUE ...]
  local kind="$1" config="$2" output="$3"
  shift 3
  if [[ ! -e "$output" ]]; then
    python -m posttrain annotate "$kind" "$configs/$config.yaml" annotation.output="$output" "$@"
  fi
}

data_of() { # NAME: annotates the rows of each seed
  local seed
  for seed in 0 1 2; do
    case "$1" in
      graded)
        annotate reward-margins reward_margins "$rows/rewarded-$seed.jsonl" \
          data.train.seed=$((100 + seed)) annotation.reward.data.seed=$((900 + seed)) annotation.reward.seed="$seed"
        python launch/preference_margins.py "$rows/rewarded-$seed.jsonl" "$rows/pairs-$seed.jsonl" "$seed"
        ;;
      topics)
        annotate density-weights density_weights "$rows/split-$seed.jsonl" data.train.seed=$((100 + seed))
        annotate density-weights density_weights "$rows/mixed-$seed.jsonl" data.train.seed=$((100 + seed)) \
          data.train.task_options.topic_share=0.5
        ;;
    esac
  done
}

real() { # CHECKPOINT
  local checkpoint="$1"
  train() { # NAME CONFIG LAUNCH_CONFIG OBJECTIVE [KEY=VALUE ...]
    local name="$1" config="$2" launch="$3" objective="$4" folder="runs/preference/real/$1"
    shift 4
    if [[ -e "$folder/evaluation_after.json" ]]; then
      return
    fi
    mkdir -p "$folder"
    accelerate launch --config_file "launch/accelerate/$launch.yaml" -m posttrain train \
      "configs/preference/real_$config.yaml" model.name_or_path="$checkpoint" objective="$objective" \
      trainer.output_dir="$folder" overwrite=true "$@" 2>&1 | tee "$folder.log"
  }
  train dpo short_pairs cpu1 "{name: dpo, beta: 0.1}"
  train simpo short_pairs cpu1 "{name: simpo}"
  train orpo short_pairs cpu1 "{name: orpo}"
  # two processes: half the pairs each, so that every step sees the same pairs as on one
  train dpo_2 short_pairs ddp2_cpu "{name: dpo, beta: 0.1}" trainer.per_device_train_batch_size=8
  train mmpo graded cpu1 "{name: mmpo, beta: 0.1, gamma: 2.0}"
  train kto demo cpu1 "{name: kto, beta: 0.1}"
  train bco demo cpu1 "{name: bco, beta: 0.1}"
  python launch/preference_real.py
}

if [[ "${1:-}" == real ]]; then
  real "${2:?name a checkpoint folder}"
  exit
fi
names=("$@")
if [[ $# -eq 0 ]]; then
  names=(graded binary topics)
fi
for name in "${names[@]}"; do
  data_of "$name"
  # a failed run is a result too: the verdict names it
  python -m posttrain compare "$configs/$name.yaml" || [[ $? -eq 1 ]]
  python launch/preference_verdict.py "$name"
done
