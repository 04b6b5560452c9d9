"""Every command of the README and its siblings runs unchanged, or with few changes for a small machine."""

import itertools
import re
import resource
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from examples.quickstart import quickstart
from tests.functional import launching
from tests.functional.conftest import SHORT_ANSWERS, Workshop
from tests.unit.tools.report.reading import Page

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])

FIRST_RUN = "torchrun --nproc-per-node 8 pretrain_rasft.py --hf-model DIR"
FIRST_CPU_RUN = ".venv/bin/python pretrain_rasft.py --hf-model .cache/smollm2-135m-instruct"
RUN_BY = {
    "make quickstart": "test_quickstart_ends_with_a_model_and_its_solve_rates",
    "make quickstart ARGS=--compare": "test_quickstart_compares_objectives",
    "make test": "continuous integration, which is this command",
    "make venv": "make test",
    "make docs": "test_every_document_is_a_page_of_the_navigation",
    "make mutants": "it takes an hour, and runs every night",
    "make PYTHON=/path/to/python3.12 ...": "test_interpreter_that_is_too_old_is_refused",
    "pip install --no-build-isolation -e '.[te]'": "test_extras_that_the_documents_name_exist",
    "make slurm-night": "it takes ten minutes, and runs every night",
    "python -m tests.slurm.cluster": "tests/slurm, which starts the same cluster",
    ".venv/bin/pytest -m gpu": "test_tests_that_continuous_integration_cannot_run_are_collected",
    "python -m pytest -m bridge": "test_tests_that_continuous_integration_cannot_run_are_collected",
    ".venv-bridge/bin/python -m pytest -m bridge": "test_tests_that_continuous_integration_cannot_run_are_collected",
    "make bridge": "make test",
    ".venv-bridge/bin/python -m torch.distributed.run": "test_two_steps_train_on_demonstrations_and_rollouts",
    ".venv/bin/pre-commit install": "test_pre_commit_takes_its_configuration",
    "pip install 'megatron-rasft[code]'": "test_extras_that_the_documents_name_exist",
    "pip install 'megatron-rasft[delta]'": "test_extras_that_the_documents_name_exist",
    FIRST_RUN: "test_first_real_run_starts_as_the_readme_says",
    FIRST_CPU_RUN: "test_first_run_on_a_cpu_starts_as_the_readme_says",
    "python pretrain_rasft.py --hf-model DIR": "test_tutorial_goes_from_own_data_to_an_evaluated_model",
    "python -m tools.site_building.pictures": "test_pictures_show_the_weights_of_the_method",
    "sbatch runs/first/rasft.sbatch": "test_run_that_plan_wrote_finishes_and_ends_at_once_when_submitted_again",
    "sbatch --signal=B:TERM@300": "test_disturbed_run_equals_the_undisturbed_one",
    "MODEL=": "test_disturbed_run_equals_the_undisturbed_one",
    "make wheel": "tests/unit/test_wheel.py, which builds the same wheel",
    "make sbom": "it fetches a package, and its list depends on the machine",
    "pip install 'megatron_rasft-0.1.0-py3-none-any.whl[": "test_every_script_of_the_wheel_prints_its_help",
    "rasft-": "test_every_script_of_the_wheel_prints_its_help",
    "torchrun --nproc-per-node 8 -m pretrain_rasft": "test_every_script_of_the_wheel_prints_its_help",
    "torchrun --nproc-per-node 8 pretrain_rasft.py --config examples/recipes": "test_recipe_fits_its_gpus_and_gives_a_run_this_layout",
    "tools/evaluate.py run --config FILE": "test_flags_in_a_file",
    "make servers": "make test",
    "make emulated-gpu": "make test",
    "make gpu-check": "test_the_program_itself_finds_no_gpu_here",
    "make gpu-bundle": "test_wheels_are_downloaded_once",
    "python tools/gpu_check.py": "test_the_program_itself_finds_no_gpu_here",
    "python install.py --target DIR": "test_bundle_is_cut_carried_joined_and_installed",
    "pip wheel --no-deps --no-build-isolation": "docs/gpu.md says it of another machine",
    "tools/serve_rollouts.py --model": "test_a_tensor_parallel_server_is_started_checked_and_stopped",
    "tools/check_servers.py --hf-model": "test_a_tensor_parallel_server_is_started_checked_and_stopped",
    "torchrun ... pretrain_rasft.py --hf-model DIR --rollout-engine sglang": "test_run_samples_from_a_server_with_its_own_weights",
    "python tools/convert_checkpoint.py hf-to-megatron": "test_there_and_back_with_proof",
    "python tools/convert_checkpoint.py megatron-to-hf": "test_there_and_back_with_proof",
    "python tools/report.py": "test_page_of_a_run_has_its_curves_settings_and_texts",
    "python tools/plan.py": "test_document_shows_what_the_tool_prints",
    "python tools/evaluate.py run --model": "test_samples_are_graded_and_tabulated",
    "python tools/evaluate.py run --checkpoint": "test_checkpoint_on_two_ranks_gives_the_samples_of_its_exported_folder",
    "torchrun --nproc-per-node 8 tools/evaluate.py": "test_checkpoint_on_two_ranks_gives_the_samples_of_its_exported_folder",
    "python tools/evaluate.py run --server": "test_server_gives_the_same_samples_as_its_folder",
    "python tools/evaluate.py show": "test_samples_are_graded_and_tabulated",
    "python tools/evaluate.py table": "test_samples_are_graded_and_tabulated",
    "python tools/prepare_data.py validate": "test_overlong_rows_fail_only_where_they_are_refused",
    "tools/prepare_data.py validate": "test_runs_as_a_script_from_any_folder",
    "python tools/prepare_data.py convert": "test_convert_renames_fields_and_leaves_out_rows_that_fail_their_answer",
    "python tools/prepare_data.py inspect": "test_inspect_prints_one_row_plainly_when_not_on_a_terminal",
    "python -m tests.published_groups": "test_random_groups_have_the_weights_of_the_second_implementation",
    "python solution.py": "test_scripts_behave_as_under_plain_python",
    "python tools/prepare_data.py --decontaminate": "test_tool_reports_and_writes_the_rows_that_stay",
    "python benchmarks/planned_memory.py": "test_fullest_rank_holds_what_is_calculated",
    "python benchmarks/cluster_simulation.py": "test_table_and_plot_are_made",
    "python benchmarks/kill_and_resume.py": "test_rounds_are_counted_and_continued",
    "python benchmarks/host_work.py": "test_a_refresh_is_measured_on_two_ranks",
    "python benchmarks/data_start.py": "test_a_start_is_measured_without_and_with_the_cache",
    "python benchmarks/logprobs.py": "test_fused_logprobs_stay_under_the_bar_and_plain_ones_do_not",
    "python benchmarks/code_verification.py": "test_benchmark_of_code_verification_runs",
    "python examples/benchmark_reproduction/reproduce.py": "test_one_command_trains_evaluates_and_compares",
    "python examples/proving_ground/run.py": "test_a_study_runs_and_goes_on",
    "python examples/own_verifier/make_orders.py": "test_commands_of_the_readme_write_rows_whose_responses_are_correct",
    "torchrun --nproc-per-node 1 pretrain_rasft.py --hf-model DIR --train-data runs/orders": "test_example_grades_a_run_and_changed_code_is_said_when_it_resumes",
    ".venv/bin/python examples/minimal/rasft.py": "test_losses_are_those_of_the_method_in_one_file",
    "sbatch --nodes=8 : --nodes=4": "test_killed_server_of_a_heterogeneous_job_rejoins_the_run",
    "sbatch --no-requeue": "test_disturbed_run_equals_the_undisturbed_one",
    "sbatch --exclude=NODE": "docs/cluster.md says it of another machine",
    "tools/plan.py --rollout-gpus 0": "test_smallest_machines_are_those_of_capacity_planning",
    "tools/plan.py --config": "test_plan_reads_the_run_of_a_recipe",
    "tools/plan.py --slurm": "test_run_that_plan_wrote_finishes_and_ends_at_once_when_submitted_again",
    "pip install py-spy": "test_process_that_holds_pythons_lock_shows_its_stack",
    "python -c pass": "test_benchmark_of_code_verification_runs",
}
"""Beginning of a command -> the test that runs it, here or in another file."""

_COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(make|torchrun|rasft-[a-z-]+|python\d?|pip|\.venv(-bridge)?/bin/\S+|tools/\S+|examples/\S+\.sh|sbatch|bash) "
)


def commands(document: Path) -> Iterator[str]:
    """Returns the commands in a document's indented blocks and in backticks, with continued lines joined."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    for line in itertools.chain(blocks, re.findall(r"`([^`\n]+)`", text)):
        command = re.split(r" {3,}(?=[a-z])", line.strip())[0]
        if _COMMAND.match(command):
            yield re.sub(r"\s+", " ", command)


def test_every_documented_command_is_run_by_a_test() -> None:
    found = {command: document.name for document in DOCUMENTS for command in commands(document)}
    unknown = {c: d for c, d in found.items() if not any(c.startswith(known) for known in RUN_BY)}
    assert not unknown, "no test runs these"
    gone = [known for known in RUN_BY if not any(c.startswith(known) for c in found)]
    assert not gone, "no document has these any more"
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {name for name in RUN_BY.values() if name.startswith("test_")}
    assert tests <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))


def test_documented_targets_of_make_have_rules() -> None:
    """make takes a phony target without a rule for done."""
    found = [command.split() for document in DOCUMENTS for command in commands(document)]
    targets = {words[1] for words in found if words[0] == "make" and "=" not in words[1]}
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"docs", "test", "wheel"} <= targets <= rules


def small_run(beginning: str, workshop: Workshop, folder: Path) -> list[str]:
    """The README's own flags of a run, with small sizes appended, because the last value of a flag counts."""
    command = next(c for c in commands(ROOT / "README.md") if c.startswith(beginning))
    names = dict.fromkeys(("DIR", ".cache/smollm2-135m-instruct"), str(workshop.policy))
    names |= dict.fromkeys(("train.jsonl", ".cache/quickstart/data/train.jsonl"), str(workshop.sums))
    words = shlex.split(command)
    flags = [names.get(word, word) for word in words[words.index("pretrain_rasft.py") + 1 :]]
    flags += f"--save {folder}/save --export-hf {folder}/hf --train-iters 1 --seq-length 64".split()
    return [
        *flags,
        *"--lr-warmup-iters 0 --global-batch-size 8 --rollout-max-new-tokens 12".split(),
        *SHORT_ANSWERS,
    ]


def test_first_real_run_starts_as_the_readme_says(workshop: Workshop, tmp_path: Path) -> None:
    """On two processes. tests/emulated_gpu/test_start.py runs the same command under torchrun."""
    outcome = launching.succeed(tmp_path / "logs", small_run(FIRST_RUN, workshop, tmp_path), 2)
    assert "step 1/1" in outcome.output and "tp 2" in outcome.output
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_first_run_on_a_cpu_starts_as_the_readme_says(workshop: Workshop, tmp_path: Path) -> None:
    flags = small_run(FIRST_CPU_RUN, workshop, tmp_path)
    outcome = launching.run(tmp_path / "logs", flags, has_launcher=False)
    assert outcome.codes == [0], outcome.output
    assert "step 1/1" in outcome.output
    transformers.AutoConfig.from_pretrained(tmp_path / "hf")


SMALLER = {
    "tools/prepare_data.py": "",
    "pretrain_rasft.py": "--train-iters 1 --global-batch-size 8 --lr-warmup-iters 0 --seq-length 64 --rollout-max-new-tokens 12",
    "tools/report.py": "",
    "tools/evaluate.py": "--num-samples 2 --max-new-tokens 12 --batch-size 16 --limit 4 --prompt-suffix ''",
}
"""Program -> the flags that make it small."""


def test_tutorial_goes_from_own_data_to_an_evaluated_model(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs every command of the tutorial in its order. Those of the README are among them."""
    tutorial = [c for c in commands(ROOT / "docs/tutorial.md") if c.startswith("python ")]
    shown = {command for command in commands(ROOT / "README.md") if "own" in command}
    assert len(shown) == 7 and shown <= set(tutorial)
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_bytes(workshop.sums.read_bytes())
    for number, command in enumerate(tutorial):
        _, program, *words = shlex.split(command.replace(" DIR ", f" {workshop.policy} "))
        more = [] if words[0] == "table" else shlex.split(SMALLER[program])
        short = SHORT_ANSWERS if program == "pretrain_rasft.py" else []
        outcome = launching.run(
            tmp_path / f"logs{number}", [*words, *more, *short], program=ROOT / program, has_launcher=False
        )
        assert outcome.codes == [0], f"{command}: {outcome.output}"
    assert (tmp_path / "runs/own/report.html").is_file()
    assert "| hf |" in (tmp_path / "runs/own/after/results.md").read_text()


@pytest.mark.slow
def test_quickstart_ends_with_a_model_and_its_solve_rates(tmp_path: Path, tiny_smollm2: Path) -> None:
    """Runs the complete quickstart with one step, on a small model."""
    flags = f"--num-train 16 --num-heldout 5 --output {tmp_path} --hf-model {tiny_smollm2}"
    command = ["make", "quickstart", f"VENV={Path(sys.prefix)}", f"ARGS={flags}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_solve_rates(done.stdout, "rasft")
    (model,) = tmp_path.glob("rasft-*/model")
    transformers.AutoConfig.from_pretrained(model)
    assert_last_line_names_the_page(done.stdout, tmp_path)
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert peak_gib < 3  # SmolLM2 itself would need 2 GiB more


def test_quickstart_compares_objectives(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the trainings in forked processes. The test above runs one as the quickstart does."""
    logs = itertools.count()

    def run_forked(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        flags = command[command.index(str(ROOT / "pretrain_rasft.py")) + 1 :]
        outcome = launching.run(tmp_path / f"logs{next(logs)}", flags)
        assert outcome.codes == [0], outcome.output
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_forked)
    flags = ["--compare", "--output", str(tmp_path), "--hf-model", str(workshop.policy)]
    monkeypatch.setattr(sys, "argv", ["quickstart", *flags, "--num-train", "16", "--num-heldout", "5"])
    quickstart.main()
    assert next(logs) == 3
    printed = capsys.readouterr().out
    for objective in ("rasft", "sft", "dft"):
        assert_solve_rates(printed, objective)
    (names,) = assert_last_line_names_the_page(printed, tmp_path).texts["h1"]
    assert re.fullmatch(r"rasft-[\d-]+, sft-[\d-]+, dft-[\d-]+", names)


def assert_last_line_names_the_page(printed: str, output: Path) -> Page:
    """Asserts that the page has all its inputs, and returns it."""
    page = output / "report.html"
    assert str(page) in [line for line in printed.splitlines() if not line.startswith("make")][-1]
    shown = Page(page.read_text(encoding="utf-8"))
    assert all("demonstrations only" in note for note in shown.texts.get("li", [])), "no input is missing"
    return shown


def assert_solve_rates(printed: str, objective: str) -> None:
    assert re.search(rf"{objective}\W+\d+\.\d%\W+\d+\.\d%\W+\d", printed), printed


def test_interpreter_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    make = ["make", "venv", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "not a Python >= 3.12: make PYTHON=/path/to/python3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_extras_that_the_documents_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = {name for group in re.findall(r"(?:\.|rasft)\[([\w,]+)\]", text) for name in group.split(",")}
    assert named and named <= extras.keys()


def test_benchmark_of_code_verification_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "code_verification.py"), "--num-checks", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "per second" in done.stdout


def test_tests_that_continuous_integration_cannot_run_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu or bridge", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "tests/gpu", "tests/bridge"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    for file in [*ROOT.glob("tests/gpu/test_*.py"), *ROOT.glob("tests/bridge/test_*.py")]:
        assert f"{file.relative_to(ROOT)}::" in done.stdout


def test_pre_commit_takes_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
