"""NCCL over gloo: process groups report the backend "nccl", but gloo runs their collectives."""

import functools
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_nccl_groups: set[Any] = set()
_default_is_nccl = False


def _gloo(backend: Any) -> tuple[Any, bool]:
    """Returns the backend to pass to torch instead of ``backend``, and whether ``backend`` was NCCL."""
    name = None if backend is None else str(backend).lower()
    if name is None or "nccl" not in name:
        return backend, False
    return "gloo", True


def _init_process_group(original: Any) -> Any:
    @functools.wraps(original)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        global _default_is_nccl
        backend, is_nccl = _gloo("nccl" if backend is None else backend)
        _default_is_nccl = is_nccl
        kwargs.pop("device_id", None)
        if is_nccl:
            kwargs.pop("pg_options", None)
        return original(backend, *args, **kwargs)

    return init_process_group


def _new_group(original: Any) -> Any:
    @functools.wraps(original)
    def new_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: Any = None,
        pg_options: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        inherited = "nccl" if backend is None and _default_is_nccl else backend
        backend, is_nccl = _gloo(inherited)
        group = original(ranks, timeout, backend, None if is_nccl else pg_options, *args, **kwargs)
        if is_nccl and group is not dist.GroupMember.NON_GROUP_MEMBER:
            _nccl_groups.add(group)
        return group

    return new_group


def _is_nccl(group: Any) -> bool:
    if group is None or group is c10d._get_default_group():
        return _default_is_nccl
    return group in _nccl_groups


def _get_backend(original: Any) -> Any:
    @functools.wraps(original)
    def get_backend(group: Any = None) -> str:
        return "nccl" if _is_nccl(group) else original(group)

    return get_backend


class _Work:
    """A request that can be waited for twice, like NCCL's. A second wait of gloo would expect a second message."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._is_done = False

    def wait(self, *args: Any) -> bool:
        if not self._is_done:
            self._work.wait(*args)
            self._is_done = True
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _isend(original: Any) -> Any:
    @functools.wraps(original)
    def isend(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        # NCCL sends in stream order, so memory that is freed after the call cannot be overwritten before. gloo needs a copy.
        return _again(original(tensor.clone(), *args, **kwargs))

    return isend


def _irecv(original: Any) -> Any:
    @functools.wraps(original)
    def irecv(*args: Any, **kwargs: Any) -> Any:
        return _again(original(*args, **kwargs))

    return irecv


def _again(work: Any) -> Any:
    return work if work is None or isinstance(work, _Work) else _Work(work)


def install() -> None:
    """Makes torch.distributed accept NCCL groups in this process."""
    wrappers = {
        "init_process_group": _init_process_group,
        "new_group": _new_group,
        "get_backend": _get_backend,
        "isend": _isend,
        "irecv": _irecv,
    }
    for name, wrap in wrappers.items():
        wrapped = wrap(getattr(c10d, name))
        setattr(c10d, name, wrapped)
        setattr(dist, name, wrapped)
