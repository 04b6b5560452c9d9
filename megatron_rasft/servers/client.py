"""The HTTP client of one SGLang server: probing it, pausing it, and the requests of a weight update.

The client blocks and is thread-safe. A weight update needs both: the request must be under way while this process takes part in
the broadcast that the server waits for, so the caller runs one thread per server beside the collective.

Every request opens its own connection, so that no stale connection remains after a server restarts. A request ends within its
deadline, and raises ServerError unless the HTTP status and ``success`` in the body report success. Proxy settings of the
environment are ignored.
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

from megatron_rasft.errors import ServerError, ServerTimeoutError, ServerUnreachableError
from megatron_rasft.servers.addresses import resolved
from megatron_rasft.servers.info import ServerInfo, version_label, weight_version_of
from megatron_rasft.types import PauseMode

FULL_STATUSES = (429, 503)
"""HTTP statuses with which a busy server refuses a request."""

_FLUSH_RETRY_S = 0.2
FULL_RETRY_S = 1.0
_STARTING_S = 5.0
"""Wait for /health, which a starting server answers at once, an idle one after a second and a paused one after 20 s."""
_LONGEST_QUOTE_CHARS = 500
"""Maximum length of a quoted message, characters. It is large because NCCL puts the cause of an error at the end."""


class ServerClient:
    """Requests to one server.

    Args:
        url: ``http://host:port``.
        api_key: bearer key, the server's --api-key.
        admin_api_key: bearer key for control requests if the server has an --admin-api-key.
        deadline_s: longest duration of a request without its own deadline.
        transport: replaces the network in tests.
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
        self._uses_network = transport is None
        self._client = httpx.Client(
            base_url=self.url,
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def __enter__(self) -> "ServerClient":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the client. The server keeps running."""
        self._client.close()

    def probe(self, deadline_s: float | None = None) -> ServerInfo:
        """Asks the server about its model, its flags and its endpoints.

        These requests neither generate nor change anything, so the server answers them even while it is paused.
        """
        ends = time.monotonic() + (deadline_s or self.deadline_s)
        server = self._first_of("/server_info", "/get_server_info", ends=ends)
        model = self._first_of("/model_info", "/get_model_info", ends=ends)
        label = str(model.get("weight_version", server.get("weight_version", "default")))
        path = model.get("model_path") or server.get("model_path")
        if not isinstance(path, str):
            raise ServerError(self.url, "is not an SGLang server: its /model_info has no model_path")
        try:
            return ServerInfo(
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
            raise ServerError(
                self.url, f"returned an invalid /server_info or /model_info ({error})"
            ) from error

    def check_health(self, deadline_s: float | None = None) -> None:
        """Raises ServerError while the server is still warming up or cannot generate."""
        self._call("GET", "/health", None, self._ends(deadline_s), is_admin=False)

    def is_starting(self) -> bool:
        """Returns whether the server is still warming up, or is about to end.

        It answers other requests even then. But SGLang's own warm-up request must succeed: if other requests fill the queue, or
        pause the server, it ends itself. A paused or busy server, which answers /health late, counts as started.
        """
        try:
            self.check_health(_STARTING_S)
        except ServerError as error:
            return error.status == 503
        return False

    def weight_label(self, deadline_s: float | None = None) -> str:
        """Returns the label of the server's current weights."""
        ends = time.monotonic() + (deadline_s or self.deadline_s)
        model = self._first_of("/model_info", "/get_model_info", ends=ends)
        if "weight_version" not in model:
            raise ServerError(self.url, "returned a /model_info without weight_version")
        return str(model["weight_version"])

    def weight_version(self, deadline_s: float | None = None) -> int | None:
        """Returns the number of optimizer steps of the server's weights; None if no trainer set their label."""
        return weight_version_of(self.weight_label(deadline_s))

    def pause(self, mode: PauseMode = "abort", deadline_s: float | None = None) -> None:
        """Stops generation. New requests wait until ``resume``.

        With ``abort`` the running requests end and return the tokens they have so far.
        """
        self._post("/pause_generation", {"mode": mode}, deadline_s)

    def resume(self, deadline_s: float | None = None) -> None:
        """Continues generation (/continue_generation)."""
        self._post("/continue_generation", {}, deadline_s)

    def abort_all(self, deadline_s: float | None = None) -> None:
        """Ends every running request, which returns the tokens it has so far."""
        self._post("/abort_request", {"abort_all": True}, deadline_s)

    def flush_cache(self, deadline_s: float | None = None) -> None:
        """Empties the prefix cache. Retries while the server refuses because requests are still finishing."""
        limit = deadline_s or self.deadline_s
        try:
            self._retried("/flush_cache", None, limit, (400,), _FLUSH_RETRY_S)
        except ServerError as error:
            if error.status != 400:
                raise
            raise ServerError(
                self.url,
                f"still refuses /flush_cache after {limit:g} s ({error.reason}): requests are still running",
                error.status,
            ) from error

    def begin_weight_update(self, deadline_s: float | None = None) -> None:
        """Opens an update session. Only servers with ``ServerInfo.has_update_session`` have this endpoint."""
        self._post("/begin_weight_update", {}, deadline_s)

    def end_weight_update(self, deadline_s: float | None = None) -> None:
        """Closes the update session; the server then finalizes packed and quantized weights.

        Must also be called after a failed update, because an open session blocks the next one.
        """
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
        """Makes the server join a process group as ranks ``rank_offset`` .. ``rank_offset + tp_size - 1``.

        Returns when the rendezvous is complete, so the other ranks must join at the same time. The server has no deadline for
        it: if the other ranks never come, it hangs until it is restarted.
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
        """Makes the server leave a process group. Raises ServerError if the server is not in the group."""
        self._post("/destroy_weights_update_group", {"group_name": group_name}, deadline_s)

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        deadline_s: float | None = None,
    ) -> None:
        """Makes the server receive and load tensors from rank 0 of the group: all of them end to end in one uint8 broadcast,
        which must run at the same time.

        Args:
            names: Hugging Face names.
            dtypes: torch's names without ``torch.``, e.g. ``bfloat16``.
            shapes: unsharded shapes.
        """
        body: dict[str, Any] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(s) for s in shapes],
            "group_name": group_name,
            # With a flush a busy server reports a failure although it has applied the weights; before 0.5.21 it dies.
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }
        self._post("/update_weights_from_distributed", body, deadline_s)

    def update_weights_from_tensor(
        self,
        serialized: Sequence[str],
        deadline_s: float | None = None,
    ) -> None:
        """Makes the server load tensors from the request itself, or over CUDA IPC from a process on the same GPU.

        Args:
            serialized: a ``flattened_bucket`` in base64 for each tensor-parallel rank of the server.
        """
        body: dict[str, Any] = {
            "serialized_named_tensors": list(serialized),
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }
        self._post("/update_weights_from_tensor", body, deadline_s)

    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        flush_cache: bool = True,
        deadline_s: float | None = None,
    ) -> None:
        """Makes the server load a Hugging Face folder, without an update session. If it fails, the server keeps the old weights.

        The cache is flushed by a request of its own, which can wait. SGLang's flush inside the update ends the server if a
        request that was just answered is still leaving its batch (flush_cache_after_weight_update).
        """
        body = {"model_path": str(folder), "flush_cache": False}
        self._post("/update_weights_from_disk", body, deadline_s)
        if flush_cache:
            self.flush_cache(deadline_s)

    def set_weight_version(self, weight_version: int, deadline_s: float | None = None) -> None:
        """Sets the weight label to this version. Running requests continue."""
        self.set_weight_label(version_label(weight_version), deadline_s)

    def set_weight_label(self, label: str, deadline_s: float | None = None) -> None:
        """Sets the weight label to any text. Running requests continue."""
        # without the second field SGLang aborts running requests
        body = {"new_version": label, "abort_all_requests": False}
        self._post("/update_weight_version", body, deadline_s)

    def release_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        """Makes an idle server release GPU memory: ``weights``, ``kv_cache``, or both for None."""
        self._post("/release_memory_occupation", {"tags": None if tags is None else list(tags)}, deadline_s)

    def resume_memory(self, tags: Sequence[str] | None = None, deadline_s: float | None = None) -> None:
        """Makes the server allocate released memory again. The memory's content is undefined until it is written."""
        self._post("/resume_memory_occupation", {"tags": None if tags is None else list(tags)}, deadline_s)

    def checksums(self, deadline_s: float | None = None) -> list[dict[str, str]]:
        """Returns for each tensor-parallel rank: the server's name of a (fused) tensor -> hash of its bytes."""
        answer = self._post("/weights_checker", {"action": "checksum"}, deadline_s)
        try:
            return [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                self.url, f"/weights_checker answered without checksums: {_quoted(answer)}"
            ) from error

    def weights_by_name(self, name: str, truncate_size: int = 100, deadline_s: float | None = None) -> Any:
        """Returns the first rows of a tensor by its Hugging Face name. SGLang lacks this for some families, e.g. Qwen."""
        body = {"name": name, "truncate_size": truncate_size}
        return self._call("POST", "/get_weights_by_name", body, self._ends(deadline_s))

    def generate(self, body: dict[str, Any], deadline_s: float | None = None) -> Any:
        """Sends one /generate request, for probes and checks; rollouts are requested by ``rollout/sampling.py``.

        Retries until the deadline while the server is full.
        """
        limit = deadline_s or self.deadline_s
        return self._retried("/generate", body, limit, FULL_STATUSES, FULL_RETRY_S, is_admin=False)

    def _retried(
        self,
        path: str,
        body: dict[str, Any] | None,
        limit_s: float,
        refusals: Sequence[int],
        wait_s: float,
        is_admin: bool = True,
    ) -> Any:
        """Posts a request until its answer has none of the statuses ``refusals``; raises the last refusal at the deadline."""
        ends = time.monotonic() + limit_s
        refusal: ServerError | None = None
        while True:
            try:
                return self._call("POST", path, body, ends, is_admin)
            except ServerError as error:
                if error.status in refusals:
                    refusal = error
                elif refusal is None or time.monotonic() < ends:
                    raise
                # else the last attempt had too little time, and the refusal before it says more than its time-out
                if time.monotonic() + wait_s > ends:
                    raise refusal from None
            time.sleep(wait_s)

    @cached_property
    def _num_addresses(self) -> int:
        """The number of IP addresses of the host. httpx tries them in turn, each with the full connect time-out."""
        return max(1, len(resolved(self.url))) if self._uses_network else 1

    def _ends(self, deadline_s: float | None) -> float:
        return time.monotonic() + (deadline_s or self.deadline_s)

    def _post(self, path: str, body: dict[str, Any], deadline_s: float | None) -> dict[str, Any]:
        answer = self._call("POST", path, body, self._ends(deadline_s))
        return answer if isinstance(answer, dict) else {}

    def _first_of(self, *paths: str, ends: float) -> dict[str, Any]:
        """Returns the JSON object from the first of these endpoints that exists on the server."""
        # older versions of SGLang use other names for the endpoints
        for path in paths:
            try:
                answer = self._call("GET", path, None, ends, is_admin=False)
            except ServerError as error:
                if error.status in (404, 405):
                    continue
                raise
            if isinstance(answer, dict):
                return answer
            raise ServerError(self.url, f"{path} did not answer with a JSON object: {_quoted(answer)}")
        raise ServerError(self.url, f"is not an SGLang server: it has none of {', '.join(paths)}")

    def _has(self, path: str, ends: float) -> bool:
        """Returns whether the server has an endpoint. OPTIONS requests have no side effects; status 404 means no."""
        response, _ = self._exchange("OPTIONS", path, None, ends, is_admin=True)
        if response.status_code >= 500:
            raise ServerError(
                self.url, f"OPTIONS {path} answered {response.status_code}", response.status_code
            )
        return response.status_code != 404

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, ends: float, is_admin: bool = True
    ) -> Any:
        """Returns the answer's JSON, or its text if it is not JSON; raises ServerError if it reports a failure."""
        response, content = self._exchange(method, path, body, ends, is_admin)
        answer = _parsed(content)
        if response.status_code == 401:
            raise ServerError(
                self.url, f"{path} needs a bearer key (--rollout-api-key-env) or refuses the given key", 401
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
        """Sends a request and reads the whole answer. The deadline also applies if headers or body arrive too slowly."""
        key = self._admin_api_key if is_admin else self._api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        began = time.monotonic()
        left = ends - began
        if left <= 0:
            raise ServerError(self.url, f"the deadline ended before {path} was sent")
        parts = []
        cutoff = _Cutoff(left)
        try:
            with (
                cutoff,
                self._client.stream(
                    method,
                    path,
                    json=body,
                    headers=headers,
                    timeout=httpx.Timeout(left, connect=left / self._num_addresses),
                    extensions={"trace": cutoff.trace},
                ) as response,
            ):
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > ends:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            # UnicodeError: the host name is invalid
            if cutoff.has_passed or isinstance(error, httpx.TimeoutException):
                waited = time.monotonic() - began
                reason = f"{path} did not answer within {waited:.1f} s"
                raise ServerTimeoutError(self.url, reason) from error
            if isinstance(error, httpx.ConnectError):
                raise ServerUnreachableError(self.url, f"cannot be reached ({error})") from error
            reason = f"{path} broke off ({type(error).__name__}: {error})"
            raise ServerError(self.url, reason) from error
        if time.monotonic() > ends:
            raise ServerError(self.url, f"{path} was still answering when its {left:.1f} s ended")
        return response, b"".join(parts)


class _Cutoff:
    """Shuts a connection down at a deadline. httpx's own time-outs are not enough, because every received byte restarts them.

    Args:
        seconds: time from entering the context.
    """

    def __init__(self, seconds: float) -> None:
        self.has_passed = False
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def __enter__(self) -> "_Cutoff":
        self._timer.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Keeps the connection that httpx opens; pass it as the request's ``trace`` extension."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._connection = info["return_value"].get_extra_info("socket")
            if self.has_passed:  # the deadline passed while it was connecting
                self._end_connection()

    def _pass(self) -> None:
        self.has_passed = True
        self._end_connection()

    def _end_connection(self) -> None:
        if self._connection is not None:
            with suppress(OSError):  # httpx has already closed the connection
                self._connection.shutdown(socket.SHUT_RDWR)


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _max_running_requests(server: dict[str, Any]) -> int | None:
    """Returns the server's --max-running-requests, or without that flag the number that the server chose."""
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
    except (ValueError, RecursionError):  # RecursionError: too many nested brackets
        return content.decode("utf-8", errors="replace")


def _reason(answer: Any) -> str:
    """Returns the message of a failure. Versions of SGLang put it in different fields."""
    if isinstance(answer, dict):
        error = answer.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        answer = answer.get("message") or inner or answer.get("detail") or answer
    return _quoted(answer)


def _quoted(answer: Any) -> str:
    text = " ".join((answer if isinstance(answer, str) else json.dumps(answer, default=str)).split())
    if len(text) > _LONGEST_QUOTE_CHARS:
        text = text[: _LONGEST_QUOTE_CHARS - 3] + "..."
    return text or "(empty answer)"
