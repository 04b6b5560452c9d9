"""A proxy that corrupts a real server's answers, for faults that cannot be caused in a real server."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Answer = dict[str, Any]


def _token_beyond_vocabulary(answer: Answer) -> None:
    answer["output_ids"][0] = 10**6
    answer["meta_info"]["output_token_logprobs"][0][1] = 10**6


def _logprobs_missing(answer: Answer) -> None:
    answer["meta_info"]["output_token_logprobs"].pop()


def _logprob_of_another_token(answer: Answer) -> None:
    answer["meta_info"]["output_token_logprobs"][0][1] += 1


def _logprob_undefined(answer: Answer) -> None:
    answer["meta_info"]["output_token_logprobs"][0][0] = None


def _old_weights(answer: Answer) -> None:
    answer["meta_info"]["weight_version"] = "default"
    answer["meta_info"].pop("weight_versions", None)


def _another_prompt(answer: Answer) -> None:
    answer["meta_info"]["prompt_tokens"] += 1


def _too_many_tokens(answer: Answer) -> None:
    answer["output_ids"] *= 50
    answer["meta_info"]["output_token_logprobs"] *= 50


LIES: dict[str, Callable[[Answer], None]] = {
    "token beyond the vocabulary": _token_beyond_vocabulary,
    "logprobs missing": _logprobs_missing,
    "logprob of another token": _logprob_of_another_token,
    "logprob undefined": _logprob_undefined,
    "old weights": _old_weights,
    "another prompt": _another_prompt,
    "too many tokens": _too_many_tokens,
}
FAULTS = (*LIES, "error 500", "out of memory", "garbage", "truncated", "cut off", "silent")


class FaultyProxy:
    """Forwards all requests to a server. While ``fault`` is set, answers to /generate are corrupted accordingly.

    Args:
        target: address of the real server.
    """

    def __init__(self, target: str) -> None:
        self.fault: str | None = None
        self.num_faults = 0
        self._target = urlsplit(target)
        self._stop = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.handle(self)

            do_POST = do_OPTIONS = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: Any) -> None:
                pass  # the client has closed the connection

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(length)
        fault = self.fault if handler.path == "/generate" else None
        if self.fault == "silent":
            self.num_faults += 1
            self._stop.wait(3600)
            return
        status, content = self._ask(handler.command, handler.path, body)
        if fault is not None:
            self.num_faults += 1
            if fault == "cut off":
                handler.connection.close()
                return
            status, content = _corrupted(fault, status, content)
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content) * (2 if fault == "truncated" else 1)))
        handler.end_headers()
        handler.wfile.write(content)

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=900)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _corrupted(fault: str, status: int, content: bytes) -> tuple[int, bytes]:
    if fault == "error 500":
        return 500, b"Internal Server Error"
    if fault == "out of memory":
        return 500, json.dumps({"error": {"message": "Out of memory: the KV cache is full"}}).encode()
    if fault == "garbage":
        return 200, b"\x00\xff<html>" + content[::-1]
    if fault == "truncated":
        return 200, content[: len(content) // 2]
    answer = json.loads(content)
    LIES[fault](answer)
    return status, json.dumps(answer).encode()


def wait_for(condition: Callable[[], bool], timeout_s: float = 900.0) -> None:
    """Waits until a condition that another thread or process brings about is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)
