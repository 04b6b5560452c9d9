"""Builds the HTML page of a run from metrics.jsonl, rollouts.jsonl and config.json."""
