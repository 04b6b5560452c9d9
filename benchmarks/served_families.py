"""Sends the weights of a tiny model of each family to a real SGLang server on the CPU, and compares log-probabilities with transformers'.

    python -m benchmarks.served_families                          every model of tests/tiny_models.py, on the newest version
    python -m benchmarks.served_families --cases qwen3 glm4_moe   some of them
    python -m benchmarks.served_families --output tools/site_building/served_families.json
                                                                  also writes the results that the page of accepted models has

The server starts with other weights than those that are sent. `make servers` installs SGLang. A model takes about 20 seconds of CPU time.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.config import SyncConfig
from megatron_rasft.errors import ServerError, first_line
from megatron_rasft.files import write_json
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import WeightSync, buckets
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import TensorPlan
from tests.servers.running import NEWEST, VERSIONS, RunningServer
from tests.tiny_models import CASES, hf_model, save_model, some_tokens

_TOLERANCE = 2e-3
"""Largest difference of two log-probabilities, in fp32. Attention and experts round differently in SGLang."""
_START_S = 300.0
_PLACE = re.compile(r'File ".*/(sglang/[^"]+)", line (\d+)')
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception)\b")
_NOT_TRAINED = re.compile("visual|vision_tower|multi_modal_projector|mtp_layers")
_FLAGS = (
    "--dtype",
    "float32",
    "--skip-server-warmup",
    "--max-total-tokens",
    "2000",
    "--mem-fraction-static",
    "0.3",
)

_MORE_KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "moonlight": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "moe_layer_freq": 1},
}
"""Keys of published folders that transformers does not write, and that SGLang needs: case -> keys of config.json."""

_MIMO_CODE = """\
from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""
"""The configuration's code in a folder of MiMo, which transformers does not have."""

_LINEAR_FLAGS = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
"""Flags for models with gated delta nets. SGLang's default needs a GPU."""


class FolderWeights:
    """Plans and gathers the weights of a folder as a trainer of one rank does."""

    stage = 0
    num_stages = 1
    takes_part = True

    def __init__(self, folder: HfFolder) -> None:
        self._folder = folder

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> list[TensorPlan]:
        shapes = self._folder.table.hf_shapes.items()
        return [TensorPlan(name, shape, (dtypes or {}).get(name, torch.float32)) for name, shape in shapes]

    def gather(
        self, *, dtypes: dict[str, torch.dtype], out: Callable[[str], Tensor | None]
    ) -> Iterator[tuple[str, Tensor]]:
        for name in self._folder.table.hf_shapes:
            tensor, memory = self._folder.read(name).to(dtypes[name]), out(name)
            yield name, tensor if memory is None else memory.copy_(tensor)


def sync_of(folder: HfFolder) -> WeightSync:
    """A weight sync of a folder's weights."""
    return WeightSync(
        SyncConfig(sync_bucket_mib=1, sync_proof="off"),
        FolderWeights(folder),  # type: ignore[arg-type]
        records=ServerRecords(),
        model_config=folder.config,
        device=torch.device("cpu"),
    )


def served_logprobs(url: str, tokens: list[int]) -> Tensor:
    """Returns the log-probabilities [s - 1] of all tokens but the first under the served model."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with ServerClient(url, deadline_s=120.0) as client:
        client.flush_cache()
        found = client.generate(body)["meta_info"]["input_token_logprobs"]
    return torch.tensor([logprob for logprob, _, _ in found[1:]])


@torch.no_grad()
def computed_logprobs(model: Any, tokens: list[int]) -> Tensor:
    """The same log-probabilities, under a model of transformers."""
    ids = torch.tensor([tokens])
    logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


def sizes_of(case: str) -> dict[str, Any]:
    """Sizes for a case that SGLang has on a CPU: it pads other inner sizes of MLPs, so that checksums differ."""
    _, overrides = CASES[case]
    inner = [key for key in overrides if key.endswith("intermediate_size")]
    layers = ["linear_attention"] * 3 + ["full_attention"]  # SGLang ignores layer_types of Qwen3-Next
    has_delta = "linear_num_key_heads" in overrides
    sizes = dict.fromkeys(["intermediate_size", *inner], 64) | ({"layer_types": layers} if has_delta else {})
    if case == "mimo":
        sizes["head_dim"] = 12  # SGLang ignores MiMo's head_dim
    return sizes | ({"sliding_window": 64} if overrides.get("sliding_window") else {})  # longer than the text


def other_weights(case: str) -> Any:
    """The model of a case with every trained weight changed."""
    model = hf_model(case, sizes_of(case))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if not _NOT_TRAINED.search(name):
                param.add_(0.03 * torch.randn_like(param))
    return model


def try_case(case: str, version: str, scratch: Path) -> dict[str, Any]:
    """Returns which of the steps start, load and compute succeed, and the first error of the server.

    load: after a sync the server has the same checksums as after it has read the same weights from a folder. compute: its
    log-probabilities are those of transformers. Some models load on a CPU, but have no kernels for it.
    """
    tokens = some_tokens(batch=1, length=48)[0].tolist()
    first, second = scratch / "first", scratch / "second"
    write_published(case, hf_model(case, sizes_of(case)), first)
    model = other_weights(case)
    write_published(case, model, second)
    more = _LINEAR_FLAGS if "linear_num_key_heads" in CASES[case][1] else ()
    flags = (*_FLAGS, *more, *(("--trust-remote-code",) if case == "mimo" else ()))
    server = RunningServer(version, first, scratch / "server.log", flags)
    folder = HfFolder.open(second)
    result: dict[str, Any] = {"architecture": folder.family.architecture, "step": "start"}
    try:
        server.start()
        wait_for_start(server)
        result["step"] = "load"
        report = sync_of(folder).push(1, [server.url])
        if not report.synced:
            raise RuntimeError(report.line())
        check_same_as_folder(server.url, second)
        result["step"] = "compute"
        result["gap"] = gap(server.url, model, tokens)
        if result["gap"] >= _TOLERANCE:
            raise RuntimeError(f"log-probabilities differ by {result['gap']:.2g}")
        result["step"] = "all"
    except (Exception, pytest.fail.Exception) as error:
        result["reason"] = first_error(server.log) or first_line(error)
    finally:
        server.kill()
    return result


def wait_for_start(server: RunningServer) -> None:
    """Waits until the server answers. It has not computed anything then."""
    deadline = time.monotonic() + _START_S
    with ServerClient(server.url) as client:
        while True:
            try:
                client.weight_label(deadline_s=30.0)
                return
            except ServerError:
                if not server.is_alive or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)


def check_same_as_folder(url: str, folder: Path) -> None:
    """Compares the server's weights with those that it has after it has read them from a folder."""
    with ServerClient(url, deadline_s=120.0) as client:
        (sent,) = client.checksums()
        client.update_weights_from_disk(folder)
        (read,) = client.checksums()
    if wrong := [name for name, checksum in read.items() if sent.get(name) != checksum]:
        raise RuntimeError(
            f"{len(wrong)} of {len(read)} tensors differ from the folder's, the first is {wrong[0]}"
        )


def write_published(case: str, model: Any, path: Path) -> None:
    """Saves a model with the files and keys that published folders have."""
    save_model(model, path)
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    text |= _MORE_KEYS.get(case, {}) | (
        {"full_attention_interval": 4} if "linear_num_key_heads" in text else {}
    )
    if case == "mimo":
        config["auto_map"] = {"AutoConfig": "configuration_mimo.MiMoConfig"}
        (path / "configuration_mimo.py").write_text(_MIMO_CODE)
    write_json(path / "config.json", config)
    if "vision_config" in config:
        kind = "PixtralImageProcessor" if case.startswith("mi") else "Qwen2VLImageProcessor"
        write_json(path / "preprocessor_config.json", {"image_processor_type": kind})


def first_error(log: Path) -> str:
    """Returns the first error in a server's log, with the place in SGLang; empty if there is none."""
    place = ""
    for line in log.read_text(errors="replace").splitlines():
        if found := _PLACE.search(line):
            place = f"{found[1]}:{found[2]}"
        if _ERROR.match(line):
            return f"{line} ({place})"
    return ""


def gap(url: str, model: Any, tokens: list[int]) -> float:
    """Largest difference between served and computed log-probabilities, in nats."""
    return (served_logprobs(url, tokens) - computed_logprobs(model, tokens)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--version", choices=VERSIONS, default=NEWEST)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    buckets._FIRST_BUCKET_BYTES = 4096  # so that tiny models are sent in several buckets
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        for case in options.cases:
            scratch = Path(folder) / case
            scratch.mkdir()
            result = try_case(case, options.version, scratch)
            print(case, json.dumps(result), flush=True)
            if options.output is not None:
                add_result(options.output, options.version, case, result)
        dist.destroy_process_group()


def add_result(path: Path, version: str, case: str, result: dict[str, Any]) -> None:
    """Adds the result of a case to a file of results, or replaces it there."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    write_json(path, {"version": version, "tolerance": _TOLERANCE, "cases": cases | {case: result}})


if __name__ == "__main__":
    main()
