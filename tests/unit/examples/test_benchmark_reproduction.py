"""Commands of the settings parse, job arrays reach every task, and tables hold the right numbers."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmark_reproduction import comparison, preloading, records, reproduce
from megatron_rasft.errors import RasftError
from megatron_rasft.tools.evaluation.statistics import bootstrap_interval, paired_interval
from tests.forking import call_on_ranks
from tests.tiny_policy import write_model
from tools import evaluate

FOLDER = Path(reproduce.__file__).parent
SETTINGS = sorted((FOLDER / "settings").glob("*.toml"))
SCRIPTS = sorted((FOLDER / "slurm").glob("*.sbatch"))


VARIANT = 'title = "t"\nmodel = "m"\nseeds = [1]\n[train]\n[evaluate]\n[variants.{}]\nof = "{}"'


@pytest.fixture
def users_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables of the settings: a model that 8 ranks can share, and files."""
    model = write_model(tmp_path / "model", max_position_embeddings=8192)
    for name in ("MODEL", "TRAIN_DATA", "HELDOUT_DATA", "EVALUATION_DATA", "DATA"):
        monkeypatch.setenv(name, str(model if name == "MODEL" else tmp_path / f"{name.lower()}.jsonl"))


def _parse_jobs(rank: int, folder: str) -> None:
    """Reads the command lines in jobs.json as the programs do, and writes the important values to parsed.json."""
    from megatron_rasft.training import startup

    os.environ["RANK"] = "0"
    parsed = []
    for world_size, flags in json.loads(Path(folder, "jobs.json").read_text()):
        os.environ["WORLD_SIZE"] = world_size
        args, config, _ = startup.parse(flags, needs_data=False)
        found = {"objective": config.objective.name, "train_data": args.train_data}
        found["prompt"] = [config.data.data_system_prompt, config.data.data_prompt_suffix]
        found["seeds"] = [args.seed, config.data.data_seed, config.rollout.rollout_seed]
        parsed.append(found)
    Path(folder, "parsed.json").write_text(json.dumps(parsed))


@pytest.mark.usefixtures("users_files")
def test_every_command_of_every_setting_parses(tmp_path: Path) -> None:
    """The programs' own parsers read the commands, without building a model. Most settings are tested with two methods."""
    jobs: list[tuple[str, list[str]]] = []
    expected = []
    for path in SETTINGS:
        setting = reproduce.read_setting(path)
        methods = [m for m in setting.methods if path.stem == "cpu" or m in ("rasft", "grpo")]
        methods += setting.variants
        for task in (reproduce.Task(method, setting.seeds[-1]) for method in methods):
            output = Path("/nowhere") / task.name
            command = reproduce.evaluation_command(setting, task, output)
            program = command.index(str(reproduce.ROOT / "tools" / "evaluate.py"))
            args, megatron_flags = evaluate.build_parser().parse_known_args(command[program + 1 :])
            evaluate.EvaluationConfig.from_args(args)
            world_size = str(setting.num_processes)
            job = (world_size, ["--hf-model", os.environ["MODEL"], *megatron_flags])
            if job not in jobs:  # the methods of a setting are evaluated with the same flags
                jobs.append(job)
                expected.append(None)
            if task.method == "base":
                continue
            command = reproduce.training_command(setting, task, output)
            flags = command[command.index(str(reproduce.ROOT / "pretrain_rasft.py")) + 1 :]
            flags[flags.index("--hf-model") + 1] = os.environ["MODEL"]
            jobs.append((world_size, flags))
            expected.append((task, [args.system_prompt, args.prompt_suffix]))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    call_on_ranks(_parse_jobs, tmp_path, 1)
    parsed = json.loads((tmp_path / "parsed.json").read_text())
    for found, wanted in zip(parsed, expected, strict=True):
        if wanted is None:
            continue
        task, prompt = wanted
        objective = "rasft" if task.method.startswith("rasft") else task.method
        assert found["objective"] == objective
        assert found["train_data"] and found["seeds"] == [task.seed] * 3
        assert found["prompt"] == prompt, "training and evaluation use the same prompt"


def test_gpu_setting_runs_its_methods_on_the_same_data_steps_and_learning_rate() -> None:
    assert len(SETTINGS) == 7 and len(SCRIPTS) == 4 and len(reproduce.METHODS) == 12
    os.environ.setdefault("DATA", "/data")
    setting = reproduce.read_setting(FOLDER / "settings" / "gpu.toml")
    assert setting.methods == ["base", "sft", "dft", "raft", "grpo", "rasft"]
    assert len(setting.seeds) == 3
    commands = [
        reproduce.training_command(setting, reproduce.Task(m, 1), Path("out")) for m in setting.methods[1:]
    ]
    shared = set.intersection(*map(set, commands))
    for flag in ("--train-data", "--train-iters", "--lr", "--global-batch-size", "--seed"):
        assert flag in shared
        assert len({command[command.index(flag) + 1] for command in commands}) == 1


def test_variant_differs_from_its_method_in_its_own_flags_only() -> None:
    setting = reproduce.read_setting(FOLDER / "settings" / "cpu.toml")
    assert not set(setting.variants) & set(setting.methods), "variants run only if --methods names them"
    for name, changed in setting.variants.items():
        method, flag = changed["of"], next(key for key in changed if key != "of")
        variant, plain = (
            reproduce.training_flags(setting, reproduce.Task(m, 2), Path()) for m in (name, method)
        )
        assert variant[variant.index(flag) + 1] == str(changed[flag])
        added = [word for key, value in changed.items() if key != "of" for word in (key, str(value))]
        assert [word for word in variant if word not in added] == plain


def flag_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_a_variant_may_begin_with_the_model_of_another_training(tmp_path: Path) -> None:
    first = {"of": "sft", "--train-iters": 3, "--lr": 0.5}
    variants = {"sft_grpo": {"of": "grpo", "--train-iters": 4, "after": first}}
    train = {"--train-iters": 7, "--lr": 0.25}
    setting = reproduce.Setting(
        title="t", model="base", seeds=[2], train=train, evaluate={}, methods=["sft_grpo"], variants=variants
    )
    (task,) = reproduce.tasks_of(setting)
    sft, grpo, *_ = reproduce.commands_of(setting, [task], tmp_path)
    output = tmp_path / task.name
    for command, expected in {
        tuple(sft): ("base", str(output / "first"), "3", "0.5", "sft"),
        tuple(grpo): (str(output / "first"), str(output / "model"), "4", "0.25", "grpo"),
    }.items():
        flags = ("--hf-model", "--export-hf", "--train-iters", "--lr", "--objective")
        assert tuple(flag_of(list(command), flag) for flag in flags) == expected
        assert flag_of(list(command), "--rasft-metrics") == str(output / "metrics.jsonl"), (
            "tokens of both add up"
        )
    assert {"first training", "training"} <= set(reproduce.record_of(setting, task)["flags"])
    with pytest.raises(ValueError, match="'sfft'"):
        dataclasses.replace(setting, methods=["x"], variants={"x": {"of": "grpo", "after": {"of": "sfft"}}})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("users_files")
def test_job_array_reaches_every_task_once(script: Path, tmp_path: Path) -> None:
    setting = reproduce.read_setting(FOLDER / "settings" / f"{script.stem}.toml")
    text = script.read_text(encoding="utf-8")
    last = len(reproduce.tasks_of(setting)) - 1
    assert f"#SBATCH --array=0-{last}\n" in text
    environment = {
        **os.environ,
        "OUTPUT": str(tmp_path),
        "PYTHON": sys.executable,
        "SLURM_ARRAY_TASK_ID": str(last),
    }
    command = ["bash", str(script), "--dry-run"]
    done = subprocess.run(
        command, cwd=reproduce.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    training, evaluation = map(shlex.split, done.stdout.splitlines())
    assert training[training.index("--heldout-data") + 1] == os.environ["HELDOUT_DATA"], (
        "the plots need held-out data"
    )
    assert training[training.index("--nproc-per-node") + 1] == "8"
    assert training[training.index("--save-interval") + 1] == "32", "it must go on after the time limit"
    assert "published" in training and evaluation[evaluation.index("--label") + 1] == "rasft_published-seed3"
    environment.pop("MODEL")
    done = subprocess.run(
        command, cwd=reproduce.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "MODEL" in done.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("title = 1", "model"),
        ("title =", "wrong.toml"),
        ('title = "t"\nmodel = "$NOT_SET"\nseeds = [1]\n[train]\n[evaluate]', "$NOT_SET"),
        ('title = "t"\nmodel = "m"\nseeds = []\n[train]\n[evaluate]', "seeds"),
        ('title = "t"\nmodel = "m"\nseeds = [1]\nmethods = ["sfft"]\n[train]\n[evaluate]', "sfft"),
        (VARIANT.format("mine", "rasftt"), "'rasftt'"),
        (VARIANT.format("mine", "base"), "base"),
        (VARIANT.format("sft", "rasft"), "variants"),
        (VARIANT.replace("of", "base").format("mine", "rasft"), "'None'"),
    ],
)
def test_wrong_setting_is_named_in_one_line(
    content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    assert reproduce.main(["--setting", str(path), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and named in printed and str(path) in printed


def write_run(folder: Path, scores: list[float], tokens: int = 0) -> Path:
    """Writes the files of an evaluation and a training with these numbers."""
    values = {
        "name": "own", "title": "own", "kind": "math", "num_problems": len(scores), "num_rows": len(scores),
        "num_samples": 4, "is_verified": False, "sha256": "", "accuracy": sum(scores) / len(scores),
        "accuracy_low": 0.0, "accuracy_high": 1.0, "pass_at": {}, "majority_at": {}, "truncated_frac": 0.25,
        "mean_tokens": 10.0, "problem_ids": [str(i) for i in range(len(scores))], "scores": scores,
    }  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "summary.json").write_text(json.dumps({"label": "x", "benchmarks": [values]}))
    if tokens:
        records = [
            {"event": "refresh", "step": 0, "heldout/solve_rate": 0.1},
            {"event": "refresh", "step": 0, "rollout/num_rollouts": 8, "rollout/response_tokens_mean": 5.0, "rollout/generate_s": 2.0},
            {"event": "step", "step": 1, "training/num_tokens": tokens, "training/step_s": 1.5},
            {"event": "step", "step": 2, "training/num_tokens": tokens, "training/step_s": 1.5},
            {"event": "refresh", "step": 2, "heldout/solve_rate": 0.3},
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "done").write_text(json.dumps({"commit": ""}))
    return folder


def test_table_holds_means_intervals_and_paired_differences(tmp_path: Path) -> None:
    sft, rasft = (
        [[0.0, 0.5, 0.5, 1.0], [0.25, 0.5, 0.5, 0.75]],
        [[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 1.0, 1.0]],
    )
    runs = {("base", 1): write_run(tmp_path / "base", [0.0, 0.0, 0.5, 0.5])}
    for method, scores in (("sft", sft), ("rasft", rasft)):
        for seed, row in enumerate(scores, start=1):
            runs[method, seed] = write_run(tmp_path / f"{method}-seed{seed}", row, tokens=100)
    runs["dft", 1] = tmp_path / "dft-seed1"  # not finished
    text = comparison.write_comparison("title", runs, tmp_path, "Qwen2.5-Math-1.5B", num_jobs=6)
    rows = {row["method"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    assert rows["rasft"]["accuracy"] == pytest.approx(75.0) and rows["sft"]["accuracy"] == pytest.approx(50.0)
    low, high = bootstrap_interval(rasft)
    assert (rows["rasft"]["low"], rows["rasft"]["high"]) == pytest.approx((100 * low, 100 * high))
    low, high = paired_interval(rasft, sft, pairs_seeds=True)
    assert rows["rasft"]["difference"] == pytest.approx(25.0)
    assert rows["rasft"]["difference_low"] == pytest.approx(100 * low)
    assert rows["rasft"]["difference_high"] == pytest.approx(100 * high)
    assert rows["rasft"]["trained_tokens"] == 200 and rows["rasft"]["generated_tokens"] == 40
    assert rows["rasft"]["seconds"] == 5.0 and rows["base"]["steps"] == 0
    assert "dft-seed1" in text and "64.89" in text and "No plots" not in text
    assert "6 trainings" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "comparison.csv").read_text().count("\n") == 4
    text = comparison.write_comparison("title", runs, tmp_path, reference="rasft")
    rows = {row["method"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    assert rows["sft"]["difference"] == pytest.approx(-25.0) and rows["rasft"]["difference"] == ""
    assert "| difference from rasft |" in text


def test_interval_of_a_difference_covers_seeds_and_pairs_them_by_number(tmp_path: Path) -> None:
    """Base has one seed, dft lacks a seed, and iw_sft has the seeds of sft in another order."""
    runs = {("base", 1): write_run(tmp_path / "base", [0.2] * 9)}
    means = {
        "sft": {1: 0.15, 2: 0.30, 3: 0.45},
        "dft": {1: 0.15, 2: 0.30},
        "iw_sft": {3: 0.55, 1: 0.25, 2: 0.40},
    }
    for method, by_seed in means.items():
        for seed, mean in by_seed.items():
            runs[method, seed] = write_run(tmp_path / f"{method}{seed}", [mean] * 9)
    text = comparison.write_comparison("title", runs, tmp_path)
    assert "--heldout-data" in text and not (tmp_path / "accuracy.png").exists()
    rows = {row["method"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    low, high = (rows["base"][f"difference_{bound}"] for bound in ("low", "high"))
    assert (low, high) == pytest.approx((-25.0, 5.0))
    assert rows["dft"]["difference_high"] - rows["dft"]["difference_low"] > 20
    assert rows["iw_sft"]["difference_low"] == pytest.approx(rows["iw_sft"]["difference_high"]) == 10.0


class Workplace:
    """A setting of two methods. Stand-ins write the files of the real programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.begun = folder, []
        self.data = folder / "train.jsonl"
        self.data.write_text("a row")
        monkeypatch.setattr(reproduce, "run_logged", self.run_logged)
        monkeypatch.setattr(records, "current_commit", lambda: "first")
        self.fails_in = ""
        self.is_stopped = False

    def run_logged(self, setting: object, command: list[str], log: Path) -> None:
        self.begun.append(f"{log.parent.name} {log.stem}")
        if log.stem == self.fails_in:
            raise RasftError("killed")
        if self.is_stopped:
            (log.parent / "checkpoints").mkdir()
            (log.parent / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")
            (log.parent / "metrics.jsonl").write_text(json.dumps({"event": "kept"}) + "\n")
        elif log.stem == "training":
            (log.parent / "model").mkdir()
            (log.parent / "model" / "config.json").touch()
        else:
            write_run(log.parent, [0.5]).joinpath("done").unlink()

    def run(self, *more: str, lr: str = "3e-5", limit: int = 9) -> int:
        self.begun.clear()
        setting = self.folder / "setting.toml"
        setting.write_text(
            f'title = "t"\nmodel = "m"\nseeds = [1]\nsave_interval = 2\nmethods = ["base", "sft"]\n[train]\n--train-data = "{self.data}"\n'
            f"--lr = {lr}\n[evaluate]\n--limit = {limit}\n"
        )
        return reproduce.main(["--setting", str(setting), "--output", str(self.folder / "out"), *more])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return Workplace(tmp_path, monkeypatch)


def test_results_of_other_flags_or_data_are_refused(
    workplace: Workplace, capsys: pytest.CaptureFixture
) -> None:
    assert workplace.run() == 0 and len(workplace.begun) == 3
    assert workplace.run() == 0 and not workplace.begun
    assert workplace.run("--seeds", "2") == 0 and len(workplace.begun) == 2, "base is there"
    capsys.readouterr()
    for wrong, named in (
        ({"lr": "1e-4"}, ("sft-seed1", "--lr 3e-05", "--lr 0.0001")),
        ({"limit": 8}, ("base", "--limit 9", "--limit 8")),
    ):
        for more in ([], ["--tables-only"]):
            assert workplace.run(*more, **wrong) == 2
            printed = capsys.readouterr().err
            assert printed.count("\n") == 1 and all(text in printed for text in named)
    workplace.data.write_text("another row")
    assert workplace.run() == 2 and not workplace.begun
    assert str(workplace.data) in capsys.readouterr().err


def test_failed_training_starts_again_with_other_flags_but_its_weights_are_evaluated_with_the_same_only(
    workplace: Workplace, capsys: pytest.CaptureFixture
) -> None:
    workplace.fails_in = "training"
    assert workplace.run("--methods", "sft") == 1
    workplace.fails_in = "evaluation"
    assert workplace.run("--methods", "sft", lr="1e-4") == 1
    workplace.fails_in = ""
    assert workplace.run("--methods", "sft") == 2
    printed = capsys.readouterr().err
    assert "--lr 0.0001" in printed and "--lr 3e-05" in printed
    assert workplace.run("--methods", "sft", lr="1e-4") == 0 and workplace.begun == ["sft-seed1 evaluation"]


def test_stopped_training_goes_on_with_the_same_flags_and_leaves_no_checkpoints(
    workplace: Workplace, capsys: pytest.CaptureFixture
) -> None:
    workplace.is_stopped = True
    assert workplace.run("--methods", "sft") == 0 and workplace.begun == ["sft-seed1 training"]
    assert "sft-seed1" in capsys.readouterr().out
    folder = workplace.folder / "out" / "sft-seed1"
    workplace.is_stopped = False
    assert workplace.run("--methods", "sft", lr="1e-4") == 2 and not workplace.begun
    written = (folder / "metrics.jsonl").read_text()
    assert "kept" in written
    assert workplace.run("--methods", "sft") == 0
    assert workplace.begun == ["sft-seed1 training", "sft-seed1 evaluation"]
    assert (folder / "done").exists() and not (folder / "checkpoints").exists()


@pytest.mark.parametrize("interval", [3, 32])
def test_megatron_accepts_the_checkpoints_of_any_interval(interval: int, tmp_path: Path) -> None:
    setting = reproduce.Setting(
        title="t", model="m", seeds=[1], train={}, evaluate={}, save_interval=interval
    )
    flags = reproduce.training_flags(setting, reproduce.Task("sft", 1), tmp_path)
    assert int(flags[flags.index("--save-retain-interval") + 1]) % interval == 0


def test_table_lists_results_of_different_commits(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert workplace.run() == 0 and "commits" not in capsys.readouterr().out
    monkeypatch.setattr(records, "current_commit", lambda: "second")
    assert workplace.run("--tables-only", "--against", "rasft") == 2
    assert "--against" in capsys.readouterr().err
    assert workplace.run("--seeds", "1", "2") == 0
    assert "first: base, sft-seed1; second: sft-seed2" in capsys.readouterr().out


def test_curve_counts_tokens_and_seconds_up_to_each_measurement(tmp_path: Path) -> None:
    curve = comparison.read_curve(write_run(tmp_path / "run", [1.0], tokens=7) / "metrics.jsonl")
    assert (curve.steps, curve.tokens, curve.seconds) == ([0, 2], [0, 14], [0, 5.0])
    assert curve.accuracy == pytest.approx([10.0, 30.0])


def test_seeds_on_other_problems_are_refused(tmp_path: Path) -> None:
    runs = {("sft", n): write_run(tmp_path / str(n), [0.5] * n) for n in (1, 2)}
    with pytest.raises(RasftError, match="sft"):
        comparison.write_comparison("title", runs, tmp_path)


def test_a_preloaded_program_has_its_arguments_log_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloading, "IMPORTS", "json")
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(
        "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit(int(sys.argv[1]))\n"
    )
    log.write_text("of an earlier attempt, and longer than the output of this one")
    assert preloading.run_program(program, ["3", "a b"], log) == 3
    assert log.read_text() == "['3', 'a b']\n"
    program.write_text("raise ValueError('no such file')\n")
    assert preloading.run_program(program, [], log) == 1
    assert log.read_text().strip().splitlines()[-1] == "ValueError: no such file"


def test_a_flag_may_contain_the_seed(tmp_path: Path) -> None:
    setting = dataclasses.replace(
        reproduce.read_setting(FOLDER / "settings" / "ci.toml"), train={"--train-data": "rows-{seed}.jsonl"}
    )
    flags = reproduce.training_flags(setting, reproduce.Task("sft", 7), tmp_path)
    assert flags[flags.index("--train-data") + 1] == "rows-7.jsonl"


def test_preloading_is_for_one_process(tmp_path: Path) -> None:
    path = tmp_path / "setting.toml"
    path.write_text(
        'title = "t"\nmodel = "m"\nseeds = [1]\npreload = true\nnum_processes = 2\n[train]\n[evaluate]\n'
    )
    with pytest.raises(ValueError, match="num_processes"):
        reproduce.read_setting(path)
