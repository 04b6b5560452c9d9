"""The control plane of one SGLang server: what it is, pausing it, and the calls of a weight update.

Blocking and thread-safe on purpose: a weight update posts to a server while this process takes part in the
broadcast that the server waits for, so the caller runs one thread per server and the collective in its own.
Every call opens a connection of its own (a server that was restarted leaves no stale one behind), ends
within its deadline, checks the HTTP status and ``success`` in the body, and raises ServerError otherwise.
Proxies of the environment are not used.
"""

import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import httpx

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.addresses import resolved
from megatron_rasft.servers.info import ServerInfo, version_label, weight_version_of
from megatron_rasft.types import PauseMode

NO_ROOM = (429, 503)
"""HTTP statuses of a server that is full."""

_PAUSE_BETWEEN_TRIES_S = 0.2
_PAUSE_WITHOUT_ROOM_S = 1.0
_LONGEST_QUOTE_CHARS = 500  # an error of NCCL's, which says last what was wrong


class ServerClient:
    """One server, by its address.

    Args:
        url: ``http://host:port``.
        api_key: bearer key of the server's --api-key.
        admin_api_key: bearer key of its --admin-api-key, which the control calls need if it has one.
        deadline_s: longest time a call may take where the call is not given its own.
        transport: stands in for the network in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        deadline_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self._api_key = api_key
        self._admin_api_key = admin_api_key or api_key
        self._is_networked = transport is None
        self._client = httpx.Client(
            base_url=self.url,
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self._info: ServerInfo | None = None

    def __enter__(self) -> "ServerClient":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    @property
    def info(self) -> ServerInfo:
        """What the server is; asked for once."""
        if self._info is None:
            self._info = self.probe()
        return self._info

    def probe(self, deadline_s: float | None = None) -> ServerInfo:
        """Ask the server what it is and what it can do, and remember it; again after a restart.

        Generates nothing and changes nothing, so it also works while the server is paused.
        """
        ends = time.monotonic() + (deadline_s or self.deadline_s)
        server = self._first_of("/server_info", "/get_server_info", ends=ends)
        model = self._first_of("/model_info", "/get_model_info", ends=ends)
        label = str(model.get("weight_version", server.get("weight_version", "default")))
        path = model.get("model_path") or server.get("model_path")
        if not isinstance(path, str):
            raise ServerError(self.url, "is no SGLang server: its /model_info names no model_path")
        try:
            self._info = ServerInfo(
                url=self.url,
                version=str(server.get("version", "of unknown version")),
                model_path=path,
                model_config=_read_config(path),
                architectures=tuple(model.get("architectures") or ()),
                dtype=str(server.get("dtype", "auto")),
                quantization=server.get("quantization"),
                tp_size=int(server.get("tp_size", 1)),
                dp_size=int(server.get("dp_size", 1)),
                pp_size=int(server.get("pp_size", 1)),
                weight_version=weight_version_of(label),
                weight_label=label,
                max_total_tokens=_count(server.get("max_total_num_tokens")),
                context_length=_count(server.get("context_length")),
                max_running_requests=_max_running_requests(server),
                is_deterministic=bool(server.get("enable_deterministic_inference")),
                has_update_session=self._has("/begin_weight_update", ends),
                has_weights_checker=self._has("/weights_checker", ends),
                has_memory_saver=bool(server.get("enable_memory_saver")),
                random_seed=_count(server.get("random_seed")),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ServerError(self.url, f"says of itself what cannot be true ({error})") from error
        return self._info

    def check_health(self, deadline_s: float | None = None) -> None:
        """A ServerError while the server still warms up, or cannot generate."""
        self._call("GET", "/health", None, self._ends(deadline_s), is_admin=False)

    def weight_label(self, deadline_s: float | None = None) -> str:
        """The version label of the weights the server has now."""
        ends = time.monotonic() + (deadline_s or self.deadline_s)
        model = self._first_of("/model_info", "/get_model_info", ends=ends)
        if "weight_version" not in model:
            raise ServerError(self.url, "does not say which weights it has (weight_version in /model_info)")
        return str(model["weight_version"])

    def weight_version(self, deadline_s: float | None = None) -> int | None:
        """Optimizer steps its weights had seen; None for a label that no trainer gave."""
        return weight_version_of(self.weight_label(deadline_s))

    def pause(self, mode: PauseMode = "abort", deadline_s: float | None = None) -> None:
        """Stop generation; ``abort`` also ends what is running, which then returns what it has so far.

        New requests wait until ``resume``.
        """
        self._post("/pause_generation", {"mode": mode}, deadline_s)

    def resume(self, deadline_s: float | None = None) -> None:
        """Go on generating (/continue_generation)."""
        self._post("/continue_generation", {}, deadline_s)

    def abort_all(self, deadline_s: float | None = None) -> None:
        """End every running request; each returns what it has so far."""
        self._post("/abort_request", {"abort_all": True}, deadline_s)

    def flush_cache(self, deadline_s: float | None = None) -> None:
        """Forget every cached prefix, trying again while requests are still leaving."""
        limit = deadline_s or self.deadline_s
        ends = time.monotonic() + limit
        while True:
            try:
                self._call("POST", "/flush_cache", None, ends)
                return
            except ServerError as error:
                if error.status != 400:
                    raise
                if time.monotonic() + _PAUSE_BETWEEN_TRIES_S >= ends:
                    raise ServerError(
                        self.url,
                        f"still refuses /flush_cache after {limit:g} s ({error.reason}): requests are still running",
                        error.status,
                    ) from error
            time.sleep(_PAUSE_BETWEEN_TRIES_S)

    def begin_weight_update(self, deadline_s: float | None = None) -> None:
        """Open an update session; does nothing on a server that knows none."""
        if self.info.has_update_session:
            self._post("/begin_weight_update", {}, deadline_s)

    def end_weight_update(self, deadline_s: float | None = None) -> None:
        """Close the session, which finalizes packed and quantized weights; nothing where there is none.

        Must be called after a failed update too: a session left open blocks the next one.
        """
        if self.info.has_update_session:
            self._post("/end_weight_update", {}, deadline_s)

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: Literal["nccl", "gloo"],
        deadline_s: float | None = None,
    ) -> None:
        """Join a process group as ranks ``rank_offset`` .. ``rank_offset + tp_size - 1``.

        Returns when the rendezvous is complete, so the other ranks must be joining meanwhile. The server
        itself has no deadline: if they never come it stays stuck, and only a restart helps.
        """
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body, deadline_s)

    def destroy_weights_update_group(self, group_name: str, deadline_s: float | None = None) -> None:
        """Leave a process group; a ServerError if the server is not in it."""
        self._post("/destroy_weights_update_group", {"group_name": group_name}, deadline_s)

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        flush_cache: bool,
        weight_version: int | None = None,
        load_format: Literal["flattened_bucket"] | None = "flattened_bucket",
        deadline_s: float | None = None,
    ) -> None:
        """Receive tensors from rank 0 of the group; the broadcast must run meanwhile.

        With ``flush_cache`` a server that is not idle answers a failure although the weights were applied,
        and one before 0.5.21 dies: flush on the last bucket only, after ``pause("abort")``.

        Args:
            names: Hugging Face names.
            dtypes: as torch spells them without ``torch.``, e.g. ``bfloat16``.
            shapes: unsharded shapes.
            weight_version: label to set once these are loaded; None keeps the label.
            load_format: ``flattened_bucket`` is one uint8 broadcast of all tensors end to end; None is one
                broadcast per tensor.
        """
        body: dict[str, Any] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(s) for s in shapes],
            "group_name": group_name,
            "flush_cache": flush_cache,
            **_optional(load_format=load_format, weight_version=_label(weight_version)),
        }
        self._post("/update_weights_from_distributed", body, deadline_s)

    def update_weights_from_tensor(
        self,
        serialized: Sequence[str],
        *,
        flush_cache: bool,
        weight_version: int | None = None,
        load_format: str | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Take tensors from the request itself, or over CUDA IPC from a process on the same GPU.

        Args:
            serialized: base64, one entry per tensor-parallel rank of the server.
        """
        body: dict[str, Any] = {
            "serialized_named_tensors": list(serialized),
            "flush_cache": flush_cache,
            **_optional(load_format=load_format, weight_version=_label(weight_version)),
        }
        self._post("/update_weights_from_tensor", body, deadline_s)

    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        weight_version: int | None = None,
        flush_cache: bool = True,
        deadline_s: float | None = None,
    ) -> None:
        """Load a Hugging Face folder that the server can read too. Needs no session; a failure changes nothing.

        The cache is flushed by a request of its own, which waits: SGLang's flush inside the update ends the server while a
        request that was just answered is still leaving its batch (flush_cache_after_weight_update).
        """
        body: dict[str, Any] = {
            "model_path": str(folder),
            "flush_cache": False,
            **_optional(weight_version=_label(weight_version)),
        }
        self._post("/update_weights_from_disk", body, deadline_s)
        if flush_cache:
            self.flush_cache(deadline_s)

    def set_weight_version(self, weight_version: int, deadline_s: float | None = None) -> None:
        """Set the label alone; running requests go on."""
        self.set_weight_label(version_label(weight_version), deadline_s)

    def set_weight_label(self, label: str, deadline_s: float | None = None) -> None:
        """The same for a label that is no trainer's."""
        body = {"new_version": label, "abort_all_requests": False}
        self._post("/update_weight_version", body, deadline_s)

    def release_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        """Give up GPU memory (``weights``, ``kv_cache``; None: all). The server must be idle."""
        self._post("/release_memory_occupation", {"tags": None if tags is None else list(tags)}, deadline_s)

    def resume_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        """Take the released memory back; its content is undefined until it is written again."""
        self._post("/resume_memory_occupation", {"tags": None if tags is None else list(tags)}, deadline_s)

    def checksums(self, deadline_s: float | None = None) -> list[dict[str, str]]:
        """Per tensor-parallel rank: the server's own (fused) tensor name -> hash of its bytes."""
        answer = self._post("/weights_checker", {"action": "checksum"}, deadline_s)
        try:
            return [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                self.url, f"/weights_checker answered without checksums: {_quoted(answer)}"
            ) from error

    def weights_by_name(self, name: str, truncate_size: int = 100, deadline_s: float | None = None) -> Any:
        """First values of a tensor by its Hugging Face name; some families answer an error (e.g. Qwen)."""
        body = {"name": name, "truncate_size": truncate_size}
        return self._call("POST", "/get_weights_by_name", body, self._ends(deadline_s))

    def generate(self, body: dict[str, Any], deadline_s: float | None = None) -> Any:
        """One blocking /generate, for a probe or a preflight; rollouts go through ``sampling.py``.

        A server that has no room is asked again until the deadline.
        """
        ends = self._ends(deadline_s)
        while True:
            try:
                return self._call("POST", "/generate", body, ends, is_admin=False)
            except ServerError as error:
                if error.status not in NO_ROOM or time.monotonic() + _PAUSE_WITHOUT_ROOM_S > ends:
                    raise
            time.sleep(_PAUSE_WITHOUT_ROOM_S)

    @cached_property
    def _num_addresses(self) -> int:
        """Of the server's host: each in turn is given the time that a connection may take."""
        return max(1, len(resolved(self.url))) if self._is_networked else 1

    def _ends(self, deadline_s: float | None) -> float:
        return time.monotonic() + (deadline_s or self.deadline_s)

    def _post(self, path: str, body: dict[str, Any], deadline_s: float | None) -> dict[str, Any]:
        answer = self._call("POST", path, body, self._ends(deadline_s))
        return answer if isinstance(answer, dict) else {}

    def _first_of(self, *paths: str, ends: float) -> dict[str, Any]:
        """The first of these spellings that the server knows; a JSON object."""
        for path in paths:
            try:
                answer = self._call("GET", path, None, ends, is_admin=False)
            except ServerError as error:
                if error.status in (404, 405):
                    continue
                raise
            if isinstance(answer, dict):
                return answer
            raise ServerError(self.url, f"{path} answered no JSON object: {_quoted(answer)}")
        raise ServerError(self.url, f"is no SGLang server: it knows none of {', '.join(paths)}")

    def _has(self, path: str, ends: float) -> bool:
        """Whether the server has an endpoint; OPTIONS runs nothing, and 404 means no."""
        response, _ = self._exchange("OPTIONS", path, None, ends, is_admin=True)
        if response.status_code >= 500:
            raise ServerError(
                self.url, f"OPTIONS {path} answered {response.status_code}", response.status_code
            )
        return response.status_code != 404

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, ends: float, is_admin: bool = True
    ) -> Any:
        """The parsed JSON of an answer that is not a failure; text where it is no JSON."""
        response, content = self._exchange(method, path, body, ends, is_admin)
        answer = _parsed(content)
        if response.status_code == 401:
            raise ServerError(
                self.url, f"{path} needs a bearer key (--rollout-api-key-env) or refuses the one given", 401
            )
        if response.status_code >= 300:
            raise ServerError(
                self.url,
                f"{path} answered {response.status_code}: {_reason(answer)}",
                response.status_code,
            )
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(self.url, f"{path} failed: {_reason(answer)}", response.status_code)
        return answer

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, ends: float, is_admin: bool
    ) -> tuple[httpx.Response, bytes]:
        """Send and read to the end; the deadline also ends an answer, or its headers, that trickle in."""
        key = self._admin_api_key if is_admin else self._api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        began = time.monotonic()
        left = ends - began
        if left <= 0:
            raise ServerError(self.url, f"no time was left for {path}")
        parts = []
        cut = _Cut(left)
        try:
            with (
                cut,
                self._client.stream(
                    method,
                    path,
                    json=body,
                    headers=headers,
                    timeout=httpx.Timeout(left, connect=left / self._num_addresses),
                    extensions={"trace": cut.trace},
                ) as response,
            ):
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > ends:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last: of a host's name
            if cut.has_come or isinstance(error, httpx.TimeoutException):
                waited = time.monotonic() - began
                reason = f"{path} gave no answer within {waited:.1f} s"
            elif isinstance(error, httpx.ConnectError):
                reason = f"cannot be reached ({error})"
            else:
                reason = f"{path} broke off ({type(error).__name__}: {error})"
            raise ServerError(self.url, reason) from error
        if time.monotonic() > ends:
            raise ServerError(self.url, f"{path} was still answering when its {left:.1f} s ended")
        return response, b"".join(parts)


class _Cut:
    """Ends a connection after a time, whatever it is at: httpx's own timeouts begin anew with every byte.

    Args:
        seconds: from entering.
    """

    def __init__(self, seconds: float) -> None:
        self.has_come = False
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._come)
        self._timer.daemon = True

    def __enter__(self) -> "_Cut":
        self._timer.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """For the request's ``trace`` extension: learns the connection."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._connection = info["return_value"].get_extra_info("socket")
            if self.has_come:  # before there was a connection
                self._end_connection()

    def _come(self) -> None:
        self.has_come = True
        self._end_connection()

    def _end_connection(self) -> None:
        if self._connection is not None:
            with suppress(OSError):  # it was closed meanwhile
                self._connection.shutdown(socket.SHUT_RDWR)


def _label(weight_version: int | None) -> str | None:
    return None if weight_version is None else version_label(weight_version)


def _optional(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _max_running_requests(server: dict[str, Any]) -> int | None:
    """The flag, or, where it was left out, what the server chose by itself."""
    chosen = server.get("max_running_requests")
    states = server.get("internal_states")
    if chosen is None and isinstance(states, list) and states and isinstance(states[0], dict):
        chosen = states[0].get("effective_max_running_requests_per_dp")
    return _count(chosen)


def _read_config(model_path: str) -> dict[str, Any] | None:
    try:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # the second: brackets without end
        return content.decode("utf-8", errors="replace")


def _reason(answer: Any) -> str:
    """What a refusal says, wherever this version of the server puts it."""
    if isinstance(answer, dict):
        error = answer.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        answer = answer.get("message") or inner or answer.get("detail") or answer
    return _quoted(answer)


def _quoted(answer: Any) -> str:
    text = " ".join((answer if isinstance(answer, str) else json.dumps(answer, default=str)).split())
    if len(text) > _LONGEST_QUOTE_CHARS:
        text = text[: _LONGEST_QUOTE_CHARS - 3] + "..."
    return text or "(nothing)"
