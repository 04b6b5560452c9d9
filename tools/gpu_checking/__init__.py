"""The parts of tools/gpu_check.py: its steps, the processes they run in, its report, and the programs that only it runs."""
