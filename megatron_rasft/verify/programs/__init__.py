"""Runs programs that a model wrote against their tests, in a sandbox. See README.md."""
