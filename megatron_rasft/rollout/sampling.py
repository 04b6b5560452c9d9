"""Samples from several SGLang servers at once: token ids in, token ids and log-probabilities out.

One HTTP request is one sample (the servers share a prompt's prefix among its samples), so each one is retried,
resumed and accounted for by itself. A sample goes to the least loaded server that has the wanted weights. What goes
wrong decides what follows:

- cannot be reached, past the deadline, no sign of life, other weights, an answer that cannot be true: the server is
  quarantined at once, and what it was working on goes to the others;
- an HTTP error or a broken connection: the sample is tried elsewhere, and three in a row quarantine the server;
- no room (HTTP 429 or 503, as where others use the server too): asked again after a moment, or as long as it says; one
  that takes nothing for as long as a sample may last is quarantined;
- aborted (somebody paused it): the sample goes on from the tokens it has;
- refused as wrong in itself (HTTP 400), or beyond what the server holds or lets a request last: given up after a second
  server has refused it too.
"""

import asyncio
import json
import math
import resource
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import psutil

from megatron_rasft.errors import RolloutError, ServerError
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.servers.client import FULL_STATUSES, ServerClient
from megatron_rasft.servers.info import version_label
from megatron_rasft.servers.record import ServerRecord
from megatron_rasft.types import FinishReason, Request, Response, SamplingParams

_FAILURES_IN_ROW = 3
_ABORTS_WITHOUT_GAIN = 20
_SHORTEST_REST_S = 1.0
"""Between two requests to a server that has no room."""
_LONGEST_REST_S = 30.0
_TAKEN_S = 1.0
"""A request that was not turned away by then is being worked on, or waits in the server's queue."""
_RAN_TOO_LONG = "running timeout"
"""In what SGLang says, with the status of a full server, of a request that took longer than SGLANG_REQ_RUNNING_TIMEOUT."""
_KEPT_BACK = 2
"""Tokens that SGLang does not give where prompt and response fill its context."""
_NUM_CHECK_TOKENS = 8
_SPARE_FILES = 256
"""What the rest of the process may open while samples are made."""
_SMALLEST_SURPLUS = 1e-3
"""A log-probability may round to a little above 0."""


@dataclass
class SamplingReport:
    """What became of the samples that were asked for; every one is in ``outcomes`` exactly once."""

    weight_version: int = 0
    num_samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """stop, length: finished; failed: given up after faults; refused: the servers would not take it."""
    num_tokens: int = 0
    """Tokens of finished samples."""
    num_retried: int = 0
    """Attempts that failed and were made again."""
    num_resumed: int = 0
    """Attempts that were aborted and went on from their tokens."""
    num_turned_away: int = 0
    """Attempts that a server had no room for, and that were made again later or elsewhere."""
    num_quarantined: int = 0
    seconds: float = 0.0
    samples_by_server: Counter[str] = field(default_factory=Counter)

    @property
    def num_finished(self) -> int:
        return self.outcomes["stop"] + self.outcomes["length"]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """One line."""
        line = f"{self.num_finished} of {self.num_samples} samples, {self.tokens_per_s:,.0f} tokens/s from "
        line += f"{len(self.samples_by_server)} server(s)"
        extra = {
            "failed": self.outcomes["failed"],
            "refused": self.outcomes["refused"],
            "retried": self.num_retried,
            "resumed": self.num_resumed,
            "turned away": self.num_turned_away,
        }
        return line + "".join(f", {count} {name}" for name, count in extra.items() if count)

    def values(self) -> dict[str, float]:
        """For the metrics."""
        return {
            "rollout/requested": self.num_samples,
            "rollout/failed": self.num_samples - self.num_finished,
            "rollout/retried": self.num_retried,
            "rollout/resumed": self.num_resumed,
            "rollout/turned_away": self.num_turned_away,
            "rollout/servers": len(self.samples_by_server),
            "rollout/quarantined_servers": self.num_quarantined,
            "rollout/tokens_per_s": self.tokens_per_s,
        }


class Answers(NamedTuple):
    """Per request one response per seed, in their order; None in the place of each that servers failed to give."""

    responses: list[list[Response | None]]
    report: SamplingReport


@dataclass(eq=False)
class _Sample:
    """One sample on its way: what it has so far, and how often it was tried."""

    request: int
    index: int
    prompt_ids: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_failures: int = 0
    num_refusals: int = 0
    num_idle_aborts: int = 0
    failed_at: ServerRecord | None = None
    """The server of its last failure; it goes elsewhere next, if there is another."""

    def forget(self) -> None:
        self.token_ids, self.logprobs = [], []


class _Part(NamedTuple):
    """What one attempt gave."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class _Attempt(NamedTuple):
    """One request on its way."""

    sample: _Sample
    server: ServerRecord
    began: float


class _Fault(Exception):
    """One attempt failed."""

    def __init__(
        self, reason: str, *, is_grave: bool = False, is_refusal: bool = False, rest_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_grave = is_grave
        self.is_refusal = is_refusal
        self.rest_s = rest_s
        """Set where the server had no room: how long to leave it alone, seconds."""


async def sample(
    fleet: Fleet,
    requests: Sequence[Request],
    params: SamplingParams,
    weight_version: int,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Answers:
    """Sample every seed of every request from the servers that have the weights of this version.

    Returns what could be had: nothing is raised because servers fail. No request lasts longer than --rollout-deadline-s, and
    a sample has --rollout-attempts of them that may fail; one that is aborted goes on as long as it gains tokens.
    Cancelling it closes every connection, which makes the servers drop the requests.

    Raises:
        RolloutError: a prompt has token ids outside the servers' vocabulary (which would kill some servers).
    """
    return await _Sampling(fleet, requests, params, weight_version, transport).run()


class _Sampling:
    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Request],
        params: SamplingParams,
        weight_version: int,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._fleet = fleet
        self._config = fleet.config
        self._params = params
        self._label = version_label(weight_version)
        self._servers = fleet.serving(weight_version)
        self._vocab_size = fleet.vocab_size
        self._transport = transport
        self._waiting: deque[_Sample] = deque()
        for number, request in enumerate(requests):
            _check_prompt(request.prompt_ids, number, self._vocab_size)
            for index, seed in enumerate(request.seeds):
                self._waiting.append(_Sample(number, index, request.prompt_ids, seed))
        self._results: list[list[Response | None]] = [[None] * len(r.seeds) for r in requests]
        self._report = SamplingReport(weight_version=weight_version, num_samples=len(self._waiting))
        self._running: dict[asyncio.Task[_Part], _Attempt] = {}
        self._max_running = self._room_for_connections()
        self._ended: asyncio.Queue[asyncio.Task[_Part] | None] = asyncio.Queue()
        """Attempts that are over; None: a server has rested."""
        self._resting: set[ServerRecord] = set()
        self._full_since: dict[ServerRecord, float] = {}
        """When a server first had no room, of those that took nothing since."""
        self._refusal = ""
        key = fleet.api_key
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def run(self) -> Answers:
        began = time.monotonic()
        for server in self._servers:
            server.num_in_flight = 0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            transport=self._transport, trust_env=False, limits=limits, headers=self._headers
        ) as client:
            watch = asyncio.create_task(self._watch(client))
            try:
                while self._waiting or self._running:
                    self._send(client)
                    if not self._running and not self._resting:
                        break
                    task = await self._ended.get()
                    if task is not None:
                        self._settle(task)
            finally:
                watch.cancel()
                for task in self._running:
                    task.cancel()
                await asyncio.gather(watch, *self._running, return_exceptions=True)
        self._give_up_rest()
        self._report.seconds = time.monotonic() - began
        counted = sum(self._report.outcomes.values())
        assert counted == self._report.num_samples, f"{counted} of {self._report.num_samples} accounted for"
        return Answers(self._results, self._report)

    def _room_for_connections(self) -> int:
        """Requests that may be in flight at all servers together: each is a socket, and so is each look at a server."""
        wanted = min(len(self._waiting), sum(m.max_in_flight for m in self._servers))
        room = open_file_room(wanted + len(self._servers)) - len(self._servers)
        if room < wanted:
            self._fleet.say(
                f"the limit of open files leaves room for {max(1, room)} requests at once, not {wanted}: raise it with ulimit -n"
            )
        return max(1, room)

    def _send(self, client: httpx.AsyncClient) -> None:
        """Give out waiting samples as long as there is a free place for them."""
        set_aside = []
        while self._waiting and len(self._running) < self._max_running:
            free = [m for m in self._servers if m.num_in_flight < m.max_in_flight and m not in self._resting]
            if not free:
                break
            one = self._waiting.popleft()
            server = self._least_loaded(free, one)
            if server is None:
                set_aside.append(one)
                continue
            server.num_in_flight += 1
            task = asyncio.create_task(self._attempt(client, one, server))
            self._running[task] = _Attempt(one, server, time.monotonic())
            task.add_done_callback(self._ended.put_nowait)
        self._waiting.extendleft(reversed(set_aside))

    def _least_loaded(self, free: list[ServerRecord], one: _Sample) -> ServerRecord | None:
        """The server with the largest free share; None while only the one where the sample failed is free."""
        if len(self._servers) > 1:
            free = [m for m in free if m is not one.failed_at]
        return min(free, key=lambda m: m.num_in_flight / m.max_in_flight, default=None)

    def _settle(self, task: asyncio.Task[_Part]) -> None:
        one, server, _ = self._running.pop(task)
        server.num_in_flight -= 1
        if task.cancelled():  # its server was quarantined meanwhile
            self._again(one, server)
            return
        error = task.exception()
        if error is None:
            server.num_failures_in_row = 0
            self._full_since.pop(server, None)
            self._take(one, server, task.result())
        elif isinstance(error, _Fault):
            self._fail(one, server, error)
        else:
            raise error

    def _take(self, one: _Sample, server: ServerRecord, part: _Part) -> None:
        one.token_ids += part.token_ids
        one.logprobs += part.logprobs
        finish_reason = part.finish_reason
        if finish_reason == "abort" and len(one.token_ids) == self._params.max_response_tokens(
            len(one.prompt_ids)
        ):
            finish_reason = "length"
        if finish_reason == "abort":
            self._resume(one, has_gained=bool(part.token_ids))
            return
        assert self._results[one.request][one.index] is None, "a sample was finished twice"
        self._results[one.request][one.index] = Response(
            token_ids=one.token_ids, logprobs=one.logprobs, finish_reason=finish_reason
        )
        num_tokens = len(one.token_ids)
        server.num_samples += 1
        self._report.outcomes[finish_reason] += 1
        self._report.num_tokens += num_tokens
        self._report.samples_by_server[server.url] += 1

    def _resume(self, one: _Sample, has_gained: bool) -> None:
        """Send an aborted sample again, to go on from its tokens."""
        if self._params.repetition_penalty != 1.0:
            # The tokens so far would count as prompt, which servers penalise differently: from the beginning.
            one.forget()
            has_gained = False
        if not has_gained:
            one.num_idle_aborts += 1
        if one.num_idle_aborts > _ABORTS_WITHOUT_GAIN:
            self._report.outcomes["failed"] += 1
            return
        self._report.num_resumed += 1
        self._waiting.append(one)

    def _fail(self, one: _Sample, server: ServerRecord, fault: _Fault) -> None:
        if fault.is_refusal:
            one.failed_at = server
            one.num_refusals += 1
            if one.num_refusals >= min(2, max(1, len(self._servers))):
                self._report.outcomes["refused"] += 1
                self._refusal = fault.reason
            else:
                self._waiting.append(one)
            return
        if fault.rest_s is not None:
            self._report.num_turned_away += 1
            self._waiting.append(one)
            self._rest(server, fault.reason, fault.rest_s)
            return
        server.num_failures_in_row += 1
        if fault.is_grave:
            self._quarantine(server, fault.reason)
        elif server.num_failures_in_row >= _FAILURES_IN_ROW:
            self._quarantine(server, f"failed {_FAILURES_IN_ROW} times in a row ({fault.reason})")
        self._again(one, server)

    def _rest(self, server: ServerRecord, reason: str, seconds: float) -> None:
        """Leave a server that has no room alone for a while, or for good where it has had none for too long."""
        if server in self._resting or server not in self._servers:  # told by another request already
            return
        limit = self._config.rollout_deadline_s
        now = time.monotonic()
        since = now if self._is_taking(server) else self._full_since.get(server, now)
        self._full_since[server] = since
        if now - since > limit:
            self._quarantine(server, f"had no room for {limit:g} s ({reason})")
            return
        self._resting.add(server)
        asyncio.get_running_loop().call_later(seconds, self._rested, server)

    def _is_taking(self, server: ServerRecord) -> bool:
        """Whether the server has taken a sample of this run."""
        latest = time.monotonic() - _TAKEN_S
        return any(a.server is server and a.began < latest for a in self._running.values())

    def _rested(self, server: ServerRecord) -> None:
        self._resting.discard(server)
        self._ended.put_nowait(None)

    def _again(self, one: _Sample, failed_at: ServerRecord) -> None:
        one.failed_at = failed_at
        one.num_failures += 1
        if one.num_failures >= self._config.rollout_attempts:
            self._report.outcomes["failed"] += 1
        else:
            self._report.num_retried += 1
            self._waiting.append(one)

    def _quarantine(self, server: ServerRecord, reason: str) -> None:
        """Take the server out, and what it works on back."""
        if server not in self._servers:
            return
        self._servers.remove(server)
        self._rested(server)
        self._report.num_quarantined += 1
        self._fleet.quarantine(server.url, reason)
        for task, attempt in self._running.items():
            if attempt.server is server:
                task.cancel()

    def _give_up_rest(self) -> None:
        if self._waiting:
            self._fleet.say(
                f"no rollout server is left: {len(self._waiting)} of {self._report.num_samples} samples were not made"
            )
        self._report.outcomes["failed"] += len(self._waiting)
        self._waiting.clear()
        if self._report.outcomes["refused"]:
            self._fleet.say(
                f"{self._report.outcomes['refused']} samples were refused by the servers: {self._refusal}"
            )

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Ask every working server for a sign of life now and then, and whether it still has its weights."""
        while True:
            await asyncio.sleep(self._config.rollout_watch_s / 4)
            working = [m for m in self._servers if m.num_in_flight or m in self._resting]
            faults = await asyncio.gather(*[self._sign_of_life(client, m) for m in working])
            for server, fault in zip(working, faults, strict=True):
                if fault:
                    self._quarantine(server, fault)

    async def _sign_of_life(self, client: httpx.AsyncClient, server: ServerRecord) -> str:
        limit = self._config.rollout_watch_s
        try:
            async with asyncio.timeout(limit):
                answer = await client.get(f"{server.url}/model_info", timeout=limit)
        except (TimeoutError, httpx.TimeoutException):
            return f"gave no sign of life for {limit:g} s"
        except httpx.HTTPError:
            return ""  # what it is working on will tell
        if answer.status_code in FULL_STATUSES and not self._is_taking(server):
            # a full server still says what it is; what stands in for a dead one does not
            full_s = time.monotonic() - self._full_since.get(server, math.inf)
            return f"answers {answer.status_code} to everything" if full_s > _TAKEN_S else ""
        if answer.status_code != 200:
            return ""
        info = _json_object(answer.content)
        label = None if info is None else info.get("weight_version")
        if label is not None and str(label) != self._label:
            return _other_weights(str(label), self._label)
        return ""

    async def _attempt(self, client: httpx.AsyncClient, one: _Sample, server: ServerRecord) -> _Part:
        num_left = self._params.max_response_tokens(len(one.prompt_ids)) - len(one.token_ids)
        body = self._body(one, server, num_left)
        limit = self._config.rollout_deadline_s
        connect_s = min(limit, self._config.rollout_watch_s)
        timeout = httpx.Timeout(limit, connect=connect_s)
        try:
            async with asyncio.timeout(limit):
                answer = await client.post(f"{server.url}/generate", json=body, timeout=timeout)
        except httpx.ConnectTimeout as error:
            raise _Fault(f"could not be reached for {connect_s:g} s", is_grave=True) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Fault(
                f"took longer than its deadline of {limit:g} s for one sample", is_grave=True
            ) from error
        except httpx.ConnectError as error:
            raise _Fault(f"cannot be reached ({error})", is_grave=True) from error
        except httpx.HTTPError as error:
            raise _Fault(f"broke off ({type(error).__name__}: {error})") from error
        if answer.status_code == 401:
            raise _Fault("refuses the key of --rollout-api-key-env", is_grave=True)
        if answer.status_code == 400:
            raise _Fault(_said(answer), is_refusal=True)
        if answer.status_code != 200:
            reason = f"answered {answer.status_code}: {_said(answer)}"
            ran_too_long = _RAN_TOO_LONG in reason
            is_full = answer.status_code in FULL_STATUSES and not ran_too_long
            raise _Fault(reason, is_refusal=ran_too_long, rest_s=_rest_s(answer) if is_full else None)
        part = parse_answer(
            answer.content,
            prompt_len=len(body["input_ids"]),
            max_new_tokens=num_left,
            vocab_size=self._vocab_size,
            label=self._label,
        )
        if part.token_ids and part.token_ids[-1] in self._params.stop_ids:
            # as the last token allowed it is called length, and an abort may come when all is done
            return part._replace(finish_reason="stop")
        if part.finish_reason == "length" and len(part.token_ids) < num_left - _KEPT_BACK:
            raise _Fault(
                f"{server.url} ended a response after {len(part.token_ids)} of {num_left} tokens: its key-value cache holds no more",
                is_refusal=True,
            )
        return part

    def _body(self, one: _Sample, server: ServerRecord, num_left: int) -> dict[str, Any]:
        params = self._params
        sampling: dict[str, Any] = {
            "max_new_tokens": num_left,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": params.repetition_penalty,
            "stop_token_ids": sorted(params.stop_ids),
        }
        if server.info is not None and server.info.is_deterministic:
            sampling["sampling_seed"] = one.seed
        return {
            "input_ids": [*one.prompt_ids, *one.token_ids],
            "sampling_params": sampling,
            "return_logprob": True,
        }


def open_file_room(wanted: int) -> int:
    """How many of ``wanted`` files more this process may open; its limit is raised for them where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = psutil.Process().num_fds()
    needed = num_open + wanted + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == needed else max(0, min(wanted, (soft - num_open) // 2))


def parse_answer(
    content: bytes, *, prompt_len: int, max_new_tokens: int, vocab_size: int | None, label: str
) -> _Part:
    """Read one answer of /generate and hold everything in it against what was asked.

    Raises:
        _Fault: grave, with the reason, if anything cannot be true: then nothing this server says can be used.
    """
    answer = _json_object(content)
    if answer is None:
        raise _Fault(f"answered with {len(content)} bytes that are no JSON object", is_grave=True)
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort" and not answer.get("output_ids"):
            return _Part([], [], "abort")
        tokens = answer["output_ids"]
        entries = meta["output_token_logprobs"]
        prompt_tokens = meta["prompt_tokens"]
        # Where a server tells which weights made which tokens, all of them are looked at.
        spans = [str(span["version"]) for span in meta.get("weight_versions") or []]
    except (KeyError, TypeError, ValueError) as error:
        raise _Fault(f"answered without what was asked for ({error!r})", is_grave=True) from error
    if reason not in ("stop", "length", "abort"):
        raise _Fault(f"gave {reason!r} as finish reason", is_grave=True)
    if prompt_tokens != prompt_len:
        raise _Fault(f"counted {prompt_tokens} prompt tokens, {prompt_len} were sent", is_grave=True)
    if not isinstance(tokens, list) or not 0 < len(tokens) <= max_new_tokens:
        raise _Fault(f"gave no list of 1 to {max_new_tokens} tokens, as was asked for", is_grave=True)
    for token in tokens:
        if type(token) is not int or token < 0 or (vocab_size is not None and token >= vocab_size):
            raise _Fault(f"gave token {token!r}, outside the vocabulary of {vocab_size}", is_grave=True)
    logprobs = _checked_logprobs(tokens, entries)
    for version in spans or [str(meta.get("weight_version", label))]:
        if version != label:
            raise _Fault(_other_weights(version, label), is_grave=True)
    return _Part(tokens, logprobs, reason)


def _checked_logprobs(tokens: list[int], entries: Any) -> list[float]:
    """The log-probability of each token, out of SGLang's [log-probability, token, text] entries."""
    if not isinstance(entries, list) or len(entries) != len(tokens):
        raise _Fault("gave other numbers of tokens and log-probabilities", is_grave=True)
    logprobs = []
    for token, entry in zip(tokens, entries, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise _Fault(f"gave the log-probability of another token than {token}", is_grave=True)
        value = entry[0]
        is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
        if not is_number or not math.isfinite(value) or value > _SMALLEST_SURPLUS:
            raise _Fault(f"gave {value!r} as log-probability of token {token}", is_grave=True)
        logprobs.append(min(0.0, float(value)))
    return logprobs


def _other_weights(label: str, wanted: str) -> str:
    return f"has the weights {label!r}, not those of step {wanted} (was it restarted?)"


def _check_prompt(prompt_ids: Sequence[int], number: int, vocab_size: int | None) -> None:
    if not prompt_ids or min(prompt_ids) < 0 or (vocab_size is not None and max(prompt_ids) >= vocab_size):
        raise RolloutError(
            f"prompt {number} is empty or has token ids outside the servers' vocabulary of {vocab_size}: "
            "tokenizer and served model do not belong together"
        )


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):  # the second: brackets without end
        return None
    return answer if isinstance(answer, dict) else None


def _rest_s(answer: httpx.Response) -> float:
    """How long a server that has no room wants to be left alone."""
    asked = answer.headers.get("retry-after", "")
    return min(max(_SHORTEST_REST_S, int(asked)), _LONGEST_REST_S) if asked.isdecimal() else _SHORTEST_REST_S


def _said(answer: httpx.Response) -> str:
    found = _json_object(answer.content) or {}
    error = found.get("error")
    text = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(text or answer.text or "nothing").split())[:300]


def check_generation(control: ServerClient, vocab_size: int) -> int:
    """Have one server generate a few tokens, and hold the answer against everything that rollouts are held against.

    Returns:
        The number of tokens it gave.

    Raises:
        ServerError: the answer cannot be used; the message says what is wrong with it.
    """
    label = control.weight_label()
    prompt = [0]
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": _NUM_CHECK_TOKENS, "temperature": 1.0},
        "return_logprob": True,
    }
    answer = control.generate(body)
    try:
        part = parse_answer(
            json.dumps(answer).encode(),
            prompt_len=len(prompt),
            max_new_tokens=_NUM_CHECK_TOKENS,
            vocab_size=vocab_size,
            label=label,
        )
    except _Fault as fault:
        raise ServerError(control.url, fault.reason) from fault
    if part.finish_reason == "abort":
        raise ServerError(control.url, "aborted a generation: does another run use it?")
    return len(part.token_ids)
