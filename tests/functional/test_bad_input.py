"""A mistake of the user ends the run at once, on every rank, with one line that names the flag or the file."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.types import Rollout
from tests import forking
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.tiny_policy import write_mixture, write_model

BAD_INPUT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Case:
    """A mistake of a user, and the names that the error must contain."""

    flags: Callable[[Workshop, Path], list[str]]
    names: tuple[str, ...]
    world_size: int = 1
    num_lines: int = 1
    """Number of lines of the error. Faulty rows are listed, one line each."""


def without(flags: list[str], flag: str) -> list[str]:
    """The command line without one flag and its value."""
    at = flags.index(flag)
    return flags[:at] + flags[at + 2 :]


def experts_apart(*more: str) -> Callable[[Workshop, Path], list[str]]:
    """A mixture of experts whose experts are spread over two ranks; the flags make the trainer sample."""

    def made(workshop: Workshop, folder: Path) -> list[str]:
        model = write_mixture(folder / "model", workshop.policy)
        return workshop.flags("--expert-model-parallel-size", "2", *more, model=model)

    return made


def data_of(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def without_answer(workshop: Workshop, folder: Path) -> list[str]:
    good = {"problem": "1 + 1", "response": "1+1=2", "answer": "2"}
    bad = {"problem": "1 + 2", "response": "1+2=3"}
    return workshop.flags(data=data_of(folder, json.dumps(good), json.dumps(bad)))


def other_problems(workshop: Workshop, folder: Path) -> list[str]:
    rollout = Rollout(
        problem_id="old.jsonl:1",
        sample_index=0,
        weight_version=0,
        prompt_ids=[1],
        response_ids=[0],
        response_logprobs=[-1.0],
        finish_reason="stop",
        text="2",
    )
    store = RolloutStore(folder / "rollouts.jsonl")
    store.append([rollout])
    flags = ["--objective", "grpo", "--rollout-engine", "replay", "--rollout-replay", str(store.path)]
    return workshop.flags(*flags)


def without_weights(workshop: Workshop, folder: Path) -> list[str]:
    model = folder / "model"
    shutil.copytree(workshop.random, model)
    (model / "model.safetensors").unlink()
    return workshop.flags(model=model)


def without_tokenizer(workshop: Workshop, folder: Path) -> list[str]:
    model = folder / "model"
    shutil.copytree(workshop.random, model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    return workshop.flags(model=model)


def tokenizer_too_large(workshop: Workshop, folder: Path) -> list[str]:
    return workshop.flags(model=write_model(folder / "model", vocab_size=12))


def more(*flags: str) -> Callable[[Workshop, Path], list[str]]:
    return lambda workshop, folder: workshop.flags(*flags)


def a_file(folder: Path) -> str:
    path = folder / "file"
    path.write_text("")
    return str(path)


def a_reference(workshop: Workshop, folder: Path, cache: str) -> list[str]:
    return workshop.flags("--objective", "grpo", "--rasft-ref-cache", cache)


CASES = {
    "no data file": Case(lambda w, f: without(w.flags(), "--train-data"), ("--train-data",)),
    "missing file": Case(lambda w, f: w.flags(data=f / "none.jsonl"), ("none.jsonl",)),
    "empty file": Case(lambda w, f: w.flags(data=data_of(f)), ("rows.jsonl",)),
    "row without answer": Case(without_answer, ("rows.jsonl:2", "answer", "--data-bad-rows"), num_lines=3),
    "row that is not JSON": Case(lambda w, f: w.flags(data=data_of(f, "{")), ("rows.jsonl:1",), num_lines=3),
    "missing model": Case(lambda w, f: w.flags(model=f / "none"), ("none",)),
    "no model": Case(lambda w, f: without(w.flags(), "--hf-model"), ("--hf-model",)),
    "model without weights": Case(without_weights, ("safetensors",)),
    "model without tokenizer": Case(without_tokenizer, ("tokenizer",)),
    "tokenizer larger than embedding": Case(tokenizer_too_large, ("token", "12")),
    "batch that does not divide": Case(more("--micro-batch-size", "3"), ("--global-batch-size 8",)),
    "layout larger than world": Case(
        more("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        ("--nproc-per-node",),
    ),
    "layout that does not divide the heads": Case(
        more("--tensor-model-parallel-size", "3"),
        ("--tensor-model-parallel-size 3", "--rasft-query-groups 3"),
        3,
    ),
    "fewer query groups than the model has": Case(
        more("--rasft-query-groups", "1"), ("--rasft-query-groups 1",)
    ),
    "clip range reversed": Case(
        more("--objective-ratio-clip-low", "2"), ("--objective-ratio-clip-low", "--objective-ratio-clip-high")
    ),
    "misspelt flag on two ranks": Case(
        more("--rollout-temprature", "0.7"),
        ("--rollout-temprature", "--rollout-temperature?"),
        2,
    ),
    "misspelt choice": Case(more("--objective", "rasff"), ("--objective", "'rasff'", "rasft?")),
    "warm-up as long as the run": Case(more("--lr-warmup-iters", "5"), ("--lr-warmup-iters 5",), 2),
    "dropout": Case(more("--hidden-dropout", "0.1"), ("--hidden-dropout 0.1",)),
    "overlap that needs one shape": Case(more("--tp-comm-overlap"), ("--tp-comm-overlap ",), 2),
    "precision that skips steps": Case(more("--fp16"), ("--fp16", "--bf16")),
    "top-p of 0": Case(more("--rollout-top-p", "0"), ("--rollout-top-p",)),
    "wandb without a name": Case(more("--wandb-project", "p"), ("--wandb-exp-name",), 2),
    "wandb without a folder": Case(
        more("--wandb-project", "p", "--wandb-exp-name", "n"), ("--wandb-save-dir", "--save"), 2
    ),
    "refresh interval of 0": Case(more("--rasft-refresh-interval", "0"), ("--rasft-refresh-interval",)),
    "no epochs": Case(more("--data-epochs", "0"), ("--data-epochs",)),
    "no samples": Case(
        more("--rollout-num-samples", "0"), ("--rollout-num-samples", "--curriculum-mode off")
    ),
    "rollouts that are off but needed": Case(
        more("--objective", "grpo", "--curriculum-mode", "off"), ("--curriculum-mode",)
    ),
    "export folder exists": Case(lambda w, f: w.flags("--export-hf", str(f)), ("--export-hf",)),
    "export into a file": Case(lambda w, f: w.flags("--export-hf", a_file(f) + "/hf"), ("--export-hf",), 2),
    "save is a file": Case(lambda w, f: w.flags("--save", a_file(f)), ("--save", "File exists"), 2),
    "store is a folder": Case(
        lambda w, f: w.flags("--rollout-store", str(f)), ("--rollout-store", "Is a directory"), 2
    ),
    "metrics in a file": Case(
        lambda w, f: w.flags("--rasft-metrics", a_file(f) + "/metrics"),
        ("--rasft-metrics",),
    ),
    "reference cache is a folder": Case(
        lambda w, f: a_reference(w, f, str(f)), ("--rasft-ref-cache", "Is a directory")
    ),
    "reference cache is not a database": Case(
        lambda w, f: a_reference(w, f, str(w.sums)), ("--rasft-ref-cache", "sums.jsonl"), 2
    ),
    "sequence beyond positions": Case(more("--seq-length", "4096"), ("--seq-length", "128")),
    "every row too long": Case(more("--seq-length", "4"), ("--seq-length",), num_lines=13),
    "replay without a store": Case(more("--rollout-engine", "replay"), ("--rollout-replay",)),
    "store of other problems on two ranks": Case(
        other_problems, ("rollouts.jsonl", "--rollout-replay", "'old.jsonl:1'", "'sum0'"), 2
    ),
    "rollouts of a trainer with experts on two ranks": Case(
        experts_apart(), ("--expert-model-parallel-size 2", "--rollout-engine"), 2
    ),
    "held-out problems with experts on two ranks": Case(
        lambda w, f: experts_apart("--objective", "sft", "--heldout-data", str(w.sums))(w, f),
        ("--expert-model-parallel-size 2", "--heldout-data"),
        2,
    ),
    "missing file on two ranks": Case(lambda w, f: w.flags(data=f / "none.jsonl"), ("none.jsonl",), 2),
    "row without answer on two ranks": Case(without_answer, ("rows.jsonl:2", "answer"), 2, num_lines=3),
    "model without weights on two ranks": Case(without_weights, ("safetensors",), 2),
    "tokenizer larger than embedding on two ranks": Case(tokenizer_too_large, ("token", "12"), 2),
}


def assert_one_plain_error(outcome: launching.Outcome, *names: str, num_lines: int = 1) -> None:
    for code in outcome.codes:
        assert code is not None, f"a rank hung\n{outcome.output}"
        assert code > 0, outcome.output
    assert len(outcome.errors) == 1, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    assert len(outcome.errors[0].strip().splitlines()) == num_lines, outcome.output
    for name in names:
        assert name in outcome.errors[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mistake_ends_every_rank_with_one_line(workshop: Workshop, tmp_path: Path, case: Case) -> None:
    outcome = launching.run(
        tmp_path / "logs", case.flags(workshop, tmp_path), case.world_size, timeout_s=BAD_INPUT_TIMEOUT_S
    )
    assert_one_plain_error(outcome, *case.names, num_lines=case.num_lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp8_is_refused_without_a_gpu(workshop: Workshop, tmp_path: Path) -> None:
    outcome = launching.run(
        tmp_path, workshop.flags("--bf16", "--fp8-format", "hybrid"), timeout_s=BAD_INPUT_TIMEOUT_S
    )
    assert_one_plain_error(outcome, "--fp8-format", "GPU")


def be_rank(rank: int, local_rank: int) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16"})


@pytest.mark.parametrize("rank,local_rank,num_errors", [(8, 0, 1), (9, 1, 0)])
def test_error_of_another_node_is_printed_there_once(
    workshop: Workshop, tmp_path: Path, rank: int, local_rank: int, num_errors: int
) -> None:
    process = forking.Rank(
        program=launching.PROGRAM,
        arguments=workshop.flags(model=tmp_path / "none"),
        log=tmp_path / "log",
        variables={},
        prepare=[partial(be_rank, rank, local_rank)],
    )
    outcome = forking.run([process], timeout_s=BAD_INPUT_TIMEOUT_S)
    assert outcome.codes[0] not in (0, None) and "Traceback" not in outcome.output
    assert len(outcome.errors) == num_errors, outcome.output
    assert all(error.startswith("rank 8: ") and str(tmp_path / "none") in error for error in outcome.errors)


def test_torchrun_prints_the_error_once(workshop: Workshop, tmp_path: Path) -> None:
    outcome = launching.torchrun(without_answer(workshop, tmp_path), 2, timeout_s=BAD_INPUT_TIMEOUT_S)
    assert outcome.codes[0] != 0
    assert len(outcome.errors) == 1, outcome.output
    assert "rows.jsonl:2" in outcome.errors[0]


@pytest.fixture(scope="module")
def saved(workshop: Workshop) -> Path:
    """A run's folder with a checkpoint after its second and last step."""
    save = workshop.root / "saved"
    workshop.train(save, ["--train-iters", "2"])
    return save


def checkpoint_files(save: Path) -> dict[str, bytes]:
    """The files of the run that a later start reads."""
    paths = [
        p
        for p in save.rglob("*")
        if p.is_file() and (p.parent.name.startswith("iter_") or p.suffix == ".txt")
    ]
    return {str(p.relative_to(save)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoint_of_another_model_is_refused(
    workshop: Workshop, saved: Path, tmp_path: Path, world_size: int
) -> None:
    save = tmp_path / "save"
    shutil.copytree(saved, save)
    kept = checkpoint_files(save)
    wider = write_model(tmp_path / "wider", intermediate_size=192)
    flags = workshop.flags("--save", str(save), "--train-iters", "4", model=wider)
    outcome = launching.run(tmp_path / "logs", flags, world_size, timeout_s=BAD_INPUT_TIMEOUT_S)
    assert_one_plain_error(outcome, "ffn_hidden_size 128 != 192", "--hf-model")
    assert checkpoint_files(save) == kept


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoint_of_another_schedule_is_refused(
    workshop: Workshop, saved: Path, tmp_path: Path, world_size: int
) -> None:
    save = tmp_path / "save"
    shutil.copytree(saved, save)
    kept = checkpoint_files(save)
    outcome = launching.run(
        tmp_path / "logs",
        workshop.flags("--save", str(save), "--train-iters", "4"),
        world_size,
        timeout_s=BAD_INPUT_TIMEOUT_S,
    )
    assert_one_plain_error(outcome, "--override-opt_param-scheduler")
    assert checkpoint_files(save) == kept


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def keep_state_only(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        if not path.name.startswith("rasft_"):
            path.unlink()


@dataclass(frozen=True)
class Damage:
    """Damage to a checkpoint, and a name that the error must contain."""

    apply: Callable[[Path], None]
    name: str = ""
    world_size: int = 1


DAMAGES = {
    "shard cut": Damage(lambda c: cut_in_half(largest_shard(c)), world_size=2),
    "shard missing": Damage(lambda c: largest_shard(c).unlink()),
    "index cut": Damage(lambda c: cut_in_half(c / ".metadata")),
    "format cut": Damage(lambda c: cut_in_half(c / "metadata.json"), world_size=2),
    "all but the state missing": Damage(keep_state_only),
    "state cut": Damage(lambda c: cut_in_half(c / "rasft_state.json"), "rasft_state.json", 2),
    "folder missing": Damage(shutil.rmtree, "latest_checkpointed_iteration.txt"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_named(workshop: Workshop, saved: Path, tmp_path: Path, damage: Damage) -> None:
    save = tmp_path / "save"
    shutil.copytree(saved, save)
    damage.apply(save / "iter_0000002")
    flags = workshop.flags("--save", str(save), "--train-iters", "3", "--override-opt_param-scheduler")
    outcome = launching.run(tmp_path / "logs", flags, damage.world_size, timeout_s=BAD_INPUT_TIMEOUT_S)
    assert_one_plain_error(outcome, str(save / "iter_0000002"), damage.name, "another --save")


@pytest.mark.parametrize(
    "text,name", [("release", "--load"), ("two", "latest_checkpointed_iteration.txt holds 'two'")]
)
def test_save_folder_without_a_runs_checkpoint_is_refused(
    workshop: Workshop, tmp_path: Path, text: str, name: str
) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text(text)
    outcome = launching.run(
        tmp_path / "logs", workshop.flags("--save", str(save)), timeout_s=BAD_INPUT_TIMEOUT_S
    )
    assert_one_plain_error(outcome, str(save), name)


def test_run_that_diverges_ends_before_its_weights_are_saved(workshop: Workshop, tmp_path: Path) -> None:
    save = tmp_path / "save"
    flags = workshop.flags("--save", str(save), "--save-interval", "1", "--lr", "1e30")
    outcome = launching.run(tmp_path / "logs", flags, 2, timeout_s=BAD_INPUT_TIMEOUT_S)
    assert_one_plain_error(outcome, "step 2", "--lr")
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert not (save / "iter_0000002").exists()


@pytest.mark.parametrize(
    ("name", "flag", "limit", "objective"),
    [
        ("data_cache", "--data-cache", 1_000, "sft"),
        ("config.json", "--save", 30_000, "sft"),
        ("rollouts.jsonl", "--rollout-store", 100_100, "rasft"),
    ],
)
def test_full_disk_names_the_file_and_its_flag(
    workshop: Workshop, tmp_path: Path, name: str, flag: str, limit: int, objective: str
) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "rollouts.jsonl").write_text("{}\n" * 33_333)
    flags = workshop.flags("--save", str(save), "--objective", objective)
    outcome = launching.run(tmp_path / "full", flags, 2, file_limit=limit, timeout_s=BAD_INPUT_TIMEOUT_S)
    assert_one_plain_error(outcome, str(save / name), "File too large", flag)


@pytest.mark.parametrize(("world_size", "more"), [(1, ()), (2, ()), (2, ("--async-save",))])
def test_full_disk_at_save_spares_earlier_checkpoints(
    workshop: Workshop, saved: Path, tmp_path: Path, world_size: int, more: tuple[str, ...]
) -> None:
    save = tmp_path / "save"
    shutil.copytree(saved, save)
    kept = checkpoint_files(save)
    assert "latest_checkpointed_iteration.txt" in kept
    flags = workshop.flags("--save", str(save), "--train-iters", "3", "--override-opt_param-scheduler")
    outcome = launching.run(
        tmp_path / "full", [*flags, *more], world_size, file_limit=200_000, timeout_s=BAD_INPUT_TIMEOUT_S
    )
    assert_one_plain_error(outcome, "step 3", str(save), "GiB", "--save")
    left = checkpoint_files(save)
    assert {name: left.get(name) for name in kept} == kept
    if world_size == 1:
        assert "after step 2" in workshop.train(save, flags[2:]).output
