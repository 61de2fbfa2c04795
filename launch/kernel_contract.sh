#!/usr/bin/env bash
# The numerical contract of the kernels over the full product of its dimensions (tests/kernels/test_kernel_contract.py
# covers their pairs): hours on a CPU, made for a GPU. Goes on where it stopped. Arguments go to launch/kernel_contract.py:
#   launch/kernel_contract.sh [--backend NAME] [--device NAME] [--minutes N] [--overwrite]
# Writes launch/results/kernel_contract.csv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project dev
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(cores)}"
exec python -m launch.kernel_contract "$@"
