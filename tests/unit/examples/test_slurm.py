"""examples/slurm: each setting has the nodes of its recipe, and the job script starts the right steps. tests/slurm runs it under Slurm."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm_settings import FOLDER, ROOT, SETTINGS, Setting
from tests.unit.examples.test_recipes import planned
from tools import serve_node

ARRAYS = sorted((ROOT / "examples" / "benchmark_reproduction" / "slurm").glob("*.sbatch"))
NODES = {
    "qwen2.5-math-1.5b": (1, 0),
    "llama-3.2-3b": (1, 0),
    "qwen2.5-math-7b": (1, 1),
    "qwen3-8b": (1, 1),
    "qwen3-32b": (2, 2),
    "llama-3.3-70b": (8, 4),
    "qwen2.5-72b": (8, 4),
    "qwen3-30b-a3b": (2, 2),
}
"""Setting -> nodes that train and nodes that serve."""


def test_every_model_has_a_setting_on_its_nodes() -> None:
    found = {path.stem: Setting(path) for path in SETTINGS}
    assert {name: (s.number("TRAINER_NODES"), s.number("SERVER_NODES")) for name, s in found.items()} == NODES


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_setting_has_the_gpus_of_its_recipe(path: Path, tmp_path: Path) -> None:
    setting = Setting(path)
    assert setting.recipe == ROOT / "examples" / "recipes" / f"{path.stem}.toml"
    model, config, _ = planned(setting.recipe, tmp_path)
    per_node, num_servers = setting.number("NUM_GPUS"), setting.number("SERVER_NODES")
    assert config.rollout_gpus == per_node * num_servers
    assert config.num_gpus == per_node * (setting.number("TRAINER_NODES") + num_servers)
    if num_servers:
        servers_per_node, tp = setting.number("SERVERS_PER_NODE"), setting.number("SERVER_TP")
        assert servers_per_node * tp == per_node
        assert 2 * model.num_parameters / tp < 0.75 * 80 * 2**30, "the weights fill a server's GPUs"
        shares = serve_node.gpu_shares(servers_per_node, tp)
        assert len(set(",".join(shares).split(","))) == per_node


STAND_INS = {
    # writes its arguments; a server step signs servers on, a trainer step writes what the test wants
    "srun": """
printf '%s\\0' "$@" >>"$CALLS/srun"; echo >>"$CALLS/srun"
case "$*" in
*serve_node.py*)
    for port in $(seq "${NUM_SIGNED_ON:-4}"); do echo "http://n3:$port" >>"$RUN/servers.txt"; done
    [ -z "${GIVEN_UP:-}" ] || echo "$GIVEN_UP" >>"$RUN/given_up_servers.txt"
    exec sleep 900 ;;
*pretrain_rasft.py*) eval "$TRAINER"; exit "${TRAINER_CODE:-0}" ;;
*check_node.py*) case "$*" in *"${SICK:-none}"*) exit 1 ;; esac ;;
esac""",
    "scontrol": """
case "$1" in
show) tr ',' '\\n' <<<"$3" ;;
requeue) echo "$2" >>"$CALLS/requeued" ;;
esac""",
    "scancel": 'echo "$@" >>"$CALLS/cancelled"; touch "$CALLS/passed_on"',
    "squeue": 'echo "${SQUEUE_ANSWER-2026-12-01T00:00:00}"; exit "${SQUEUE_CODE:-0}"',
}
"""Slurm's commands as the script uses them."""

TOY = """
TRAINER_NODES=2 SERVER_NODES=${SERVER_NODES:-0} NUM_GPUS=8 SERVERS_PER_NODE=2 SERVER_TP=4 SERVER_FLAGS=(${MORE:-}) FLAGS=(--bf16)
"""


CHECKPOINTS = 'mkdir -p "$RUN/checkpoints"; cd "$RUN/checkpoints"; '
FINISHED = CHECKPOINTS + """echo '{"state": "finished"}' >status.json"""
SAVED = (
    CHECKPOINTS + """echo '{"state": "stopped"}' >status.json; echo 100 >latest_checkpointed_iteration.txt"""
)


def stand_ins(folder: Path) -> Path:
    """Writes Slurm's commands into a folder; returns it."""
    folder.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@dataclass
class Job:
    """Runs the script with stand-ins for Slurm."""

    folder: Path

    def run(self, nodes: str, **variables: str) -> subprocess.CompletedProcess[str]:
        tools = stand_ins(self.folder / "bin")
        (self.folder / "toy.sh").write_text(TOY, encoding="utf-8")
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(self.folder),
            "CHECKOUT": str(ROOT),
            "MODEL": "/models/m",
            "TRAIN_DATA": "/data/train.jsonl",
            "RUN": str(self.folder / "run"),
            "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NODELIST": nodes,
            "TRAINER": FINISHED,
            "TZ": "UTC",
            **variables,
        }
        return subprocess.run(
            ["bash", str(FOLDER / "rasft.sbatch"), str(self.folder / "toy.sh"), "--lr", "1e-5"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    def steps(self) -> dict[str, list[str]]:
        """Program -> the arguments of srun that started it."""
        calls = [line.split("\0") for line in (self.folder / "srun").read_text().split("\0\n") if line]
        programs = ("check_node", "serve_node", "check_servers", "pretrain_rasft")
        return {p: c for c in calls for p in programs if any(w.endswith(f"{p}.py") for w in c)}

    @property
    def is_requeued(self) -> bool:
        return (self.folder / "requeued").exists()


def test_job_without_servers_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = job.run("n1,n2")
    assert done.returncode == 0, done.stderr
    steps = job.steps()
    assert [*steps] == ["check_node", "pretrain_rasft"] and not job.is_requeued
    words = steps["pretrain_rasft"]
    assert {"--nodes=2", "--nodelist=n1,n2", "--kill-on-bad-exit=1"} <= {*words}
    for flag, value in (("--nnodes", "2"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", "n1:29734")):
        assert words[words.index(flag) + 1] == value
    log_dir = words[words.index("--log-dir") + 1]
    assert Path(log_dir).parent.parent.name == "run", (
        "by default torchrun leaves a folder in /tmp for each start"
    )
    assert words[words.index("--rollout-engine") + 1] == "embedded" and words[-2:] == ["--lr", "1e-5"]
    assert any(re.fullmatch(r"--output=.*/run/logs/trainer-%n-%N\.log", word) for word in words)
    assert not any(word.startswith("--container") for word in words)


def test_servers_take_the_last_nodes_and_are_checked_before_the_trainer(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = job.run("n1,n2,n3,n4", SERVER_NODES="2")
    assert done.returncode == 0, done.stderr
    steps = job.steps()
    assert [*steps] == ["check_node", "serve_node", "check_servers", "pretrain_rasft"]
    assert "--nodelist=n3,n4" in steps["check_node"], "the trainer's nodes are checked before"
    assert steps["check_node"][-1] == "8"
    assert "--nodelist=n3,n4" in steps["serve_node"] and "--kill-on-bad-exit=0" in steps["serve_node"]
    assert {"--nodelist=n1", "--nodes=1", "--ntasks=1"} <= {*steps["check_servers"]}
    assert "--nodelist=n1,n2" in steps["pretrain_rasft"] and "sglang" in steps["pretrain_rasft"]


def test_cpu_is_a_flag_of_the_server_and_not_of_sglang(tmp_path: Path) -> None:
    job = Job(tmp_path)
    more = "--ready-s 60 -- --mem-fraction-static 0.8"
    done = job.run("n1,n2,n3", SERVER_NODES="1", NUM_SIGNED_ON="2", CPU="1", MORE=more)
    assert done.returncode == 0, done.stderr
    words = job.steps()["serve_node"]
    assert words.index("--cpu") < words.index("--") and words[-2:] == ["--mem-fraction-static", "0.8"]


def test_groups_of_a_heterogeneous_job_train_and_serve_in_their_images(tmp_path: Path) -> None:
    job = Job(tmp_path)
    groups = {"SLURM_JOB_NODELIST_HET_GROUP_0": "a1,a2", "SLURM_JOB_NODELIST_HET_GROUP_1": "b1"}
    images = {"CONTAINER": "/images/nemo.sqsh", "SERVER_CONTAINER": "/images/sglang.sqsh", "MOUNTS": "/d:/d"}
    done = job.run("a1,a2", SERVER_NODES="1", NUM_SIGNED_ON="2", **groups, **images)
    assert done.returncode == 0, done.stderr
    trainer, servers = job.steps()["pretrain_rasft"], job.steps()["serve_node"]
    assert {"--het-group=0", "--nodelist=a1,a2", "--container-image=/images/nemo.sqsh"} <= {*trainer}
    assert {"--het-group=1", "--nodelist=b1", "--container-image=/images/sglang.sqsh"} <= {*servers}
    assert "--container-mounts=/d:/d" in trainer and f"--container-workdir={ROOT}" in trainer


END = 1796083200
"""2026-12-01T00:00:00 in UTC, the end of the stand-in's allocation, seconds."""


SQUEUE = pytest.mark.parametrize(
    ("squeue", "end"),
    [
        ({}, END),
        ({"SQUEUE_ANSWER": "", "SQUEUE_CODE": "1"}, END + 7),  # fails
        ({"SQUEUE_ANSWER": " "}, END + 7),
        ({"SQUEUE_ANSWER": "N/A"}, END + 7),
    ],
    ids=str,
)


@SQUEUE
def test_trainer_gets_slurms_own_times_if_squeue_gives_none(
    tmp_path: Path, squeue: dict[str, str], end: int
) -> None:
    note = FINISHED + '; echo "$SLURM_JOB_START_TIME $SLURM_JOB_END_TIME" >"$CALLS/times"'
    given = {"SLURM_JOB_START_TIME": str(END + 7), "SLURM_JOB_END_TIME": str(END + 7)}
    done = Job(tmp_path).run("n1,n2", TRAINER=note, **given, **squeue)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "times").read_text().split() == [str(end)] * 2


@SQUEUE
@pytest.mark.parametrize("script", ARRAYS, ids=lambda path: path.stem)
def test_array_gets_slurms_own_end_if_squeue_gives_none(
    tmp_path: Path, script: Path, squeue: dict[str, str], end: int
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$SLURM_JOB_END_TIME"\n', encoding="utf-8")
    python.chmod(0o755)
    names = ("MODEL", "TRAIN_DATA", "HELDOUT_DATA", "EVALUATION_DATA", "OUTPUT")
    given = {"SLURM_JOB_ID": "1234", "SLURM_JOB_END_TIME": str(END + 7), "PYTHON": str(python), "TZ": "UTC"}
    path = f"{stand_ins(tmp_path / 'bin')}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script)],
        env={"PATH": path, **dict.fromkeys(names, "x"), **given, **squeue},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{end}\n"), done.stderr


@pytest.mark.parametrize(
    ("trainer", "code", "variables", "is_requeued"),
    [
        (SAVED, "0", {}, True),  # stopped
        (SAVED, "1", {}, True),  # failed after progress
        ("", "1", {}, False),  # failed at once, for example because of a wrong flag
        ("", "0", {"SLURM_RESTART_COUNT": "1"}, True),  # stopped before its first step
        ("", "0", {"SLURM_RESTART_COUNT": "9"}, True),  # the earlier starts made progress
    ],
)
def test_job_goes_on_only_after_progress(
    tmp_path: Path, trainer: str, code: str, variables: dict[str, str], is_requeued: bool
) -> None:
    job = Job(tmp_path)
    done = job.run("n1,n2", TRAINER=trainer, TRAINER_CODE=code, **variables)
    assert done.returncode == int(code) and job.is_requeued == is_requeued, done.stdout


def test_signal_to_the_script_is_passed_on_and_the_trainers_code_counts(tmp_path: Path) -> None:
    job = Job(tmp_path)
    stops = 'kill -TERM $PPID; until [ -e "$CALLS/passed_on" ]; do sleep 0.1; done; sleep 0.5; '
    done = job.run("n1,n2", TRAINER=stops + SAVED, TRAINER_CODE="3")
    assert done.returncode == 3 and job.is_requeued, done.stderr
    assert (tmp_path / "cancelled").read_text().split() == ["--signal=TERM", "1234"]


def test_job_that_stops_four_times_at_one_checkpoint_fails(tmp_path: Path) -> None:
    job = Job(tmp_path)
    saved_once = [SAVED if start == 1 else "" for start in range(6)]
    codes = [
        job.run("n1,n2", TRAINER=trainer, SLURM_RESTART_COUNT=str(start)).returncode
        for start, trainer in enumerate(saved_once)
    ]
    assert codes == [0, 0, 0, 0, 0, 1]
    assert (tmp_path / "requeued").read_text().split() == ["1234"] * 5
    assert job.run("n1,n2", TRAINER="").returncode == 0, "a job that is submitted again"


@pytest.mark.parametrize(
    ("nodes", "variables", "named"),
    [
        ("n1,n2,n3", {}, "--nodes=2"),
        ("n1", {}, "--nodes=2"),
        ("n1,n2", {"SICK": "nodelist=n1,n2"}, "health"),
        ("n1,n2,n3", {"SICK": "nodelist=n3", "SERVER_NODES": "1"}, "health"),
        ("n1,n2,n3", {"SERVER_NODES": "1", "NUM_SIGNED_ON": "1", "SERVERS_READY_S": "0"}, "of 2 servers"),
        (
            "n1,n2,n3",
            {"SERVER_NODES": "1", "NUM_SIGNED_ON": "1", "GIVEN_UP": "server 1 of n3"},
            "server 1 of n3",
        ),
        ("n1,n2", {"RUN": ""}, "RUN"),
    ],
)
def test_fault_ends_the_job_before_the_trainer(
    tmp_path: Path, nodes: str, variables: dict[str, str], named: str
) -> None:
    job = Job(tmp_path)
    done = job.run(nodes, **variables)
    assert done.returncode == 1 and named in done.stderr
    assert not (tmp_path / "srun").exists() or "pretrain_rasft" not in job.steps()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean_for_shellcheck() -> None:
    files = [str(path) for path in (*FOLDER.glob("*.s*"), *FOLDER.glob("settings/*.sh"))]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
