#!/usr/bin/env bash
# Papers' claims on the embedded base: trains what is missing, then says of each claim whether it holds. Without a name
# all four, one after the other, each under twenty minutes on two quiet cores; goes on where it was stopped.
#   launch/reproductions.sh [capability_continuum | pass_at_n | teacher_logits | label_noise] ...
# Runs and reports go to runs/reproductions, the verdicts to launch/results/reproductions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline

configs=configs/compare/reproductions
names=("$@")
if [[ $# -eq 0 ]]; then
  names=(capability_continuum pass_at_n teacher_logits label_noise)
fi
python launch/reproductions_data.py runs/reproductions/data
for name in "${names[@]}"; do
  if [[ "$name" == teacher_logits ]]; then
    if [[ ! -e runs/reproductions/teacher/evaluation_after.json ]]; then
      python -m posttrain train "$configs/teacher.yaml" overwrite=true
    fi
    if [[ ! -e runs/reproductions/data/teacher_topk.jsonl ]]; then
      python -m posttrain annotate teacher-topk "$configs/teacher_topk.yaml"
    fi
  fi
  # a failed run is a result too: the verdict names it
  python -m posttrain compare "$configs/$name.yaml" || [[ $? -eq 1 ]]
  python launch/reproductions_verdict.py "$name"
done
