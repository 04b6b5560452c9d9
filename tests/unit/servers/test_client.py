"""The HTTP client with valid, failing and invalid answers, without a network."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers import client
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import version_label, weight_version_of


def client_of(answer: Callable[[httpx.Request], httpx.Response], **more: Any) -> ServerClient:
    return ServerClient("http://server:1", transport=httpx.MockTransport(answer), **more)


class Clock:
    """The client's clock, which a busy machine does not move: time passes only in ``sleep``."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    return clock


@pytest.mark.parametrize(
    ("label", "version"), [("0", 0), ("17", 17), ("default", None), ("-1", None), ("1.5", None), ("²", None)]
)
def test_only_whole_numbers_are_a_trainers_labels(label: str, version: int | None) -> None:
    assert weight_version_of(label) == version
    if version is not None:
        assert version_label(version) == label


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(500, text="Internal Server Error"), "answered 500: Internal Server Error"),
        (httpx.Response(400, json={"success": False, "message": "no such group"}), "400: no such group"),
        (httpx.Response(200, json={"success": False, "message": "half applied"}), "failed: half applied"),
        (httpx.Response(400, json={"error": {"message": "bad rank"}}), "400: bad rank"),
        (httpx.Response(401, json={"error": "Unauthorized"}), "--rollout-api-key-env"),
        (httpx.Response(500, text="x" * 5000), "x" * 297 + "..."),
    ],
)
def test_a_refusal_names_the_server_and_quotes_it(answer: httpx.Response, said: str) -> None:
    with pytest.raises(ServerError) as caught:
        client_of(lambda request: answer).pause()
    assert str(caught.value).startswith("rollout server http://server:1: /pause_generation")
    assert str(caught.value).endswith(said) or said in str(caught.value)
    assert (caught.value.server, caught.value.status) == ("http://server:1", answer.status_code)


@pytest.mark.parametrize(("status", "is_starting"), [(200, False), (503, True), (404, False)])
def test_only_a_refused_health_check_means_that_a_server_is_starting(status: int, is_starting: bool) -> None:
    assert client_of(lambda request: httpx.Response(status)).is_starting() == is_starting


def test_a_server_that_answers_no_health_check_has_started() -> None:
    def paused(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("")

    assert not client_of(paused).is_starting()


def test_endpoints_of_older_servers_are_found_and_missing_ones_noticed() -> None:
    def old(request: httpx.Request) -> httpx.Response:
        answers = {
            "/get_server_info": {"version": "0.5.9", "tp_size": 4, "max_total_num_tokens": 1000},
            "/get_model_info": {"model_path": "/nowhere", "weight_version": "12"},
        }
        if request.url.path not in answers:
            return httpx.Response(404)
        return httpx.Response(200, json=answers[request.url.path])

    info = client_of(old).probe()
    assert (info.version, info.tp_size, info.weight_version, info.model_config) == ("0.5.9", 4, 12, None)
    assert not info.has_update_session and not info.has_weights_checker and not info.is_deterministic


@pytest.mark.parametrize(
    "info",
    [
        {"tp_size": None},
        {"architectures": 5},
        {"max_running_requests": "many"},
        {"weight_version": "9" * 5000},
    ],
    ids=["size", "architectures", "count", "label"],
)
def test_a_server_with_an_invalid_server_info_is_named(info: dict[str, Any]) -> None:
    answer = httpx.Response(200, json={"model_path": "/nowhere", **info})
    with pytest.raises(ServerError, match=r"http://server:1: .*/server_info"):
        client_of(lambda request: answer).probe()


def test_an_answer_of_nested_brackets_is_an_error() -> None:
    with pytest.raises(ServerError, match="/server_info"):
        client_of(lambda request: httpx.Response(200, content=b"[" * 10**6)).probe()


def test_each_request_carries_its_key() -> None:
    seen = {}

    def answer(request: httpx.Request) -> httpx.Response:
        seen[request.url.path] = request.headers["authorization"]
        return httpx.Response(200, json={"model_path": "/nowhere", "weight_version": "1"})

    with client_of(answer, api_key="reader", admin_api_key="admin") as client_:
        client_.weight_version()
        client_.pause()
    assert seen == {"/model_info": "Bearer reader", "/pause_generation": "Bearer admin"}


def test_flushing_waits_for_requests_to_leave_and_gives_up_in_time(clock: Clock) -> None:
    busy = iter([400, 400, 200])
    client_of(lambda request: httpx.Response(next(busy))).flush_cache(deadline_s=30.0)
    began = clock.now
    with pytest.raises(ServerError, match="requests are still running"):
        client_of(lambda request: httpx.Response(400, text="Flush cache failed.")).flush_cache(
            deadline_s=30.0
        )
    assert 29 < clock.now - began <= 30


def test_a_generation_is_retried_on_a_full_server_until_the_deadline(clock: Clock) -> None:
    full = httpx.Response(503, json={"error": {"message": "The request queue is full."}})
    answers = iter([full, httpx.Response(429), httpx.Response(200, json={"text": "!"})])
    assert client_of(lambda request: next(answers)).generate({}) == {"text": "!"}
    with pytest.raises(ServerError, match="queue is full"):
        client_of(lambda request: full).generate({}, deadline_s=30.0)
    with pytest.raises(ServerError, match="answered 500"):
        client_of(lambda request: httpx.Response(500)).generate({})


def test_a_full_server_that_answers_too_late_at_last_is_reported_as_full(clock: Clock) -> None:
    answers = iter([0.0, 50.0])

    def answer(request: httpx.Request) -> httpx.Response:
        clock.sleep(next(answers))
        return httpx.Response(503, json={"error": {"message": "The request queue is full."}})

    with pytest.raises(ServerError) as caught:
        client_of(answer).generate({}, deadline_s=40.0)
    assert caught.value.status == 503


def test_a_connection_that_opens_after_the_deadline_is_closed_at_once() -> None:
    ours, theirs = socket.socketpair()

    class Stream:
        def get_extra_info(self, what: str) -> socket.socket:
            return ours

    with ours, theirs, client._Cutoff(0.01) as cut:
        while not cut.has_passed:
            time.sleep(0.01)
        cut.trace("connection.connect_tcp.complete", {"return_value": Stream()})
        assert theirs.recv(1) == b""


def test_a_host_of_several_addresses_has_one_deadline(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 1)) for i in (1, 2, 3)]
    tried_s: list[float] = []

    class Silent(socket.socket):
        def connect(self, address: Any) -> None:
            tried_s.append(self.gettimeout() or 0.0)
            raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", Silent)
    with pytest.raises(ServerError, match="did not answer"):
        ServerClient("http://server:1").pause(deadline_s=6.0)
    assert tried_s == [2.0] * 3


def test_an_answer_that_trickles_in_ends_at_the_deadline(clock: Clock) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(1000):
            clock.sleep(1.0)
            yield b" "

    class Trickle(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return slowly()

    with pytest.raises(ServerError, match="still answering"):
        client_of(lambda request: httpx.Response(200, stream=Trickle())).pause(deadline_s=20.0)
    assert clock.now < 30


@pytest.mark.usefixtures("clock")  # the connection's own timer still runs
def test_headers_that_trickle_in_end_at_the_deadline() -> None:
    answer = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 400 + b"\r\nContent-Length: 2\r\n\r\n{}"

    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the client has closed the connection
            for byte in answer:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=trickle, args=(listener,))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServerError, match="did not answer"):
            ServerClient(url).pause(deadline_s=0.5)
        server.join()


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ({"max_running_requests": 8, "internal_states": [{"effective_max_running_requests_per_dp": 4}]}, 8),
        (
            {"max_running_requests": None, "internal_states": [{"effective_max_running_requests_per_dp": 4}]},
            4,
        ),
        ({"internal_states": []}, None),
        ({"internal_states": ["?"]}, None),
    ],
    ids=["flag", "chosen by itself", "not said", "odd"],
)
def test_how_many_requests_a_server_runs_at_once(said: dict[str, Any], number: int | None) -> None:
    answer = httpx.Response(200, json={"model_path": "/nowhere", **said})
    assert client_of(lambda request: answer).probe().max_running_requests == number


def test_an_address_where_nothing_listens_cannot_be_reached() -> None:
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1: cannot be reached"):
        ServerClient("http://127.0.0.1:1/").probe(deadline_s=600.0)


def test_the_cache_is_flushed_by_a_request_after_an_update_from_disk() -> None:
    """SGLang ends if the update itself flushes while a request is leaving. Here the request has left before the second attempt."""
    asked: list[tuple[str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, json.loads(request.content or b"{}").get("flush_cache")))
        is_leaving = len(asked) == 2
        return httpx.Response(400 if is_leaving else 200, json={"success": not is_leaving})

    client_of(answer).update_weights_from_disk("/model")
    assert asked == [("/update_weights_from_disk", False), ("/flush_cache", None), ("/flush_cache", None)]
    asked.clear()
    client_of(answer).update_weights_from_disk("/model", flush_cache=False)
    assert asked == [("/update_weights_from_disk", False)]
