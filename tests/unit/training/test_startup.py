"""From the command line to Megatron's groups: missing paths, background saves, warnings and the launcher's variables."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.tools.evaluation.embedded_engine import EmbeddedEngine
from megatron_rasft.training import startup
from tests.unit.training.conftest import Parse


@pytest.mark.parametrize("flag", ["--hf-model", "--train-data"])
def test_a_missing_input_is_named(flag: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_rasft.py"])
    given = {"--hf-model": str(model), "--train-data": "rows.jsonl"}
    del given[flag]
    with pytest.raises(ValueError, match=f"{flag} "):
        startup.parse([word for pair in given.items() for word in pair])


def test_a_model_that_only_samples_needs_no_data(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    args, _, folder = startup.parse(["--hf-model", str(model)], needs_data=False)
    assert folder.path == model and not args.train_data


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--export-hf", "."), "--export-hf"),
        (("--fp16",), "--fp16.*--bf16"),
        (("--async-save", "--ckpt-format", "torch"), "--async-save.*--ckpt-format torch"),
    ],
)
def test_flags_that_cannot_work_are_refused(parse: Parse, flags: tuple[str, ...], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse(*flags)


def test_the_runs_own_export_is_not_refused(parse: Parse, tmp_path: Path) -> None:
    export, save = tmp_path / "hf", tmp_path / "save"
    for folder in (export, save):
        folder.mkdir()
    flags = ("--save", str(save), "--export-hf", str(export))
    RunStatus(state="running", export_folder=str(tmp_path / "other")).write(save)
    with pytest.raises(ValueError, match="--export-hf"):
        parse(*flags)
    RunStatus(state="running", export_folder=str(export)).write(save)
    with pytest.raises(ValueError, match="--export-hf"):
        parse(*flags)
    for name in ("config.json", "model.safetensors"):
        (export / name).touch()
    assert parse(*flags).export_hf == str(export)


def test_megatrons_own_refusal_is_one_line(parse: Parse) -> None:
    with pytest.raises(ValueError) as raised:
        parse("--min-lr", "1", "--lr", "0.1")
    assert "\n" not in str(raised.value)


def test_megatrons_refusal_without_a_message_shows_its_check(parse: Parse, tmp_path: Path) -> None:
    flags = ("--save", str(tmp_path / "save"), "--save-interval", "3", "--save-retain-interval", "10")
    with pytest.raises(ValueError, match=r"save_retain_interval % args\.save_interval"):
        parse(*flags)


def test_background_saves_need_no_worker_process(parse: Parse) -> None:
    args = parse("--async-save")
    assert args.async_save and not args.use_persistent_ckpt_worker


def test_the_vocabulary_is_padded_for_tensor_parallelism(parse: Parse) -> None:
    args = parse("--make-vocab-size-divisible-by", "64")
    assert args.padded_vocab_size % 64 == 0
    assert args.vocab_size <= args.padded_vocab_size < args.vocab_size + 64


def test_a_process_without_a_launcher_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MASTER_PORT": "29500"})
    startup.stand_in_for_launcher()
    assert os.environ == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_torchruns_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", "RANK": "1"})
    startup.stand_in_for_launcher()
    assert os.environ == {"WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("flags", "cumem"),
    [
        (("--rollout-engine", "sglang", "--rollout-urls", "http://a:1"), "0"),
        (("--rollout-engine", "sglang", "--rollout-urls", "http://a:1", "--sync-method", "tensor"), None),
        ((), None),
    ],
    ids=["broadcast", "the same GPU", "no servers"],
)
def test_nccl_is_prepared_for_the_servers_before_anything_uses_it(
    flags: tuple[str, ...], cumem: str | None, parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, found = parse(*flags), []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(startup, "set_global_variables", lambda args, build_tokenizer: None)
    monkeypatch.setattr(
        startup, "initialize_megatron", lambda **_: found.append(os.environ.get("NCCL_CUMEM_ENABLE"))
    )
    startup.start(args)
    assert found == [cumem]


def test_warnings_about_calls_in_megatron_are_not_shown(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse()
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(startup, "set_global_variables", lambda args, build_tokenizer: None)
    monkeypatch.setattr(startup, "initialize_megatron", lambda **_: None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        startup.start(args)
        warnings.warn("The argument order of load has been changed.", UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]


def test_an_evaluation_takes_no_checkpoint_to_go_on_from(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--load .*--checkpoint"):
        EmbeddedEngine(["--hf-model", str(model), "--load", str(tmp_path)])
