"""Samples from several SGLang servers at once: token ids in, token ids and log-probabilities out.

Each sample is an HTTP request of its own (servers share a prompt's prefix among its samples), so samples are retried, resumed
and counted independently. It goes to the least loaded server that has the wanted weights. The kind of a failure decides what
happens next:

- The server cannot be reached, exceeds the deadline, does not answer the watch, has other weights, or returns an impossible answer:
  it is quarantined at once, and other servers repeat its running requests.
- HTTP error or broken connection: another server repeats the request. Three failures in a row quarantine the server.
- The server is full (HTTP 429 or 503, perhaps because others use it too): the request is repeated after a second, or after the time
  that the server asks for. A server that accepts no request during the deadline of a sample is quarantined.
- The request was aborted because the server was paused: the sample continues from the tokens it has.
- The server refuses the request itself (HTTP 400), or its KV cache or time limit is too small for it: the sample is given up when a
  second server refuses it too.
"""

import asyncio
import math
import resource
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import psutil

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.answers import Fault, Part, json_object, other_weights, parse_answer, quoted_error
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.servers.client import FULL_STATUSES
from megatron_rasft.servers.info import version_label
from megatron_rasft.servers.record import ServerRecord
from megatron_rasft.types import Request, Response, SamplingParams
from megatron_rasft.wording import counted

_FAILURES_IN_ROW = 3
_ABORTS_WITHOUT_GAIN = 20
"""A sample is given up after this many aborts without a new token."""
MIN_BACKOFF_S = 1.0
"""Shortest time between two requests to a full server."""
_MAX_BACKOFF_S = 30.0
ACCEPTED_S = 1.0
"""Time after which a request that was not rejected counts as accepted: it is running or in the server's queue."""
_TIMEOUT_MESSAGE = "running timeout"
"""Part of SGLang's message about a request that ran longer than SGLANG_REQ_RUNNING_TIMEOUT.

It has the status of a full server's answer.
"""
_UNUSED_CONTEXT = 2
"""Number of tokens that SGLang leaves free when prompt and response fill its context."""
_SPARE_FILES = 256
"""Number of files reserved for the rest of the process while samples are made."""


@dataclass
class SamplingReport:
    """The results of all requested samples. Each sample is counted in ``outcomes`` exactly once."""

    weight_version: int = 0
    num_samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """stop, length: finished; failed: given up after faults; refused: servers do not accept the request."""
    num_tokens: int = 0
    """Tokens of finished samples."""
    num_retried: int = 0
    """Requests that failed and were repeated."""
    num_resumed: int = 0
    """Requests that were aborted and continued from their tokens."""
    num_turned_away: int = 0
    """Requests that a full server rejected, and that were repeated later or elsewhere."""
    num_quarantined: int = 0
    """Servers that were quarantined."""
    seconds: float = 0.0
    samples_by_server: Counter[str] = field(default_factory=Counter)
    """Address -> samples that the server finished."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "SamplingReport":
        """Returns the report before the first result."""
        return cls(num_samples=sum(len(request.seeds) for request in requests))

    @property
    def num_finished(self) -> int:
        return self.outcomes["stop"] + self.outcomes["length"]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """Returns the report in one line."""
        line = f"{self.num_finished} of {counted(self.num_samples, 'sample')}, {self.tokens_per_s:,.0f} tokens/s from "
        line += counted(len(self.samples_by_server), "server")
        extra = {
            "failed": self.outcomes["failed"],
            "refused": self.outcomes["refused"],
            "retried": self.num_retried,
            "resumed": self.num_resumed,
            "turned away": self.num_turned_away,
        }
        return line + "".join(f", {count} {name}" for name, count in extra.items() if count)

    def values(self) -> dict[str, float]:
        """Returns metric name -> value."""
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
    """The responses, and the report about them."""

    responses: list[list[Response | None]]
    """For each request one response per seed, in the order of the seeds; None for a sample that failed."""
    report: SamplingReport


@dataclass(eq=False)
class _Job:
    """One sample that is not finished: the tokens it has so far, and its failures."""

    request: int
    index: int
    """Position of the sample's seed in the request."""
    prompt_ids: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_failures: int = 0
    num_refusals: int = 0
    num_idle_aborts: int = 0
    """Number of aborts without a new token."""
    failed_at: ServerRecord | None = None
    """The server of the last failure. The next attempt goes to another server, if there is one."""


class _Attempt(NamedTuple):
    """One request that a server is working on."""

    job: _Job
    server: ServerRecord
    began: float


async def sample(
    fleet: Fleet,
    requests: Sequence[Request],
    params: SamplingParams,
    weight_version: int,
    transport: httpx.AsyncBaseTransport | None = None,
    report: SamplingReport | None = None,
) -> Answers:
    """Samples every seed of every request from the servers that have weights of this version.

    Failing servers raise no error; their samples may be None. A request lasts at most --rollout-deadline-s, and a sample is given
    up after --rollout-attempts failed requests. An aborted sample continues as long as it gains tokens. Cancelling this coroutine
    closes every connection, which makes the servers drop the requests.

    Args:
        report: counts the results while they come in; None for a new report.

    Raises:
        RolloutError: a prompt has token ids outside the servers' vocabulary, which would end some servers.
    """
    report = SamplingReport() if report is None else report
    return await _Sampling(fleet, requests, params, weight_version, transport, report).run()


class _Sampling:
    """One call of ``sample``: the jobs that wait, the attempts that run, and the servers that may still be used."""

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Request],
        params: SamplingParams,
        weight_version: int,
        transport: httpx.AsyncBaseTransport | None,
        report: SamplingReport,
    ) -> None:
        self._fleet = fleet
        self._config = fleet.config
        self._params = params
        self._label = version_label(weight_version)
        self._servers = fleet.serving(weight_version)
        self._vocab_size = fleet.vocab_size
        self._transport = transport
        self._waiting: deque[_Job] = deque()
        for number, request in enumerate(requests):
            _check_prompt(request.prompt_ids, number, self._vocab_size)
            for index, seed in enumerate(request.seeds):
                self._waiting.append(_Job(number, index, request.prompt_ids, seed))
        self._results: list[list[Response | None]] = [[None] * len(r.seeds) for r in requests]
        self._report = report
        report.weight_version, report.num_samples = weight_version, len(self._waiting)
        self._running: dict[asyncio.Task[Part], _Attempt] = {}
        self._max_running = self._max_connections()
        self._ended: asyncio.Queue[asyncio.Task[Part] | None] = asyncio.Queue()
        """Queue of ended attempts. A None in it means that a full server may get requests again."""
        self._backing_off: set[ServerRecord] = set()
        """Full servers, which get no requests for a while."""
        self._full_since: dict[ServerRecord, float] = {}
        """Server -> time of the first rejection since it last accepted a request."""
        self._refusal = ""
        """The last reason for which servers refused a sample."""
        key = fleet.api_key
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def run(self) -> Answers:
        """Runs all jobs to their end."""
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
                    if not self._running and not self._backing_off:
                        break
                    task = await self._ended.get()
                    if task is not None:
                        self._settle(task)
            finally:
                watch.cancel()
                for task in self._running:
                    task.cancel()
                await asyncio.gather(watch, *self._running, return_exceptions=True)
        self._give_up_waiting()
        self._report.seconds = time.monotonic() - began
        counted = sum(self._report.outcomes.values())
        assert counted == self._report.num_samples, f"{counted} of {self._report.num_samples} accounted for"
        return Answers(self._results, self._report)

    def _max_connections(self) -> int:
        """Returns how many requests may run at all servers together. Each needs a socket, and so does each request of the watch."""
        wanted = min(len(self._waiting), sum(s.max_in_flight for s in self._servers))
        allowed = allow_open_files(wanted + len(self._servers)) - len(self._servers)
        if allowed < wanted:
            self._fleet.say(
                f"the limit of open files allows {counted(max(1, allowed), 'request')} at once instead of {wanted}: raise it with ulimit -n"
            )
        return max(1, allowed)

    # ---- sending

    def _send(self, client: httpx.AsyncClient) -> None:
        """Starts waiting jobs while a server may get another request."""
        skipped = []
        while self._waiting and len(self._running) < self._max_running:
            free = [
                s for s in self._servers if s.num_in_flight < s.max_in_flight and s not in self._backing_off
            ]
            if not free:
                break
            job = self._waiting.popleft()
            server = self._least_loaded(free, job)
            if server is None:
                skipped.append(job)
                continue
            server.num_in_flight += 1
            task = asyncio.create_task(self._attempt(client, job, server))
            self._running[task] = _Attempt(job, server, time.monotonic())
            task.add_done_callback(self._ended.put_nowait)
        self._waiting.extendleft(reversed(skipped))

    def _least_loaded(self, free: list[ServerRecord], job: _Job) -> ServerRecord | None:
        """Returns the server with the lowest load; None if only the server at which the job failed is free."""
        if len(self._servers) > 1:
            free = [s for s in free if s is not job.failed_at]
        return min(free, key=lambda s: s.num_in_flight / s.max_in_flight, default=None)

    async def _attempt(self, client: httpx.AsyncClient, job: _Job, server: ServerRecord) -> Part:
        """Requests the rest of a sample from a server. Raises Fault if it gets no usable answer."""
        num_left = self._params.max_response_tokens(len(job.prompt_ids)) - len(job.token_ids)
        body = self._body(job, server, num_left)
        answer = await self._post(client, f"{server.url}/generate", body)
        _check_status(answer)
        part = parse_answer(
            answer.content,
            prompt_len=len(body["input_ids"]),
            max_new_tokens=num_left,
            vocab_size=self._vocab_size,
            label=self._label,
        )
        if part.token_ids and part.token_ids[-1] in self._params.stop_ids:
            # SGLang reports ``length`` for a stop token in the last place, and an abort can come after the last token
            return part._replace(finish_reason="stop")
        if part.finish_reason == "length" and len(part.token_ids) < num_left - _UNUSED_CONTEXT:
            # SGLang lowers max_new_tokens to the size of its cache without an error
            raise Fault(
                f"{server.url} ended a response after {len(part.token_ids)} of {num_left} tokens: its KV cache is too small",
                is_refusal=True,
            )
        return part

    async def _post(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> httpx.Response:
        """Sends a request that ends at --rollout-deadline-s. Raises Fault if no answer comes."""
        limit = self._config.rollout_deadline_s
        connect_s = min(limit, self._config.rollout_watch_s)
        try:
            async with asyncio.timeout(limit):
                return await client.post(url, json=body, timeout=httpx.Timeout(limit, connect=connect_s))
        except httpx.ConnectTimeout as error:
            raise Fault(f"could not be reached within {connect_s:g} s", is_grave=True) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Fault(
                f"took longer than its deadline of {limit:g} s for one sample", is_grave=True
            ) from error
        except httpx.ConnectError as error:
            raise Fault(f"cannot be reached ({error})", is_grave=True) from error
        except httpx.HTTPError as error:
            raise Fault(f"broke off ({type(error).__name__}: {error})") from error

    def _body(self, job: _Job, server: ServerRecord, num_left: int) -> dict[str, Any]:
        params = self._params
        sampling: dict[str, Any] = {
            "max_new_tokens": num_left,
            "temperature": params.temperature,
            "top_p": params.top_p,
            # sent even if off, so that the server's defaults do not apply
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": params.repetition_penalty,
            "stop_token_ids": sorted(params.stop_ids),
        }
        if server.info is not None and server.info.is_deterministic:
            sampling["sampling_seed"] = job.seed
        return {
            "input_ids": [*job.prompt_ids, *job.token_ids],
            "sampling_params": sampling,
            "return_logprob": True,
        }

    # ---- ended attempts

    def _settle(self, task: asyncio.Task[Part]) -> None:
        """Processes an ended attempt: adds its tokens to the sample, or handles its failure."""
        job, server, _ = self._running.pop(task)
        server.num_in_flight -= 1
        if task.cancelled():  # the attempt's server was quarantined
            self._retry(job, server)
            return
        error = task.exception()
        if error is None:
            server.num_failures_in_row = 0
            self._full_since.pop(server, None)
            self._take(job, server, task.result())
        elif isinstance(error, Fault):
            self._fail(job, server, error)
        else:
            raise error

    def _take(self, job: _Job, server: ServerRecord, part: Part) -> None:
        """Adds an answer's tokens to its sample, and finishes the sample unless the request was aborted."""
        job.token_ids += part.token_ids
        job.logprobs += part.logprobs
        finish_reason = part.finish_reason
        num_tokens = len(job.token_ids)
        if finish_reason == "abort" and num_tokens == self._params.max_response_tokens(len(job.prompt_ids)):
            finish_reason = "length"
        if finish_reason == "abort":
            self._resume(job, has_gained=bool(part.token_ids))
            return
        assert self._results[job.request][job.index] is None, "a sample was finished twice"
        self._results[job.request][job.index] = Response(
            token_ids=job.token_ids, logprobs=job.logprobs, finish_reason=finish_reason
        )
        server.num_samples += 1
        self._report.outcomes[finish_reason] += 1
        self._report.num_tokens += num_tokens
        self._report.samples_by_server[server.url] += 1

    def _resume(self, job: _Job, has_gained: bool) -> None:
        """Queues an aborted sample, which continues from its tokens."""
        if self._params.repetition_penalty != 1.0:
            # Servers do not penalise prompt tokens like response tokens, so the sample starts from its beginning.
            job.token_ids, job.logprobs = [], []
            has_gained = False
        if not has_gained:
            job.num_idle_aborts += 1
        if job.num_idle_aborts > _ABORTS_WITHOUT_GAIN:
            self._report.outcomes["failed"] += 1
            return
        self._report.num_resumed += 1
        self._waiting.append(job)

    def _fail(self, job: _Job, server: ServerRecord, fault: Fault) -> None:
        """Queues a failed job again or gives it up. Quarantines its server if the fault is grave enough."""
        if fault.is_refusal:
            self._refuse(job, server, fault.reason)
        elif fault.backoff_s is not None:
            self._report.num_turned_away += 1
            self._waiting.append(job)
            self._back_off(server, fault.reason, fault.backoff_s)
        else:
            server.num_failures_in_row += 1
            if fault.is_grave:
                self._quarantine(server, fault.reason)
            elif server.num_failures_in_row >= _FAILURES_IN_ROW:
                self._quarantine(server, f"failed {_FAILURES_IN_ROW} times in a row ({fault.reason})")
            self._retry(job, server)

    def _refuse(self, job: _Job, server: ServerRecord, reason: str) -> None:
        """Gives a sample up when two servers, or the only server, have refused it."""
        job.failed_at = server
        job.num_refusals += 1
        if job.num_refusals >= min(2, max(1, len(self._servers))):
            self._report.outcomes["refused"] += 1
            self._refusal = reason
        else:
            self._waiting.append(job)

    def _retry(self, job: _Job, failed_at: ServerRecord) -> None:
        """Queues a failed job again, or gives it up after --rollout-attempts failures."""
        job.failed_at = failed_at
        job.num_failures += 1
        if job.num_failures >= self._config.rollout_attempts:
            self._report.outcomes["failed"] += 1
        else:
            self._report.num_retried += 1
            self._waiting.append(job)

    # ---- servers

    def _back_off(self, server: ServerRecord, reason: str, seconds: float) -> None:
        """Sends a full server no requests for a while. Quarantines it if it has been full for too long."""
        # another request has already been rejected
        if server in self._backing_off or server not in self._servers:
            return
        limit = self._config.rollout_deadline_s
        now = time.monotonic()
        since = now if self._works_for_us(server) else self._full_since.get(server, now)
        self._full_since[server] = since
        if now - since > limit:
            self._quarantine(server, f"was full for {limit:g} s ({reason})")
            return
        self._backing_off.add(server)
        asyncio.get_running_loop().call_later(seconds, self._end_backoff, server)

    def _end_backoff(self, server: ServerRecord) -> None:
        self._backing_off.discard(server)
        self._ended.put_nowait(None)

    def _works_for_us(self, server: ServerRecord) -> bool:
        """Whether the server has accepted a request of this call that is still running."""
        latest = time.monotonic() - ACCEPTED_S
        return any(a.server is server and a.began < latest for a in self._running.values())

    def _quarantine(self, server: ServerRecord, reason: str) -> None:
        """Stops using a server, and cancels its running requests, which are then retried elsewhere."""
        if server not in self._servers:
            return
        self._servers.remove(server)
        self._end_backoff(server)
        self._report.num_quarantined += 1
        self._fleet.quarantine(server.url, reason)
        for task, attempt in self._running.items():
            if attempt.server is server:
                task.cancel()

    def _give_up_waiting(self) -> None:
        """Counts jobs as failed if no server is left for them, and reports failures and refusals."""
        if self._waiting:
            self._fleet.say(
                f"no rollout server is left: {len(self._waiting)} of {counted(self._report.num_samples, 'sample')} not made"
            )
        self._report.outcomes["failed"] += len(self._waiting)
        self._waiting.clear()
        if self._report.outcomes["refused"]:
            self._fleet.say(
                f"the servers refused {counted(self._report.outcomes['refused'], 'sample')}: {self._refusal}"
            )

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Probes the servers that are in use four times per --rollout-watch-s, and quarantines those with a fault."""
        while True:
            await asyncio.sleep(self._config.rollout_watch_s / 4)
            in_use = [s for s in self._servers if s.num_in_flight or s in self._backing_off]
            faults = await asyncio.gather(*[self._watch_one(client, s) for s in in_use])
            for server, fault in zip(in_use, faults, strict=True):
                if fault:
                    self._quarantine(server, fault)

    async def _watch_one(self, client: httpx.AsyncClient, server: ServerRecord) -> str:
        """Returns a server's fault: it hangs, it is a gateway to a dead server, or its weights differ. Empty without a fault."""
        limit = self._config.rollout_watch_s
        try:
            async with asyncio.timeout(limit):
                answer = await client.get(f"{server.url}/model_info", timeout=limit)
        except (TimeoutError, httpx.TimeoutException):
            return f"did not answer /model_info within {limit:g} s"
        except httpx.HTTPError:
            return ""  # the server's running requests will fail, with a more precise reason
        if answer.status_code in FULL_STATUSES and not self._works_for_us(server):
            # a full server still answers /model_info; a gateway to a dead server does not
            full_s = time.monotonic() - self._full_since.get(server, math.inf)
            return f"answers {answer.status_code} to everything" if full_s > ACCEPTED_S else ""
        if answer.status_code != 200:
            return ""
        info = json_object(answer.content)
        label = None if info is None else info.get("weight_version")
        if label is not None and str(label) != self._label:
            return other_weights(str(label), self._label)
        return ""


def allow_open_files(wanted: int) -> int:
    """Raises this process's limit of open files if necessary. Returns how many of ``wanted`` more files it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = psutil.Process().num_fds()
    needed = num_open + wanted + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == needed else max(0, min(wanted, (soft - num_open) // 2))


def _check_prompt(prompt_ids: Sequence[int], number: int, vocab_size: int | None) -> None:
    if not prompt_ids or min(prompt_ids) < 0 or (vocab_size is not None and max(prompt_ids) >= vocab_size):
        raise RolloutError(
            f"prompt {number} is empty or has token ids outside the servers' vocabulary of {vocab_size}: "
            "the tokenizer does not belong to the served model"
        )


def _check_status(answer: httpx.Response) -> None:
    """Raises the Fault that corresponds to an HTTP status other than 200."""
    status = answer.status_code
    if status == 200:
        return
    if status == 401:
        raise Fault("refuses the key of --rollout-api-key-env", is_grave=True)
    if status == 400:
        raise Fault(quoted_error(answer.content), is_refusal=True)
    reason = f"answered {status}: {quoted_error(answer.content)}"
    ran_too_long = _TIMEOUT_MESSAGE in reason
    is_full = status in FULL_STATUSES and not ran_too_long
    raise Fault(reason, is_refusal=ran_too_long, backoff_s=backoff_s(answer) if is_full else None)


def backoff_s(answer: httpx.Response) -> float:
    """Returns how long a full server gets no request: its Retry-After in seconds, within the limits of this module."""
    asked = answer.headers.get("retry-after", "")
    return min(max(MIN_BACKOFF_S, int(asked)), _MAX_BACKOFF_S) if asked.isdecimal() else MIN_BACKOFF_S
