"""Decides which demonstrations get rollouts, and when; plain Python, no torch."""
