"""Python runs this file at start-up where its folder is on PYTHONPATH: it makes the process one on an emulated GPU.

Entry points, torchrun and every process that they start then run unmodified.
"""

import os

if os.environ.get("EMULATED_GPU") is not None:
    import gpu_emulation

    gpu_emulation.install()
