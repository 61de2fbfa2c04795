"""Side-by-side measurement of the kernels; started by launch/benchmark_kernels.sh."""
