"""Comparisons: a grid of runs from one YAML, their statistics and a report."""
