"""The functions of examples/own_verifier: exact JSON, a share of its fields, and a judge behind a local HTTP server."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from examples.own_verifier.json_exact import NoJsonError, grade, json_at_end, share_of_fields
from examples.own_verifier.make_orders import make_row

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "own_verifier"
ORDER = {"item": "pens", "quantity": 3, "city": "Oslo"}
PATIENT = ["--verify-timeout-s", "600"]
"""Flags with which no grading is late on a busy machine."""


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('The order is {"a": [1, {"b": 2}]}', {"a": [1, {"b": 2}]}),
        ('```json\n{"a": 1}\n```\n', {"a": 1}),
        ('<think>{"a": 2}</think> {"a": 1}', {"a": 1}),
        ("3 + 4 = 7", 7),
        ("so -1.5", -1.5),
        ('[1] and then "true"', "true"),
        ("true", True),
    ],
)
def test_value_at_the_end_of_a_reply_is_found(response: str, value: Any) -> None:
    assert json_at_end(response) == value


@pytest.mark.parametrize(
    "response", ["", "no value", '{"a": 1} is it', "{'a': 1}", "[" * 100_000, '<think>{"a": 1}']
)
def test_reply_without_a_value_at_its_end_is_wrong(response: str) -> None:
    with pytest.raises(NoJsonError):
        json_at_end(response)
    assert grade({"wanted": {}}, response)[0] is False
    assert share_of_fields({"wanted": {"a": 1}}, response)[0] == 0.0


@pytest.mark.parametrize(
    ("found", "is_exact", "share"),
    [
        ({"city": "Oslo", "quantity": 3, "item": "pens"}, True, 1.0),
        ({**ORDER, "quantity": 3.0}, False, 2 / 3),
        ({**ORDER, "quantity": True}, False, 2 / 3),
        ({"item": "pens"}, False, 1 / 3),
        ({**ORDER, "note": ""}, False, 3 / 4),
        ([ORDER], False, 0.0),
    ],
)
def test_exact_value_and_share_of_fields(found: Any, is_exact: bool, share: float) -> None:
    row = {"wanted": ORDER}
    assert grade(row, json.dumps(found))[0] is is_exact
    assert share_of_fields(row, json.dumps(found))[0] == pytest.approx(share)


class Judge(BaseHTTPRequestHandler):
    """A chat server that gives every answer 4 of 10 points, and none to answers that contain "broken"."""

    requests: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(200 if self.headers["Authorization"] == "Bearer secret" else 401, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        prompt = request["messages"][0]["content"]
        content = 'It is close. {"reason": "one field", "score": 4}'
        self._send(503 if "broken" in prompt else 200, {"choices": [{"message": {"content": content}}]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of the judge, and the requests that it has received."""
    handler = type("JudgeOfOneTest", (Judge,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler.requests
        server.shutdown()


def validate(rows: list[dict[str, Any]], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Grades the responses of rows by the judge, as README.md does."""
    path = folder / "orders.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool = [sys.executable, "tools/prepare_data.py", "validate", "--train-data", str(path)]
    return subprocess.run(
        [*tool, "--verify-function", f"{EXAMPLE}/judge.py:grade", "--verify-correct-reward", "0.8", *PATIENT],
        cwd=ROOT,
        env=os.environ | {"JUDGE_MODEL": "m"} | variables,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_judge_scores_what_is_not_exact(judge: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    url, requests = judge
    exact = {"problem": "An order.", "response": json.dumps(ORDER), "wanted": ORDER}
    rows = [exact, {**exact, "response": "three pens to Oslo"}, {**exact, "response": "broken"}]
    done = validate(rows, tmp_path, JUDGE_URL=url, JUDGE_API_KEY="secret")
    assert done.returncode == 1, done.stderr
    for line in (
        "1 correct",
        "1 wrong",
        "1 timeout",
        "orders.jsonl:2",
        "judge: one field",
        "judge: HTTP 503",
    ):
        assert line in done.stdout
    assert len(requests) == 2, "an exact answer needs no request"
    assert requests[0]["model"] == "m" and requests[0]["temperature"] == 0
    assert "three pens to Oslo" in "".join(r["messages"][0]["content"] for r in requests)


def test_wrong_key_of_the_judge_is_named(judge: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    row = {"problem": "An order.", "response": json.dumps(ORDER), "wanted": ORDER}
    done = validate([row], tmp_path, JUDGE_URL=judge[0], JUDGE_API_KEY="other")
    assert done.returncode == 2
    assert "401" in done.stderr and "judge.py" in done.stderr


def test_commands_of_the_readme_write_rows_whose_responses_are_correct(tmp_path: Path) -> None:
    text = (EXAMPLE / "README.md").read_text()
    commands = re.findall(r"^    python (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = command.replace("runs/orders", str(tmp_path)).split()
        words += PATIENT if "validate" in words else []
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "256 correct" in done.stdout


def test_orders_are_the_same_for_a_seed_and_their_own_responses_are_correct() -> None:
    rows = [make_row(random.Random(7), index) for index in range(20)]
    assert rows == [make_row(random.Random(7), index) for index in range(20)]
    for row in rows:
        assert grade(row, row["response"])[0] is True
        assert "answer" not in row and row["wanted"]["city"] in row["problem"]
