"""A rollout server that guesses, for tests of what happens around servers. It takes the flags of SGLang, and starts at once.

It joins real gloo groups and loads the weights that it receives (tests/unit/sync/stand_ins.py). Its log-probabilities of a prompt are those
of the model. Its responses are guesses, drawn by a hash of the prompt, the sampling seed and the weights, so runs with other servers, or
with servers that died, can be compared bit for bit. A tenth of the guesses at the sums of tests/tiny_policy.py is right.
"""

import argparse
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_rasft.errors import ServerError
from tests.unit.sync.stand_ins import StandIn

LOGPROB = -2.0
"""The log-probability of every token of a guess, nats."""
CALLS = {
    "/pause_generation": "pause",
    "/continue_generation": "resume",
    "/flush_cache": "flush_cache",
    "/begin_weight_update": "begin_weight_update",
    "/end_weight_update": "end_weight_update",
    "/init_weights_update_group": "init_weights_update_group",
    "/destroy_weights_update_group": "destroy_weights_update_group",
    "/update_weights_from_distributed": "update_weights_from_distributed",
    "/update_weight_version": "set_label",
    "/generate": "answer",
}
"""Endpoint -> the method that gets the fields of its request."""


class Served(StandIn):
    """A stand-in that also samples."""

    def __init__(self, url: str, model: Path) -> None:
        super().__init__(url)
        self._model = model
        self._digest = b""
        self._network = transformers.AutoModelForCausalLM.from_pretrained(model)
        self._class = type(self._network)
        self._config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        self._ids: dict[str, int] = tokenizer["model"]["vocab"]

    def described(self) -> dict[str, Any]:
        """Returns the answer to /server_info and /model_info."""
        return {
            "model_path": str(self._model),
            "architectures": self._config["architectures"],
            "weight_version": self.text,
            "version": "stand-in",
            "max_running_requests": 8,
            "enable_deterministic_inference": True,
        }

    def set_label(self, new_version: str, **_: Any) -> None:
        """Labels the weights that have come."""
        if new_version.isdigit():
            self.set_weight_version(int(new_version))
        else:
            self.set_weight_label(new_version)
        if self.weights:
            self._network = self._class.from_pretrained(
                None, config=self._network.config, state_dict=self.weights
            )
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(self.weights[name].contiguous().view(torch.uint8).numpy())
        self._digest = digest.digest()

    def answer(
        self, input_ids: list[int], sampling_params: dict[str, Any], logprob_start_len: int = -1, **_: Any
    ) -> dict[str, Any]:
        """Returns a response: a guess of one digit, or its first tokens if they are all that is asked for."""
        seed = sampling_params.get("sampling_seed", 0)
        guess = hashlib.sha256(json.dumps([input_ids, seed]).encode() + self._digest).digest()[0] % 10
        tokens = [self._ids[character] for character in rf"\boxed{{{guess}}}"]
        tokens = [*tokens, *sampling_params.get("stop_token_ids", [])[:1]][
            : sampling_params["max_new_tokens"]
        ]
        is_whole = tokens[-1] in sampling_params.get("stop_token_ids", [])
        return {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "stop" if is_whole else "length"},
                "prompt_tokens": len(input_ids),
                "weight_version": self.text,
                "output_token_logprobs": [[LOGPROB, token, None] for token in tokens],
                **({} if logprob_start_len else {"input_token_logprobs": self._logprobs(input_ids)}),
            },
        }

    @torch.no_grad()
    def _logprobs(self, tokens: list[int]) -> list[list[Any]]:
        """Returns the log-probability of each token after the first, and the token."""
        logits = self._network(torch.tensor([tokens])).logits[0, :-1].float()
        values = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
        return [[value, token, None] for value, token in zip(values.tolist(), tokens[1:], strict=True)]


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    """Returns the class that handles the requests to a server."""

    class Handler(BaseHTTPRequestHandler):
        def do_OPTIONS(self) -> None:
            self._send(405 if self.path in CALLS else 404, {})

        def do_GET(self) -> None:
            self._send(200, served.described())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}") or {}
            try:
                answer = getattr(served, CALLS[self.path])(**body) if self.path in CALLS else None
            except ServerError as error:
                return self._send(400, {"success": False, "message": error.reason})
            self._send(200, answer or {"success": True})

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def main() -> None:
    """Serves with the flags of sglang.launch_server, of which it ignores most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args, _ = parser.parse_known_args()
    served = Served(f"http://{args.host}:{args.port}", args.model_path)
    ThreadingHTTPServer((args.host, args.port), handler_of(served)).serve_forever()


if __name__ == "__main__":
    main()
