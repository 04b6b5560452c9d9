"""Command lines. The wheel holds those that need no checkout, as the package megatron_rasft.commands (setup.py)."""
