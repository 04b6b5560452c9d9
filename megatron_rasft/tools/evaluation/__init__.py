"""Evaluates a model on benchmarks: sampling, grading, statistics, tables. See README.md."""
