"""Python runs this file at start-up if its folder is on PYTHONPATH. It gives the process emulated GPUs.

Programs, torchrun and all processes that they start therefore run unmodified.
"""

import os

if os.environ.get("EMULATED_GPU") is not None:
    import gpu_emulation

    gpu_emulation.install()
