"""Runs tools/plan.py from its command line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.tools import cli
from tools import plan

ROOT = Path(__file__).resolve().parents[3]
LLAMA_70B = ROOT / "tests" / "unit" / "tools" / "capacity" / "llama-3.1-70b"


def run(*flags: str) -> int:
    return cli.run(plan.main, ["--num-gpus", "64", *flags])


def test_document_shows_what_the_tool_prints() -> None:
    """Runs in a new process without torch and Megatron, so that importing either would fail."""
    document = (ROOT / "docs/capacity.md").read_text(encoding="utf-8")
    command, shown = re.findall(
        r"^    (python tools/plan\.py .*)\n\n((?:    .*\n|\n)+)", document, re.MULTILINE
    )[0]
    flags = shlex.split(command.replace("DIR", str(LLAMA_70B)))[2:]
    program = "import sys; sys.modules['torch'] = sys.modules['megatron'] = None; from megatron_rasft.tools import cli; from tools import plan; sys.exit(cli.run(plan.main))"
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.replace(str(LLAMA_70B), "DIR").splitlines()]
    for line in shown.splitlines():
        line = " ".join(line.split())
        beginning, _, rest = line.partition(" ... ")
        assert any(p.startswith(beginning) and p.endswith(rest) for p in printed), line


def test_json_holds_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--hf-model", str(LLAMA_70B), "--json", "--top", "3", "--mfu", "0.4") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"]["num_parameters"] == 70_553_706_496
    assert len(values["layouts"]) == 3 <= values["num_fitting"]
    first = values["layouts"][0]
    assert first["fits"] and first["memory"]["total"] <= 80 * 2**30
    assert {"flag": "--mfu", "value": "0.4", "basis": "given"} in values["assumptions"]
    assert any("tools/serve_node.py" in line for line in values["commands"])


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--hf-model", "nowhere"], 1, "nowhere"),
        (["--hf-model", str(ROOT / "docs")], 1, "config.json"),
        (["--hf-model", str(LLAMA_70B), "--seq-length", "200000"], 2, "--seq-length 200000"),
        (["--hf-model", str(LLAMA_70B), "--solve-rate", "2"], 2, "--solve-rate"),
        (["--hf-model", str(LLAMA_70B), "--top", "0"], 2, "--top"),
        (["--hf-model", str(LLAMA_70B), "--num-gpus", "4"], 1, "4 GPUs of 80 GiB"),
    ],
)
def test_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], code: int, named: str
) -> None:
    assert run(*flags) == code
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_job_for_slurm_needs_whole_nodes_for_servers_and_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / 'it\'s "$HOME" `pwd` {1}.jsonl'
    common = ["--hf-model", str(LLAMA_70B), "--slurm", str(tmp_path / "job")]
    assert run(*common, "--train-data", str(data)) == 2
    assert f"--train-data {data}" in capsys.readouterr().err
    data.touch()
    one_node = ["--num-gpus", "8", "--rollout-gpus", "4", "--gpu-memory-gib", "500"]
    assert run(*common, "--train-data", str(data), *one_node) == 2
    assert "--slurm" in capsys.readouterr().err and not (tmp_path / "job").exists()
    assert run(*common, "--train-data", str(data), "--rollout-gpus", "32") == 0
    assert capsys.readouterr().out.rstrip().endswith(f"sbatch {tmp_path}/job/rasft.sbatch")
    script = (tmp_path / "job" / "rasft.sbatch").read_text()
    assert "#SBATCH --nodes=8\n" in script
    (given,) = (line for line in script.splitlines() if line.startswith("export TRAIN_DATA="))
    for variables, expected in (({}, f"{data}"), ({"TRAIN_DATA": "other file"}, "other file")):
        command = ["bash", "-euc", f'{given}; printf %s "$TRAIN_DATA"']
        assert subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True).stdout == expected
    assert "TRAINER_NODES=4 SERVER_NODES=4\n" in (tmp_path / "job" / "settings.sh").read_text()


def test_job_for_slurm_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wheel has no examples/slurm."""
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    (tmp_path / "train.jsonl").touch()
    flags = ["--slurm", str(tmp_path / "job"), "--train-data", str(tmp_path / "train.jsonl")]
    assert run("--hf-model", str(LLAMA_70B), *flags, "--rollout-gpus", "32") == 2
    assert "checkout" in capsys.readouterr().err and not (tmp_path / "job").exists()


def test_family_that_is_not_supported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma2ForCausalLM"]}')
    assert run("--hf-model", str(tmp_path)) == 1
    assert "Gemma2ForCausalLM is not supported" in capsys.readouterr().err
