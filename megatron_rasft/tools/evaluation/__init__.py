"""Benchmarks, sampling, pass@k and avg@k with intervals, comparison with published tables."""
