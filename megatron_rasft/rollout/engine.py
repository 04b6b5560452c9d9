"""The rollout engine of a run with servers, called on rank 0: it samples at once or in the background."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress

import httpx

from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import Answers, SamplingReport, sample
from megatron_rasft.types import Request, SamplingParams


class SglangEngine:
    """Samples from the fleet's servers. Use it as a context manager, because it may have a thread.

        answers, report = engine.generate(requests, params, weight_version)     # an evaluation

        engine.start(requests, params, weight_version)                          # a training run
        ... (with --rollout-lag 1, the training steps; otherwise, calls of wait(seconds))
        answers, report = engine.result()

    A failing server raises no error. Some answers are then None, and ``fleet.say`` has printed the reason from the sampling thread.
    """

    def __init__(self, fleet: Fleet, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.fleet = fleet
        self._transport = transport
        self._future: Future[Answers] | None = None
        self._cancel = threading.Event()
        self.report = SamplingReport()
        """The results of the last ``start`` so far."""

    def __enter__(self) -> "SglangEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        weight_version: int,
        report: SamplingReport | None = None,
    ) -> Answers:
        """Samples every seed of every request and returns the answers. ``report`` counts them while they are sampled."""
        assert self._future is None, "samples of an earlier start() were not taken by result()"
        return asyncio.run(sample(self.fleet, requests, params, weight_version, self._transport, report))

    def start(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> None:
        """Starts sampling in a thread. The servers' weights must not be synced before ``result``."""
        assert self._future is None, "samples of an earlier start() were not taken by result()"
        self._cancel.clear()
        future: Future[Answers] = Future()
        self._future = future
        self.report = SamplingReport.of(requests)

        def work() -> None:
            try:
                future.set_result(asyncio.run(self._cancellable(requests, params, weight_version)))
            except BaseException as error:  # kept here and raised in the thread that calls result()
                future.set_exception(CancelledError() if isinstance(error, asyncio.CancelledError) else error)

        # a daemon, so that a run that ends with an error does not wait for its servers
        threading.Thread(target=work, name="rollouts", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Waits at most this long. Returns whether all samples are finished, so that ``result`` would return at once."""
        assert self._future is not None, "wait() without start()"
        with suppress(TimeoutError, CancelledError):
            self._future.exception(timeout=timeout_s)
        return self._future.done()

    def result(self) -> Answers:
        """Waits for the samples that ``start`` requested, and returns them."""
        assert self._future is not None, "result() without start()"
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Cancels the sampling that ``start`` began."""
        if self._future is not None:
            self._cancel.set()
            with suppress(TimeoutError):
                self._future.exception(timeout=30)
            self._future = None

    async def _cancellable(
        self, requests: Sequence[Request], params: SamplingParams, weight_version: int
    ) -> Answers:
        sampling = sample(self.fleet, requests, params, weight_version, self._transport, self.report)
        task = asyncio.create_task(sampling)
        while not task.done():
            await asyncio.wait([task], timeout=0.2)
            if self._cancel.is_set():
                task.cancel()
        return task.result()
