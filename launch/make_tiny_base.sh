#!/usr/bin/env bash
# Trains the embedded base model again, about five minutes on one CPU core: weights and tokenizer go to
# posttrain/assets/tiny_base, recipe, loss curve and capability table to launch/results. Arguments go to
# launch/make_tiny_base.py (see --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
exec python launch/make_tiny_base.py "$@"
