"""The rollout engine of a run with servers, as the trainer's rank 0 calls it: blocking, or while it steps."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress

import httpx

from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import Answers, sample
from megatron_rasft.types import Request, SamplingParams


class SglangEngine:
    """Samples from the fleet's servers. Use it as a context manager: it may own a thread.

        answers, report = engine.generate(requests, params, weight_version)     # an evaluation

        engine.start(requests, params, weight_version)                          # a training run
        ...with --rollout-lag 1 the steps of a window; wait(seconds) while there is nothing else to do...
        answers, report = engine.result()

    Neither raises because servers fail: some answers are None then, and ``fleet.say`` was told why, from
    the thread that samples.
    """

    def __init__(self, fleet: Fleet, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.fleet = fleet
        self._transport = transport
        self._future: Future[Answers] | None = None
        self._cancel = threading.Event()

    def __enter__(self) -> "SglangEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> Answers:
        """Sample every seed of every request and wait for it."""
        assert self._future is None, "samples of an earlier start() were not taken by result()"
        return asyncio.run(sample(self.fleet, requests, params, weight_version, self._transport))

    def start(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> None:
        """Begin to sample in a thread of its own; the weights must not be synced before ``result``."""
        assert self._future is None, "samples of an earlier start() were not taken by result()"
        self._cancel.clear()
        future: Future[Answers] = Future()
        self._future = future

        def work() -> None:
            try:
                future.set_result(asyncio.run(self._cancellable(requests, params, weight_version)))
            except BaseException as error:  # handed to the thread that asks for the result
                future.set_exception(CancelledError() if isinstance(error, asyncio.CancelledError) else error)

        # Daemonic: a run that ends by an error does not wait for its servers.
        threading.Thread(target=work, name="rollouts", daemon=True).start()

    @property
    def is_started(self) -> bool:
        """Whether there is something for ``result`` to wait for."""
        return self._future is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether ``result`` would return at once; waits for that no longer than this."""
        assert self._future is not None, "wait() without start()"
        with suppress(TimeoutError, CancelledError):
            self._future.exception(timeout=timeout_s)
        return self._future.done()

    def result(self) -> Answers:
        """Wait for what ``start`` began."""
        assert self._future is not None, "result() without start()"
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Stop what ``start`` began, and drop the connections to the servers."""
        if self._future is not None:
            self._cancel.set()
            with suppress(TimeoutError):
                self._future.exception(timeout=30)
            self._future = None
        self.fleet.close()

    async def _cancellable(
        self, requests: Sequence[Request], params: SamplingParams, weight_version: int
    ) -> Answers:
        task = asyncio.create_task(sample(self.fleet, requests, params, weight_version, self._transport))
        while not task.done():
            await asyncio.wait([task], timeout=0.2)
            if self._cancel.is_set():
                task.cancel()
        return task.result()
