#!/usr/bin/env bash
# Measures the kernels side by side with dense torch, torch.compile, F.linear_cross_entropy, TRL, Liger and
# cut-cross-entropy: gradients checked against float64 first, then rounds A B A B; time, memory, share of the matmul rate.
#   launch/benchmark_kernels.sh [smoke|cpu|gpu] [--probabilities FILE] [--minutes N] [--overwrite]
#   launch/benchmark_kernels.sh targets     rewrites launch/results/kernels_targets.md from the CSVs
#   launch/benchmark_kernels.sh plot        redraws launch/results/kernels.png from a CSV
# Writes launch/results/kernels_cpu.csv or kernels_gpu.csv and a .json of machine and versions beside it (smoke:
# runs/benchmark/). A set that was stopped goes on where it stopped. Liger and cut-cross-entropy take part on a GPU where
# they are installed: pip install liger-kernel==0.8.5 cut-cross-entropy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_venv.sh
activate_environment
install_project evaluation
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(cores)}"
case "${1:-}" in
  targets | plot)
    module="$1"
    shift
    exec python -m "launch.benchmark.$module" "$@"
    ;;
  # the profiler that counts the allocations announces each of its starts and stops
  *) exec python -m launch.benchmark.run "$@" 2> >(grep --line-buffered -v '^USDT:' >&2) ;;
esac
