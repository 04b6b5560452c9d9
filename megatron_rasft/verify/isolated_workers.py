"""Worker processes that are forked from a server which has loaded the grader, and never the main script."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_MAIN_LOCK = threading.Lock()


class _IsolatedProcess(ForkServerProcess):
    """A worker process that does not import the main script again.

    multiprocessing imports the parent's main script into every child that is not forked from the parent. For a trainer
    that would be torch and Megatron in each worker. Python has no option against this, but skips the import if ``__main__`` has
    neither a file nor a spec (multiprocessing/spawn.py, ``get_preparation_data``). So both are hidden while a child starts.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _hidden_main():
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class IsolatedContext(ForkServerContext):
    """A multiprocessing context whose fork server loads some modules once for all workers.

    Args:
        preloaded: names of the modules. Ignored if this program has started the server before.
        locks: gets the locks that the pool asks for. Python deletes a lock's file with the last reference to the lock, and pebble
            drops its own before it kills the workers: one that is still starting would not find the file, and print a traceback.
    """

    Process = _IsolatedProcess  # type: ignore[assignment]

    def __init__(self, preloaded: list[str], locks: list[Any]) -> None:
        super().__init__()
        self.set_forkserver_preload(preloaded)
        self._locks = locks

    def RLock(self) -> Any:
        """Returns a lock that lasts until ``locks`` is cleared."""
        self._locks.append(super().RLock())
        return self._locks[-1]


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    with _MAIN_LOCK:
        hidden: dict[str, Any] = {
            name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)
        }
        try:
            vars(main).pop("__file__", None)
            main.__spec__ = None
            yield
        finally:
            vars(main).update(hidden)
