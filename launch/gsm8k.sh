#!/usr/bin/env bash
# GSM8K with a pretrained checkpoint: nll and probability_power for 200 steps on one process, then nll on two processes
# under DDP, ZeRO-2 and ZeRO-3, each evaluated on the whole test set (likelihood alone on two processes). A finished run is not repeated.
#   POSTTRAIN_DATA=folder launch/gsm8k.sh CHECKPOINT [KEY=VALUE ...]
# Writes launch/results/gsm8k.md and .json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkpoint="${1:?name a checkpoint folder}"
shift
source launch/_venv.sh
activate_environment
install_project evaluation,deepspeed
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

settings=(
  model.name_or_path="$checkpoint"
  'data.train.path=${POSTTRAIN_DATA}/gsm8k/train.jsonl' data.train.name=null
  'data.eval.path=${POSTTRAIN_DATA}/gsm8k/test.jsonl' data.eval.name=null
  trainer.learning_rate=1.0e-3 trainer.activation_checkpointing=false
  evaluation.before=false evaluation.max_new_tokens=64 evaluation.batch_size=128
  "$@"
)

train() { # NAME LAUNCH_CONFIG OBJECTIVE [KEY=VALUE ...]
  local name="$1" launch="$2" objective="$3"
  shift 3
  if [[ -e "runs/gsm8k/$name/evaluation_after.json" ]]; then
    echo "runs/gsm8k/$name is there already"
    return
  fi
  accelerate launch --config_file "launch/accelerate/$launch.yaml" -m posttrain train configs/supervised/gsm8k.yaml \
    "${settings[@]}" objective="$objective" trainer.output_dir="runs/gsm8k/$name" overwrite=true "$@"
}

train nll cpu1 nll evaluation.before=true
train probability_power cpu1 "{name: probability_power, alpha: 0.5}" evaluation.before=true
# two processes: half the rows each, so that every step sees the same rows as on one
for engine in ddp2 zero2 zero3; do
  train "nll_$engine" "${engine}_cpu" nll trainer.per_device_train_batch_size=4 'evaluation.metrics=[likelihood]'
done
python -m posttrain evaluate configs/supervised/gsm8k.yaml "${settings[@]}" model.name_or_path=runs/gsm8k/nll \
  trainer.output_dir=runs/gsm8k/nll_evaluated overwrite=true
python launch/gsm8k_table.py
