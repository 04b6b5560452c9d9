"""The curriculum visits every problem once per epoch, and a resumed curriculum equals an uninterrupted one."""

import hashlib
import json
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rasft.config.curriculum import CurriculumConfig
from megatron_rasft.curriculum.curriculum import Curriculum, Solvability, hard_count, middle_count
from megatron_rasft.errors import CheckpointError

BAND = CurriculumConfig(curriculum_mode="band")


def ids(n):
    return [f"row {i}" for i in range(n)]


def walk_epoch(curriculum, sizes):
    """The problems of each refresh of one epoch; ``sizes`` is repeated."""
    refreshes = [curriculum.next_problems(sizes[0])]
    while curriculum.num_remaining:
        refreshes.append(curriculum.next_problems(sizes[len(refreshes) % len(sizes)]))
    return refreshes


def flat(refreshes):
    return [problem_id for problem_ids in refreshes for problem_id in problem_ids]


# ---- epochs


@given(
    st.integers(1, 80),
    st.lists(st.integers(1, 100), min_size=1, max_size=5),
    st.integers(0, 9),
    st.integers(1, 3),
)
def test_every_problem_exactly_once_per_epoch(num_problems, sizes, seed, num_epochs):
    curriculum = Curriculum(ids(num_problems), CurriculumConfig(), seed=seed)
    for epoch in range(num_epochs):
        refreshes = walk_epoch(curriculum, sizes)
        assert curriculum.epoch == epoch
        assert all(refreshes)
        assert sorted(flat(refreshes)) == sorted(ids(num_problems))


def test_order_depends_on_seed_and_epoch_and_not_on_the_size_of_a_refresh():
    def order(seed, sizes, epochs=1):
        curriculum = Curriculum(ids(50), CurriculumConfig(), seed=seed)
        return [flat(walk_epoch(curriculum, sizes)) for _ in range(epochs)][-1]

    assert order(1, [7]) == order(1, [50]) == order(1, [3, 20])
    assert order(1, [7]) != order(2, [7])
    assert order(1, [7]) != order(1, [7], epochs=2)


def test_a_refresh_ends_with_the_epoch():
    curriculum = Curriculum(ids(5), CurriculumConfig(), seed=0)
    assert [len(curriculum.next_problems(3)) for _ in range(4)] == [3, 2, 3, 2]
    assert (curriculum.epoch, curriculum.refresh) == (1, 4)


# ---- calibration, routes and choice


def test_calibration_sample_is_distinct_and_bounded():
    config = CurriculumConfig(curriculum_calibration_rows=10)
    sample = Curriculum(ids(50), config, seed=3).calibration_sample()
    assert len(set(sample)) == 10
    assert sample == Curriculum(ids(50), config, seed=3).calibration_sample()
    assert len(Curriculum(ids(4), config, seed=3).calibration_sample()) == 4


def calibrated(num_problems=100, config=BAND, seed=0):
    curriculum = Curriculum(ids(num_problems), config, seed=seed)
    curriculum.calibrate([i / 100 for i in range(101)])
    return curriculum


def test_hard_problems_join_the_pool_and_leave_it_when_they_are_no_longer_hard():
    curriculum = calibrated()
    assert curriculum.route({"row 0": 0.8, "row 1": 0.5, "row 2": 0.3}, 0.0) == {
        "row 0": "hard",
        "row 1": "hard",
        "row 2": "middle",
    }
    assert curriculum.hard_pool == ("row 0", "row 1")
    curriculum.route({"row 0": 0.05, "row 1": 0.6}, 0.0)
    assert curriculum.hard_pool == ("row 1",)


def test_band_mode_samples_a_share_of_the_middle_and_probes_the_pool():
    curriculum = calibrated()
    problem_ids = curriculum.next_problems(100)
    routes = curriculum.route({p: 0.3 if i < 40 else 0.8 for i, p in enumerate(problem_ids)}, 0.0)
    chosen = curriculum.choose_for_rollouts(routes)
    assert chosen == curriculum.choose_for_rollouts(routes)
    middle, hard = chosen[:14], chosen[14:]
    assert [routes[p] for p in middle] == ["middle"] * 14 and len(set(middle)) == 14
    assert middle == sorted(middle, key=problem_ids.index) and middle != problem_ids[:14]
    assert hard == problem_ids[40:41]  # 3 % of 60 problems, rounded down


def test_random_choices_depend_on_seed_purpose_and_refresh_alone():
    """A resumed run, also with a later version, must choose like an uninterrupted one, so the generators are part of the state."""
    curriculum = calibrated(num_problems=40, seed=7)
    curriculum.route({"row 0": 0.05}, 0.0)
    shuffled = ids(40)
    random.Random("curriculum 7 calibration").shuffle(shuffled)
    assert curriculum.calibration_sample() == shuffled
    routes = dict.fromkeys(ids(20), "middle")
    chosen = []
    for refresh in (1, 2):
        curriculum.next_problems(20)
        chosen.append(curriculum.choose_for_rollouts(routes))
        drawn = random.Random(f"curriculum 7 middle {refresh}").sample(range(20), 7)
        assert chosen[-1] == [f"row {position}" for position in sorted(drawn)]
    assert chosen[0] != chosen[1]


def test_a_hard_problem_that_was_never_sampled_is_probed_before_those_of_the_first_refresh():
    curriculum = calibrated(config=CurriculumConfig(curriculum_mode="band", curriculum_hard_frac=0.5))
    curriculum.route(dict.fromkeys(["row 0", "row 1"], 0.8), 0.0)
    curriculum.next_problems(1)
    curriculum.record("row 0", 0, 4)
    assert curriculum.choose_for_rollouts({}) == ["row 1"]


def test_probes_go_round_the_pool():
    curriculum = calibrated(config=CurriculumConfig(curriculum_mode="band", curriculum_hard_frac=0.34))
    curriculum.route(dict.fromkeys(["row 0", "row 1", "row 2"], 0.8), 0.0)
    probed = []
    for _ in range(6):
        curriculum.next_problems(1)
        (problem,) = curriculum.choose_for_rollouts({})
        curriculum.record(problem, 0, 4)
        probed.append(problem)
    assert probed == ["row 0", "row 1", "row 2"] * 2


def test_mode_all_takes_every_problem_and_off_nothing():
    routes = {"row 3": "easy", "row 1": "rest", "row 2": "middle"}
    assert Curriculum(ids(9), CurriculumConfig(), seed=0).choose_for_rollouts(routes) == list(routes)
    off = CurriculumConfig(curriculum_mode="off")
    assert Curriculum(ids(9), off, seed=0).choose_for_rollouts(routes) == []


@pytest.mark.parametrize(
    ("share", "size", "middle", "hard"),
    [
        (0.35, 0, 0, 0),
        (0.35, 1, 1, 1),
        (0.35, 10, 4, 3),
        (0.03, 16, 1, 1),
        (0.03, 99, 3, 2),
        (0.03, 100, 3, 3),
        (0.35, 20, 7, 7),
        (0.0, 9, 0, 0),
        (1.0, 9, 9, 9),
    ],
)
def test_shares_become_counts_as_in_the_published_script(share, size, middle, hard):
    assert middle_count(share, size) == middle
    assert hard_count(share, size) == hard


# ---- memory


def test_recorded_rollouts_are_pooled_with_discounted_earlier_ones():
    curriculum = Curriculum(ids(2), CurriculumConfig(), seed=0, memory=0.5)
    assert curriculum.remembered("row 0") is None
    curriculum.next_problems(1)
    curriculum.record("row 0", 4, 4)
    assert curriculum.remembered("row 0") == (1.0, 2.0)
    curriculum.next_problems(1)
    curriculum.record("row 0", 0, 4)
    assert curriculum.remembered("row 0") == (pytest.approx(2 / 6), 3.0)
    curriculum.record("row 0", 0, 0)  # without samples the record does not change
    assert curriculum.solvability == {"row 0": Solvability(2 / 6, 6.0, 2, 2)}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=40), st.floats(0, 1))
def test_memory_is_the_discounted_mean(history, memory):
    curriculum = Curriculum(ids(1), CurriculumConfig(), seed=0, memory=memory)
    correct = samples = 0.0
    for right, wrong in history:
        curriculum.record("row 0", right, right + wrong)
        if right + wrong:
            correct, samples = memory * correct + right, memory * samples + right + wrong
    if samples:
        assert curriculum.remembered("row 0") == pytest.approx((correct / samples, memory * samples))
        assert 0 <= curriculum.remembered("row 0")[0] <= 1
    else:
        assert curriculum.remembered("row 0") is None


def test_memory_one_keeps_all_samples():
    curriculum = Curriculum(ids(1), CurriculumConfig(), seed=0, memory=1.0)
    curriculum.record("row 0", 4, 4)
    curriculum.record("row 0", 0, 4)
    assert curriculum.remembered("row 0") == (0.5, 8.0)


def test_memory_zero_forgets():
    curriculum = Curriculum(ids(1), CurriculumConfig(), seed=0, memory=0.0)
    curriculum.record("row 0", 4, 4)
    assert curriculum.remembered("row 0") == (1.0, 0.0)
    curriculum.record("row 0", 1, 4)
    assert curriculum.solvability["row 0"] == Solvability(0.25, 4.0, 0, 2)


# ---- checkpoints


def one_refresh(curriculum, rng, size, total):
    """Runs a refresh and returns its outcome; ``rng`` draws the policy's answers."""
    problem_ids = curriculum.next_problems(size)
    routes = curriculum.route({p: rng.random() for p in problem_ids}, min(1.0, curriculum.refresh / total))
    chosen = curriculum.choose_for_rollouts(routes)
    seen = [curriculum.remembered(p) for p in chosen]
    for problem in chosen:
        num_samples = rng.randint(0, 4)
        curriculum.record(problem, rng.randint(0, num_samples), num_samples)
    return problem_ids, routes, chosen, seen, curriculum.hard_pool


@given(
    st.integers(1, 40),
    st.integers(1, 15),
    st.integers(0, 8),
    st.sampled_from(["band", "all", "off"]),
    st.integers(0, 5),
)
def test_resumed_equals_unbroken(num_problems, size, stop, mode, seed):
    config = CurriculumConfig(curriculum_mode=mode)
    unbroken = calibrated(num_problems, config, seed)
    rng = random.Random(seed)
    for _ in range(stop):
        one_refresh(unbroken, rng, size, 12)
    state = unbroken.state_dict()
    assert json.loads(json.dumps(state)) == state
    # the checkpoint's seed replaces the new one
    resumed = Curriculum(ids(num_problems), config, seed=seed + 1)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state
    assert resumed.epoch == unbroken.epoch and resumed.num_remaining == unbroken.num_remaining
    other_rng = random.Random()
    other_rng.setstate(rng.getstate())
    for _ in range(6):
        assert one_refresh(unbroken, rng, size, 12) == one_refresh(resumed, other_rng, size, 12)
    assert resumed.state_dict() == unbroken.state_dict()
    assert resumed.calibration_sample() == unbroken.calibration_sample()


def test_state_can_be_taken_before_calibration_and_within_a_refresh():
    curriculum = calibrated()
    problem_ids = curriculum.next_problems(30)
    routes = curriculum.route(dict.fromkeys(problem_ids, 0.3), 0.0)
    resumed = Curriculum(ids(100), BAND, seed=0)
    assert resumed.state_dict()["thresholds"] is None
    resumed.load_state_dict(resumed.state_dict())
    assert resumed.thresholds is None
    resumed.load_state_dict(curriculum.state_dict())
    assert resumed.choose_for_rollouts(routes) == curriculum.choose_for_rollouts(routes)


def test_taken_state_does_not_change_with_the_curriculum():
    curriculum = calibrated()
    state = curriculum.state_dict()
    before = json.dumps(state)
    one_refresh(curriculum, random.Random(0), 20, 10)
    assert json.dumps(state) == before


def test_problems_are_identified_by_a_hash_of_their_ids_and_lengths():
    """A checkpoint holds it, so a later version must compute the same. The last id is half a surrogate pair, as JSON may hold."""
    problem_ids = ["a", "bc", "é", "\ud83d"]
    encoded = [b"a", b"bc", b"\xc3\xa9", b"\xed\xa0\xbd"]
    digest = hashlib.sha256(b"".join(struct.pack(">Q", len(text)) + text for text in encoded)).hexdigest()
    state = Curriculum(problem_ids, CurriculumConfig(), seed=0).state_dict()
    assert state["problems"] == f"4 problems, {digest[:16]}"


def test_state_of_other_problems_or_format_is_refused():
    curriculum = Curriculum(ids(5), CurriculumConfig(), seed=0)
    state = curriculum.state_dict()
    with pytest.raises(CheckpointError, match="--train-data"):
        Curriculum(ids(6), CurriculumConfig(), seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="--train-data"):
        Curriculum(ids(5)[::-1], CurriculumConfig(), seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="format"):
        curriculum.load_state_dict({**state, "version": 99})


# ---- misuse


def test_misuse_is_named():
    with pytest.raises(ValueError, match="--train-data"):
        Curriculum([], CurriculumConfig(), seed=0)
    with pytest.raises(ValueError, match="unique"):
        Curriculum(["a", "a"], CurriculumConfig(), seed=0)
    with pytest.raises(ValueError, match="--weighting-memory"):
        Curriculum(["a"], CurriculumConfig(), seed=0, memory=2)
    curriculum = calibrated(3)
    with pytest.raises(ValueError, match="at least one"):
        curriculum.next_problems(0)
    with pytest.raises(ValueError, match="'x'"):
        curriculum.record("x", 0, 1)
    with pytest.raises(ValueError, match="num_correct"):
        curriculum.record("row 0", 2, 1)
    with pytest.raises(ValueError, match="nan"):
        curriculum.route({"row 0": float("nan")}, 0.0)
    with pytest.raises(AssertionError, match="calibrate"):
        Curriculum(["a"], CurriculumConfig(), seed=0).route({"a": 1.0}, 0.0)


def test_a_checkpoint_of_other_rows_with_the_same_ids_is_refused() -> None:
    made = Curriculum(ids(5), CurriculumConfig(), seed=0, content="a").state_dict()
    Curriculum(ids(5), CurriculumConfig(), seed=0, content="a").load_state_dict(made)
    with pytest.raises(CheckpointError, match="--train-data"):
        Curriculum(ids(5), CurriculumConfig(), seed=0, content="b").load_state_dict(made)
