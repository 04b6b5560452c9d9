"""The temporary files of a run, in a folder that its end removes, or the start of the next run if the run is killed.

multiprocessing, wandb and other libraries leave their folders in /tmp for ever if their process is killed.
"""

import getpass
import os
import tempfile
from multiprocessing.util import Finalize

from megatron_rasft.scratch import ScratchFolder

_PREFIX = "rasft-run-"

_REMOVED_LAST = -200
"""Priority among the finalizers of multiprocessing, whose own folder has -100."""


def use_own_folder() -> None:
    """Makes this process and its children create temporary files in a new folder. Call it before wandb is imported."""
    _keep_compiled_kernels()
    folder = ScratchFolder(_PREFIX)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.path)
    Finalize(None, folder.close, exitpriority=_REMOVED_LAST)


def _keep_compiled_kernels() -> None:
    """Leaves the kernels that torch.compile has compiled where later runs find them, which is where torch keeps them by default."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = str(os.getuid())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")
