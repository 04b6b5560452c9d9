"""Every rollout gets exactly one verdict, even from a misbehaving grader, and workers end with their parent."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import CodeTests, FinishReason, Rollout
from megatron_rasft.verify import pool as pool_module
from megatron_rasft.verify.grading_order import GIVEN_UP
from megatron_rasft.verify.pool import VerifierPool
from tests.unit.verify import hostile_graders

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def fork_server_with_the_real_grader() -> None:
    """Starts this process's fork server with sympy loaded. If a test with another grader started it, every worker would load sympy."""
    with VerifierPool(VerifyConfig(verify_num_workers=1)):
        pass


def make_rollout(text: str, finish_reason: FinishReason = "stop", problem_id: str = "p") -> Rollout:
    return Rollout(
        problem_id=problem_id,
        sample_index=0,
        weight_version=0,
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-1.0],
        finish_reason=finish_reason,
        text=text,
    )


def hostile_pool(**knobs: object) -> VerifierPool:
    config = VerifyConfig(
        **{"verify_num_workers": 2, "verify_timeout_s": 3.0, "verify_memory_mib": 128} | knobs
    )  # type: ignore[arg-type]
    return VerifierPool(config, grader=hostile_graders.act_out)


MISBEHAVIOUR = [
    ("sleep", "timeout"),
    ("spin", "timeout"),
    ("ignore_sigterm", "timeout"),
    ("exit 3", "unverifiable"),
    ("sys_exit", "unverifiable"),
    ("kill", "unverifiable"),
    ("segfault", "unverifiable"),
    ("raise", "unverifiable"),
    ("recurse", "unverifiable"),
    ("memory", "unverifiable"),
    ("hoard", "unverifiable"),
    ("nonsense", "unverifiable"),
    ("none", "unverifiable"),
    ("print", "correct"),
    ("equal 6", "wrong"),
    ("equal 5", "correct"),
]


def test_misbehaving_grader_costs_its_own_rollout_only() -> None:
    rollouts, wanted = [], []
    for text, verdict in MISBEHAVIOUR:
        rollouts += [make_rollout(text), make_rollout("equal 5", problem_id=f"beside {text}")]
        wanted += [verdict, "correct"]
    with hostile_pool() as pool:
        counts = pool.verify(rollouts, {r.problem_id: "5" for r in rollouts})
        assert sum(counts.values()) == len(rollouts)
        assert counts == Counter(r.verdict for r in rollouts)
        crashed = {"exit 3", "kill", "segfault"}
        for rollout, verdict in zip(rollouts, wanted, strict=True):
            # If a worker dies before the parent has read that it took the task, the rollout gets a timeout instead
            allowed = {verdict, "timeout"} if rollout.text in crashed else {verdict}
            assert rollout.verdict in allowed, rollout.text
            assert rollout.verdict_reason or verdict in ("correct", "wrong"), rollout.text
        # The pool can still be used
        assert pool.verify([make_rollout("equal 5")], {"p": "5"}) == Counter(correct=1)


def test_crashes_only_still_end_with_a_verdict_each() -> None:
    rollouts = [make_rollout(f"exit {code}") for code in range(3, 11)] + [make_rollout("equal 5")]
    with hostile_pool(verify_num_workers=1) as pool:
        counts = pool.verify(rollouts, {"p": "5"})
    assert sum(counts.values()) == 9
    assert rollouts[-1].verdict == "correct"
    assert counts["correct"] == 1


def test_equal_responses_to_a_problem_are_graded_once() -> None:
    rollouts = [
        make_rollout(text, problem_id=problem) for text in ("pid 1", "pid 2", "pid 1") for problem in "pq"
    ]
    with hostile_pool(verify_num_workers=1, verify_max_tasks_per_worker=1) as pool:
        counts = pool.verify(rollouts, {"p": "5", "q": "5"})
    assert counts == Counter(correct=6)
    graders = [rollout.verdict_reason for rollout in rollouts]
    assert graders[:2] == graders[4:]  # one process for a response and the one that equals it
    assert len(set(graders)) == 4


def test_unfinished_responses_are_wrong_without_being_graded() -> None:
    rollouts = [make_rollout("kill", "length"), make_rollout("kill", "abort")]
    with hostile_pool() as pool:
        assert pool.verify(rollouts, {"p": "5"}) == Counter(wrong=2)
    assert [r.verdict_reason for r in rollouts] == ["truncated", "aborted"]


def test_truncated_responses_are_graded_on_request() -> None:
    rollouts = [make_rollout("equal 5", "length"), make_rollout("equal 5", "abort")]
    with hostile_pool(verify_grade_truncated=True) as pool:
        pool.verify(rollouts, {"p": "5"})
    assert [r.verdict for r in rollouts] == ["correct", "wrong"]


def test_missing_gold_is_unverifiable() -> None:
    rollouts = [make_rollout("equal 5", problem_id="q"), make_rollout("equal 5", problem_id="empty")]
    with hostile_pool() as pool:
        assert pool.verify(rollouts, {"p": "5", "empty": " "}) == Counter(unverifiable=2)
    assert {r.verdict_reason for r in rollouts} == {"no gold answer"}


def test_exception_of_on_verdict_ends_the_call_and_leaves_the_pool_usable() -> None:
    rollouts = [make_rollout("equal 5"), make_rollout("sleep")]

    def interrupt() -> None:
        if rollouts[0].verdict is not None:
            raise InterruptedError

    with hostile_pool() as pool:
        with pytest.raises(InterruptedError):
            pool.verify(rollouts, {"p": "5"}, interrupt)
        assert rollouts[1].verdict is None
        assert pool.verify([make_rollout("equal 5")], {"p": "5"}) == Counter(correct=1)


def test_signals_are_checked_while_a_grading_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_CHECK_S", 0.05)
    calls: list[None] = []

    def stop_at_fifth() -> None:
        calls.append(None)
        if len(calls) == 5:  # without a verdict in between
            raise InterruptedError

    with hostile_pool(verify_timeout_s=600.0) as pool, pytest.raises(InterruptedError):
        pool.verify([make_rollout("sleep")], {"p": "5"}, stop_at_fifth)


def test_problem_whose_gradings_hang_costs_a_few_deadlines_and_no_other_verdict(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A worker that ends as if at its deadline: with a short deadline, a busy machine would make the others late too
    hanging = [make_rollout(f"alarm {n}", problem_id="hangs") for n in range(2000)]
    fine = [make_rollout("equal 5", problem_id=str(n)) for n in range(20)]
    with hostile_pool(verify_timeout_s=60.0) as pool:
        counts = pool.verify([*hanging, *fine], {"hangs": "5"} | {r.problem_id: "5" for r in fine})
    assert counts == Counter(timeout=2000, correct=20)
    assert [r.verdict_reason for r in hanging[:4]] == ["deadline of 60 s"] * 4
    assert all(r.verdict_reason.startswith(GIVEN_UP) for r in hanging[4:])
    assert "1996" in caplog.text
    assert "--verify-timeouts-per-problem" in caplog.text


def test_hanging_problems_share_a_number_of_deadlines_and_others_are_graded_first() -> None:
    hanging = [make_rollout("alarm", problem_id=str(n)) for n in range(6)]
    fine = [make_rollout("equal 5", problem_id=f"p{n}") for n in range(6)]
    rollouts = [rollout for pair in zip(hanging, fine, strict=True) for rollout in pair]
    fine_when_first_hanging_has_verdict = []

    def look() -> None:
        if any(r.verdict for r in hanging) and not fine_when_first_hanging_has_verdict:
            fine_when_first_hanging_has_verdict.append(sum(r.verdict == "correct" for r in fine))

    with hostile_pool(verify_max_timeouts=2, verify_timeout_s=60.0) as pool:
        pool.verify(rollouts, {r.problem_id: "5" for r in rollouts}, look)
    assert {r.verdict for r in hanging} == {"timeout"}
    assert {r.verdict for r in fine} == {"correct"}
    assert [r.verdict_reason.startswith(GIVEN_UP) for r in hanging] == [False] * 2 + [True] * 4
    assert fine_when_first_hanging_has_verdict == [6]


def test_slow_grading_within_the_deadline_gets_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round of grading interrupts a slow grader; the last round lets it finish."""
    # Private names, because no run needs another first round. With the real one, this test would take seconds
    monkeypatch.setattr(pool_module, "_FIRST_ROUND_MIN_S", 0.1)
    monkeypatch.setattr(pool_module, "_FIRST_ROUND_SHARE", 0.0)
    rollouts = [make_rollout("slowly 5"), make_rollout("slowly 6"), make_rollout("equal 5")]
    with hostile_pool(verify_timeout_s=600.0) as pool:
        pool.verify(rollouts, {"p": "5"})
    assert [r.verdict for r in rollouts] == ["correct", "wrong", "correct"]


def test_worker_that_ends_itself_at_its_deadline_gives_a_timeout() -> None:
    rollout = make_rollout("alarm")
    with hostile_pool() as pool:
        pool.verify([rollout], {"p": "5"})
    assert rollout.verdict == "timeout"


def test_no_rollouts_no_verdicts() -> None:
    with hostile_pool() as pool:
        assert pool.verify([], {}) == Counter()


def test_reasons_are_short() -> None:
    rollout = make_rollout("long_reason")
    with hostile_pool() as pool:
        pool.verify([rollout], {"p": "5"})
    assert len(rollout.verdict_reason) == 200


def test_workers_are_replaced_after_their_tasks() -> None:
    rollouts = [make_rollout(f"pid {n}") for n in range(6)]
    with hostile_pool(verify_num_workers=1, verify_max_tasks_per_worker=2) as pool:
        pool.verify(rollouts, {"p": "5"})
    assert len({r.verdict_reason for r in rollouts}) >= 3


WORKER_MODULES = """
import only_the_trainer  # stands for torch, which takes seconds to import

from tests.unit.verify.test_pool import hostile_pool, make_rollout

if __name__ == "__main__":
    rollout = make_rollout("modules")
    with hostile_pool() as pool:
        pool.verify([rollout], {"p": "5"})
    print(rollout.verdict_reason)
"""


def test_workers_load_neither_torch_nor_megatron_nor_what_the_main_script_loads(tmp_path: Path) -> None:
    # Runs in a separate process, because a process has one fork server, which an earlier test may have started
    script = tmp_path / "modules.py"
    script.write_text(WORKER_MODULES, encoding="utf-8")
    (tmp_path / "only_the_trainer.py").touch()
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    modules = set(done.stdout.strip().split(","))
    assert hostile_graders.PROGRAM_GRADING in modules, (
        "importing it in every worker would take longer than the check of an answer"
    )
    assert modules <= {"nltk", "__mp_main__", hostile_graders.PROGRAM_GRADING}


def test_only_the_tail_of_a_long_response_is_read() -> None:
    config = VerifyConfig(verify_num_workers=1, verify_max_response_chars=30)
    rollouts = [make_rollout(r"\boxed{5}" + "x" * 100), make_rollout("x" * 100 + r"\boxed{5}")]
    with VerifierPool(config) as pool:
        pool.verify(rollouts, {"p": "5"})
    assert [r.verdict for r in rollouts] == ["wrong", "correct"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<think>so 123456", "<think>123456"),
        (" <think>\nso 123456", "<think>123456"),
        ("<seed:think>so 123456", "<seed:think>123456"),
        ("[THINK]so 123456", "[THINK]123456"),
        ("◁think▷so 123456", "◁think▷123456"),
        ("<think>so</think> 123456", "123456"),
        ("[THINK]so[/THINK] 123456", "123456"),
        ("so <think> 123456", "<think>123456"),
        ("<think>so</think><think>123456", "<think>123456"),
        ("<think>3456", "k>3456"),
        ("3456", "3456"),
    ],
)
def test_tail_of_a_response_does_not_leave_its_reasoning(text: str, read: str) -> None:
    assert pool_module.end_of_response(text, 6) == read


def test_answers_and_programs_are_verified_in_one_call() -> None:
    tests = CodeTests(style="asserts", tests=("assert f(2) == 4", "assert f(3) == 9"), entry_point="f")
    texts = {
        "code": [
            "def f(x): return x * x",
            "def f(x): return x + x",
            "import os; os._exit(0)",
        ],
        "mathematics": [r"\boxed{4}", r"\boxed{5}"],
        "nothing": ["def f(x): return x * x"],
    }
    rollouts = [make_rollout(text, problem_id=kind) for kind, some in texts.items() for text in some]
    rollouts.append(make_rollout("def f(x): return x * x", "length", problem_id="code"))
    config = VerifyConfig(verify_num_workers=2, verify_code_timeout_s=600.0, verify_sandbox_level="limits")
    with VerifierPool(config) as pool:
        counts = pool.verify(rollouts, {"code": tests, "mathematics": "4", "nothing": ""})
    verdicts = [r.verdict for r in rollouts]
    assert verdicts == ["correct", "wrong", "wrong", "correct", "wrong", "unverifiable", "wrong"]
    assert sum(counts.values()) == len(rollouts)
    assert [r.verdict_reason for r in rollouts[:2]] == ["2 tests passed", "test 2 of 2: AssertionError"]


def test_program_that_does_not_end_is_wrong_at_the_deadline_of_programs() -> None:
    tests = CodeTests(style="asserts", tests=("assert f(2) == 4",), entry_point="f")
    rollout = make_rollout("while True: pass", problem_id="code")
    config = VerifyConfig(verify_num_workers=1, verify_code_timeout_s=1.0, verify_sandbox_level="limits")
    with VerifierPool(config) as pool:
        pool.verify([rollout], {"code": tests})
    assert (rollout.verdict, rollout.verdict_reason) == ("wrong", "deadline of 1 s")


HOSTILE_TEXTS = [
    "10**10**10",
    r"\boxed{10**10**10}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(((100!)!)!)!}",
    r"\boxed{2^{10^{9}}}",
    r"\boxed{1e999999999}",
    r"\boxed{4.5 \times 10^{99999999}}",
    r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^3}}",
    "\\boxed{" + "\\frac{1}{" * 400 + "2" + "}" * 400 + "}",
    "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "\\boxed{" * 100_000,
    "{" * 1_000_000,
    "}" * 1_000_000,
    "x" * 1_000_000,
    "1" * 1_000_000,
    "1," * 500_000,
    "answer is " * 100_000,
    "\\boxed" + " " * 1_000_000,
    "\\boxed{" + " " * 150_000 + "}",
    "\x00" * 1000,
    "\x00\\boxed{\x00}",
    "\ud800 \\boxed{\ud800}",
    "__import__('os')._exit(0)",
    r"\boxed{__import__('os').abort()}",
    "",
]


def test_hostile_responses_get_one_verdict_each_and_none_is_correct() -> None:
    rollouts = [make_rollout(text) for text in HOSTILE_TEXTS]
    # Nine of the texts use the whole deadline, so it is short
    config = VerifyConfig(verify_num_workers=2, verify_timeout_s=1.0, verify_memory_mib=1024)
    with VerifierPool(config) as pool:
        counts = pool.verify(rollouts, {"p": "5"})
    assert sum(counts.values()) == len(rollouts)
    assert not [r.text[:40] for r in rollouts if r.verdict == "correct"]


MAIN_SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with SIGINT ignored
print("imported", flush=True)
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.verify.pool import VerifierPool
from tests.unit.verify import hostile_graders
from tests.unit.verify.test_pool import make_rollout

if __name__ == "__main__":
    # No worker reaches this deadline during the test.
    config = VerifyConfig(verify_num_workers=1, verify_timeout_s=3600.0)
    pool = VerifierPool(config, hostile_graders.act_out)
    pool.__enter__()
    rollouts = [make_rollout("pid")]
    pool.verify(rollouts, {"p": "5"})
    print("worker", rollouts[0].verdict_reason, flush=True)
    if sys.argv[1] == "busy":
        try:
            while True:
                pool.verify([make_rollout("spin")], {"p": "5"})
        finally:
            pool.close()
    # In the mode "forgotten", the pool is never closed
"""


def start_script(tmp_path: Path, mode: str) -> tuple[subprocess.Popen[str], int]:
    """Starts the script. Returns its process and the id of its worker."""
    script = tmp_path / "main_script.py"
    script.write_text(MAIN_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    # A worker that ran the main script again would have printed "imported" a second time
    worker = process.stdout.readline().split()
    assert worker[0] == "worker"
    return process, int(worker[1])


def wait_until_gone(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_leaves_no_worker_behind(tmp_path: Path, signal_number: int) -> None:
    process, worker = start_script(tmp_path, "busy")
    time.sleep(0.2)  # most likely inside verify() by now; the test is also valid if not
    process.send_signal(signal_number)
    assert process.wait() != 0
    wait_until_gone(worker)


def test_forgotten_pool_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    process, worker = start_script(tmp_path, "forgotten")
    assert process.wait() == 0
    wait_until_gone(worker)


def test_closing_while_workers_start_prints_nothing() -> None:
    script = """
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.verify.pool import VerifierPool
from tests.unit.verify import hostile_graders

for _ in range(4):
    # The pool is ready when its first worker is
    with VerifierPool(VerifyConfig(verify_num_workers=12), hostile_graders.act_out):
        pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stderr == ""
