"""Decides which demonstrations get rollouts, and when. Plain Python without torch."""
