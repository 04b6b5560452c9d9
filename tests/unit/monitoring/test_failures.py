"""An error that ends a run is printed once per node."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_rasft.errors import CheckpointError, FailedElsewhere
from megatron_rasft.monitoring import failures
from megatron_rasft.monitoring.failures import prints_for_node, report_failure
from tests.forking import call_on_ranks


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("--lr is wrong"), 2, "error: --lr is wrong\n"),
        (CheckpointError("it is damaged"), 1, "error: it is damaged\n"),
        (FailedElsewhere("rank 0 printed it"), 1, ""),
        (KeyboardInterrupt(), 130, "error: interrupted by Ctrl-C\n"),
    ],
)
def test_the_exit_code_tells_a_wrong_flag_from_other_failures(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_failure(error) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("error", [ValueError("--lr is wrong"), FailedElsewhere("--lr is wrong")])
def test_torchruns_last_lines_show_the_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    code = report_failure(error)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
    assert "error: --lr is wrong" in str(ChildFailedError("pretrain_rasft.py", {0: failure}))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    assert report_failure(error) == code


def test_a_rank_other_than_0_gives_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    report_failure(ValueError("no space left"))
    assert capsys.readouterr().err == "error: rank 8: no space left\n"


def _rank_that_fails(rank: int, folder: str) -> None:
    os.environ.update({"LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)})
    assert prints_for_node("before they met") == (rank % 2 == 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    failures._GRACE = timedelta(
        minutes=10
    )  # the first rank of a node prints in this time, also on a busy machine
    if rank % 2 == 0:
        time.sleep(1)  # the other ranks wait for this
    printed = prints_for_node("met by all")
    if rank in (2, 3):
        printed = (printed, prints_for_node("met by the second node"))
    if rank == 3:
        failures._GRACE = timedelta(seconds=1)
        printed = (*printed, prints_for_node("met by its last rank alone"))
    Path(folder, f"printed{rank}").write_text(str(printed))
    dist.barrier()
    dist.destroy_process_group()


def test_an_error_is_printed_once_per_node_or_by_the_only_rank_that_met_it(tmp_path: Path) -> None:
    call_on_ranks(_rank_that_fails, tmp_path, 4)
    printed = [(tmp_path / f"printed{rank}").read_text() for rank in range(4)]
    assert printed == ["True", "False", "(True, True)", "(False, False, True)"]
