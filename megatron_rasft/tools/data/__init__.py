"""Checks a data set before a run: overlap with benchmarks, and what a row becomes when it is tokenised."""
