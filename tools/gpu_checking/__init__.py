"""The parts of tools/gpu_check.py: steps, processes, report, and the programs that only this tool runs."""
