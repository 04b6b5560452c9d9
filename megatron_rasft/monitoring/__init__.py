"""Watches a run: how far it is and how it ended, signals and time limits that stop it, stalls, slow ranks."""
