# Sourced by the scripts beside it, from the project's root: makes an environment with the project in it.

# The first Python that is new enough, the tested minor version before others.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

# Uses the active virtual environment, or makes and activates .venv.
activate_environment() {
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    return
  fi
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python="$(find_python)"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

# install_project EXTRAS: the tested versions of everything, skipped where pyproject.toml and constraints.txt are the
# same as the last time.
install_project() {
  local extras="$1" stamp
  stamp="$VIRTUAL_ENV/.posttrain-$( (pwd; echo "$extras"; cat pyproject.toml constraints.txt) | cksum | cut -d" " -f1)"
  if [[ -e "$stamp" ]]; then
    return
  fi
  # torch first: deepspeed imports it while it is being built.
  python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
  DS_BUILD_OPS=0 python -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
  touch "$stamp"
}

# Processor cores that this process may use.
cores() {
  python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())'
}

# Nothing here needs the network once it is installed, and nothing is reported to anyone.
go_offline() {
  export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
}
