#!/usr/bin/env bash
# Post-trains the embedded base model on a procedural task and prints a before/after table; under five minutes on two
# CPU cores once everything is installed. Arguments override keys: launch/quickstart.sh objective=probability
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
exec accelerate launch --config_file launch/accelerate/cpu1.yaml --num_cpu_threads_per_process "$(cores)" -m posttrain train configs/quickstart.yaml "$@"
