"""tools/gpu_check.py on the emulated GPU with small sizes: its programs run and report their figures."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.emulated_gpu import running
from tests.forking import REPOSITORY, Rank
from tests.ports import new_port
from tools import gpu_check
from tools.gpu_checking import report
from tools.gpu_checking.processes import Command, Started


@dataclass(kw_only=True)
class Leader(Rank):
    """A program that is the leader of a process group, as gpu_check starts programs."""

    def __call__(self) -> None:
        os.setsid()
        super().__call__()


@dataclass
class Forked:
    """A running program with the interface that gpu_check uses."""

    process: ForkServerProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def profile_host_only() -> None:
    """Makes torch's profiler record the CPU only, because it calls the CUDA driver, which is not emulated."""
    import torch.profiler

    init = torch.profiler.profile.__init__

    def init_without_kernels(self: torch.profiler.profile, *, activities: object, **more: object) -> None:
        init(self, activities=[torch.profiler.ProfilerActivity.CPU], **more)  # type: ignore[arg-type]

    torch.profiler.profile.__init__ = init_without_kernels  # type: ignore[method-assign, assignment]


def begin(command: Command, log: Path) -> Started:
    """Forks a single-process program from a parent that has imported everything, which saves ten seconds of imports."""
    assert command.num_processes <= 1 and command.program[0] != "-m"
    variables = {"LOCAL_WORLD_SIZE": "1", **command.variables}
    if command.num_processes:
        variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(new_port())}
    leader = Leader(
        program=REPOSITORY / command.program[0],
        arguments=command.program[1:],
        log=log,
        variables=variables,
        prepare=[profile_host_only],
    )
    process = multiprocessing.get_context("forkserver").Process(target=leader)
    with running.parent("transformer_engine").forks():
        process.start()
    return Forked(process)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[report.Report]:
    """The report of every step that an emulated GPU can run."""
    output = tmp_path_factory.mktemp("gpu_check")
    steps = ["first_run", "train_step", "generation", "generation_cudnn", "fp8_delayed", "swap_and_save"]
    steps += ["async_save", "profile"]
    code = gpu_check.main(["--output", str(output), "--shape", "tiny", "--steps", *steps], begin=begin)
    assert code in (0, 1), "gpu_check did not start, its message is above"
    print((output / report.MARKDOWN_FILE).read_text())
    yield report.read(output / report.JSON_FILE)


def figures(found: report.Report, name: str) -> dict[str, report.Figure]:
    (result,) = (result for result in found.steps if result.name == name)
    assert result.status == "passed", "\n".join([result.reason, *result.last_lines])
    return result.figures


def test_report_names_the_emulated_machine(found: report.Report) -> None:
    assert found.emulated
    assert found.machine["GPU"] == "Emulated H100 80GB"


def test_first_run_gives_the_ratio_of_each_step(found: report.Report) -> None:
    given = figures(found, "first_run")
    assert [given[f"step {step} ratio_mean"] is not None for step in (1, 2, 3)] == [True] * 3
    assert given["num_refreshes"] == 1 and float(str(given["last step tokens/s"])) > 0


def test_fp8_run_gives_the_ratio_of_each_step(found: report.Report) -> None:
    given = figures(found, "fp8_delayed")
    assert all(isinstance(given[f"step {step} ratio_mean"], float) for step in (1, 2, 3))


def test_kinds_of_step_are_measured_beside_megatrons_own(found: report.Report) -> None:
    given = figures(found, "train_step")
    for kind in ("megatron sft", "sft", "rasft"):
        for layout in ("packed", "padded"):
            assert float(str(given[f"measured {kind} {layout} tokens_per_s"])) > 0
    assert "## Tokens per second of a training step" in report.markdown(found)


@pytest.mark.parametrize(("name", "has_cudnn"), [("generation", False), ("generation_cudnn", True)])
def test_generation_is_measured(found: report.Report, name: str, has_cudnn: bool) -> None:
    given = figures(found, name)
    assert given["cudnn_attention"] is has_cudnn
    assert float(str(given["measured tokens_per_s"])) > 0
    assert float(str(given["measured host_gib_before"])) > 0


def test_saves_are_measured(found: report.Report) -> None:
    synchronous, background = figures(found, "swap_and_save"), figures(found, "async_save")
    assert synchronous["save steps_meanwhile"] == 0
    for given in (synchronous, background):
        assert 0 < float(str(given["save blocked_s"])) <= float(str(given["save until_written_s"]))
        assert float(str(given["save gb"])) > 0 and float(str(given["swap_s"])) > 0


def test_profile_without_kernels_says_so(found: report.Report) -> None:
    assert figures(found, "profile")["num_kernels"] == 0
