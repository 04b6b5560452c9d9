"""Weight syncs from trainers of several layouts to real SGLang servers, and syncs in which a server fails."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.distributed.ranks_harness import run_ranks
from tests.servers.running import NEWEST, OLDEST, RunningServer, ServerPool

WORKER = Path(__file__).with_name("sync_worker.py")

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 101,  # trainer and server pad it to different sizes
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 64},
    "Qwen3Moe": {
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function: family -> folder of a tiny random model in bf16."""
    root = tmp_path_factory.mktemp("sync-models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            config = getattr(transformers, family + "Config")(**{**SIZES, **FAMILIES[family]})
            torch.manual_seed(11)
            model = getattr(transformers, family + "ForCausalLM")(config)
            with torch.no_grad():
                for param in model.parameters():
                    param.normal_(1.0 if param.ndim == 1 else 0.0, 0.1)
            model.to(torch.bfloat16).save_pretrained(path)
        return path

    return folder


def run_job(root: Path, world_size: int, **job: Any) -> None:
    (root / "job.json").write_text(json.dumps(job))
    run_ranks(WORKER, world_size, root, timeout_s=1000)


TP2, PP2, TP2_PP2 = (2, 1, None), (1, 2, None), (2, 2, None)


def test_llama_reaches_old_and_new_servers_from_every_layout(
    server_pool: ServerPool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folders("Llama")
    servers = server_pool.pair(OLDEST, NEWEST, model)
    layouts = [TP2, PP2, TP2_PP2, (2, 2, 2)]
    run_job(tmp_path, 4, task="layouts", model=str(model), urls=[s.url for s in servers], layouts=layouts)


def test_a_server_that_fails_during_a_sync_is_left_out_and_synced_later(
    server_pool: ServerPool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folders("Llama")
    other, victim = server_pool.pair(OLDEST, NEWEST, model)
    with ServerActions(victim, tmp_path):
        run_job(
            tmp_path,
            2,
            task="faults",
            model=str(model),
            urls=[other.url, victim.url],
            victim=victim.url,
            timeout_s=60,
        )


def test_qwen3_reaches_a_server(
    server_pool: ServerPool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folders("Qwen3")
    server = server_pool.get(OLDEST, model)
    run_job(tmp_path, 4, task="layouts", model=str(model), urls=[server.url], layouts=[TP2, PP2, TP2_PP2])


def test_qwen2_reaches_a_server_of_two_ranks(
    server_pool: ServerPool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folders("Qwen2")
    server = server_pool.get(NEWEST, model, "--tp", "2")
    run_job(tmp_path, 4, task="layouts", model=str(model), urls=[server.url], layouts=[TP2, PP2, TP2_PP2])


EXPERTS_SPREAD = (1, 1, None, 4, 1)
EXPERTS_SPREAD_AND_CUT = (2, 1, None, 2, 2)
EXPERTS_ON_STAGES = (1, 2, None, 2, 1)
HEADS_CUT_EXPERTS_WHOLE = (2, 1, None, 4, 1)


@pytest.mark.parametrize(
    "family,version,flags,layouts",
    [
        ("Qwen3Moe", NEWEST, ("--tp", "2"), [EXPERTS_SPREAD, EXPERTS_SPREAD_AND_CUT, EXPERTS_ON_STAGES]),
        ("Mixtral", OLDEST, (), [EXPERTS_ON_STAGES, HEADS_CUT_EXPERTS_WHOLE]),
    ],
)
def test_experts_of_every_rank_reach_a_server(
    server_pool: ServerPool,
    folders: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    version: str,
    flags: tuple[str, ...],
    layouts: list[tuple[int | None, ...]],
) -> None:
    model = folders(family)
    server = server_pool.get(version, model, *flags)
    run_job(tmp_path, 4, task="layouts", model=str(model), urls=[server.url], layouts=layouts)


class ServerActions:
    """Freezes, thaws, kills or restarts a server when the worker writes the name of the action to ``root``."""

    def __init__(self, server: RunningServer, root: Path) -> None:
        self._root = root
        self._actions: dict[str, Callable[[], None]] = {
            "freeze": server.freeze,
            "thaw": server.thaw,
            "kill": server.kill,
            "restart": self._restart,
        }
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._act)

    def _restart(self) -> None:
        self._server.start()
        self._server.wait_until_ready()

    def _act(self) -> None:
        while not self._is_over.wait(0.05):
            for what, act in self._actions.items():
                if (self._root / f"{what}.wanted").exists() and not (self._root / f"{what}.done").exists():
                    act()
                    (self._root / f"{what}.done").touch()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: Any) -> None:
        self._is_over.set()
        self._thread.join()
        self._server.thaw()
