#!/usr/bin/env bash
# Lint, types and the whole test suite; the last line is pytest's. Arguments go to pytest.
# Tests that need the public data sets run where POSTTRAIN_DATA names their folder, else they skip and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation,deepspeed,dev
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check .
ruff format --check .
mypy
# a file stays on one worker, which builds its fixtures once
pytest -n 2 --dist loadfile "$@"
