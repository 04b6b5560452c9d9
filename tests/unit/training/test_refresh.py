"""Rank 0's decisions of a refresh, on plain objects: choose, group, verify, weigh, record, store, resume."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config import (
    CurriculumConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_rasft.curriculum.curriculum import Solvability
from megatron_rasft.objective.families.kl_regularised import SftKl
from megatron_rasft.objective.weighting import WeightingConfig
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.store import RolloutStore, read_rollouts
from megatron_rasft.training import refresh
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.training.refresh import ProblemChoice, Refresh, as_rollouts, difficulties
from megatron_rasft.types import RolloutGroup, TrainingSample
from tests.unit.training.stand_ins import (
    BAND,
    STOP_IDS,
    answers,
    config_of,
    decode,
    demonstrations,
    refresh_of,
    response,
)


def sampled(*problem_ids: str, weight_version: int | None = 0) -> ProblemChoice:
    """A choice of problems that all get rollouts."""
    return ProblemChoice(
        problem_ids=list(problem_ids), sampled_ids=list(problem_ids), weight_version=weight_version
    )


def verified(made: Refresh, problem_ids: list[str], weight_version: int = 0) -> dict[str, RolloutGroup]:
    """Sampled and graded rollouts of these problems; every second one is correct."""
    choice = sampled(*problem_ids, weight_version=weight_version)
    groups = made.group(choice, [answers(request) for request in made.requests(choice)], weight_version)
    made.verify(groups)
    return groups


def test_the_module_needs_neither_torch_nor_megatron_nor_other_ranks() -> None:
    tree = ast.parse(Path(refresh.__file__).read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not [n for n in names if n.split(".")[0] in ("torch", "megatron") or n.endswith("ranks")]


# ---- choose


def test_a_refresh_covers_its_interval_and_the_last_one_ends_with_the_run() -> None:
    made = refresh_of(config_of(run=RunConfig(rasft_refresh_interval=3)), num_problems=24)
    assert len(made.next_problems(0)) == 6
    assert len(made.next_problems(3)) == 6
    assert len(made.next_problems(10)) == 4, "2 of 12 steps are left"
    assert len(made.next_problems(11)) == 2


def test_two_refreshes_choose_different_problems_and_an_epoch_repeats_none() -> None:
    made = refresh_of(config_of(run=RunConfig(rasft_refresh_interval=2)))
    first, second, next_epoch = (made.next_problems(step) for step in (0, 2, 4))
    assert len(first) == len(second) == 4
    assert sorted(first + second) == sorted(d.problem_id for d in demonstrations(8))
    assert next_epoch != first


@pytest.mark.parametrize(("mode", "share"), [("all", 1), ("off", 0)])
def test_without_a_band_all_problems_or_none_are_sampled(mode: Any, share: int) -> None:
    made = refresh_of(config_of(curriculum=CurriculumConfig(curriculum_mode=mode)))
    problem_ids = made.next_problems(0)
    choice = made.choose(problem_ids, {}, 0)
    assert (choice.problem_ids, choice.sampled_ids) == (problem_ids, problem_ids * share)
    assert choice.weight_version is None, "nothing is sampled yet"


def test_an_objective_without_rollouts_samples_no_problem() -> None:
    made = refresh_of(config_of(objective=SftKl()))
    assert made.choose(["p1", "p0"], {}, 0).sampled_ids == []


def test_the_band_samples_other_problems_once_the_policy_has_changed() -> None:
    made = refresh_of(config_of(curriculum=BAND), num_problems=20)
    assert len(made.calibration_samples()) == 20
    made.calibrate({f"p{i}": i / 10 for i in range(11)})
    assert made.calibration_samples() == [], "the thresholds stay those of the first refresh"
    thresholds = made.curriculum.thresholds
    made.calibrate({})
    assert made.curriculum.thresholds == thresholds
    problem_ids = made.next_problems(0)
    inside, below = 0.3, 0.05
    easy_last = {p: inside if i < 10 else below for i, p in enumerate(problem_ids)}
    easy_first = {p: below if i < 10 else inside for i, p in enumerate(problem_ids)}
    first, second = (made.choose(problem_ids, d, 0).sampled_ids for d in (easy_last, easy_first))
    assert first and set(first) <= set(problem_ids[:10])
    assert second and set(second) <= set(problem_ids[10:])


def test_the_band_slides_with_the_steps_of_the_run() -> None:
    made = refresh_of(config_of(curriculum=BAND))
    made.calibrate({f"p{i}": i / 10 for i in range(11)})

    def is_sampled(difficulty: float, iteration: int) -> bool:
        return made.choose(["p0"], {"p0": difficulty}, iteration).sampled_ids == ["p0"]

    assert is_sampled(0.3, 0)
    assert is_sampled(0.46, 6), "half way it is at the quantiles 0.35 to 0.6"
    assert not is_sampled(0.34, 6)
    assert not is_sampled(0.3, 12), "the band ends at the quantiles 0.5 to 0.75"


def test_difficulty_is_the_mean_cross_entropy_of_a_demonstration() -> None:
    samples = refresh_of(config_of()).demonstration_samples(["p1", "p0"])
    assert [(s.problem_id, s.prompt_ids, s.response_ids) for s in samples] == [
        ("p1", [1, 1], [5, 9]),
        ("p0", [1, 0], [5, 9]),
    ]
    assert difficulties(samples, [[-1.0, -2.0], [-0.5, -0.5]]) == {"p1": 1.5, "p0": 0.5}
    assert difficulties(samples, [[-1.0], []]) == {"p1": 1.0, "p0": 0.0}


# ---- sample


def test_every_sample_of_every_refresh_has_a_seed_of_its_own() -> None:
    made = refresh_of(config_of(rollout=RolloutConfig(rollout_num_samples=3, rollout_guided_samples=0)))
    seeds = [
        seed
        for version in (0, 4)
        for request in made.requests(sampled("p0", "p1", weight_version=version))
        for seed in request.seeds
    ]
    assert len(set(seeds)) == len(seeds) == 12
    assert made.requests(sampled("p1", weight_version=4))[0].seeds == seeds[9:], "whatever else is sampled"


def test_a_response_that_servers_failed_to_deliver_does_not_move_the_others() -> None:
    responses = [response(10), None, response(12), response(13)]
    rollouts = as_rollouts("p", [1], responses, 5, str)
    assert [(r.sample_index, r.response_ids, r.weight_version) for r in rollouts] == [
        (0, [10], 5),
        (2, [12], 5),
        (3, [13], 5),
    ]


def test_rollouts_know_their_age_and_a_problem_without_any_is_left_out() -> None:
    made = refresh_of(config_of())
    choice = sampled("p0", "p1", weight_version=2)
    groups = made.group(choice, [[None, response(5, 9)], [None, None]], iteration=6)
    assert list(groups) == ["p0"]
    (rollout,) = groups["p0"].rollouts
    assert (rollout.weight_version, rollout.policy_age, rollout.prompt_ids) == (2, 4, [1, 0])
    assert rollout.text == decode([5, 9])


def test_replay_hands_out_new_rollouts_at_each_refresh(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    config = config_of(rollout=RolloutConfig(rollout_num_samples=2))
    stored = as_rollouts("p3", [1, 3], [response(5, i, 9) for i in range(5)], 0, decode)
    store.append(stored)
    prompts = {d.problem_id: d.prompt_ids for d in demonstrations(8)}
    made = refresh_of(config, replay=ReplayEngine([store.path], prompts))
    taken = []
    for _ in range(3):
        groups = made.replay(sampled("p0", "p3", weight_version=None))
        assert list(groups) == ["p3"], "the store has nothing for p0"
        made.verify(groups)
        made.record(groups)
        taken.append([r.response_ids[1] for r in groups["p3"].rollouts])
    assert taken == [[0, 1], [2, 3], [4, 0]]


def test_servers_are_probed_on_the_first_demonstrations() -> None:
    made = refresh_of(config_of())
    choice = ProblemChoice(problem_ids=["p5", "p4", "p3", "p2", "p1"], sampled_ids=[])
    assert [s.problem_id for s in made.probes(choice)] == ["p5", "p4", "p3", "p2"]


def guided() -> RolloutConfig:
    """Two rollouts of the prompt alone and one with a guide of one token."""
    return RolloutConfig(rollout_num_samples=3, rollout_guided_samples=1, rollout_guided_share=0.5)


def test_guided_rollouts_continue_the_beginning_of_the_demonstration() -> None:
    made = refresh_of(config_of(rollout=guided()))
    choice = sampled("p1", "p2", weight_version=4)
    requests = made.requests(choice)
    assert [r.prompt_ids for r in requests] == [[1, 1], [1, 2], [1, 1, 5], [1, 2, 5]]
    assert [len(r.seeds) for r in requests] == [2, 2, 1, 1]
    assert len({seed for r in requests for seed in r.seeds}) == 6, "each response has a seed of its own"
    group = made.group(choice, [answers(request) for request in requests], 4)["p2"]
    assert [r.num_guide_tokens for r in group.all_rollouts] == [0, 0, 1]
    assert [r.sample_index for r in group.all_rollouts] == [0, 1, 2]
    (continued,) = group.guided
    assert (continued.prompt_ids, continued.response_ids) == ([1, 2], [5, 5, 0, 9])
    assert continued.text == decode([5, 5, 0, 9]), "the verifier reads the guide too"


def test_a_problem_keeps_the_kind_of_rollouts_that_servers_delivered() -> None:
    made = refresh_of(config_of(rollout=guided()))
    choice = sampled("p1", "p2", "p3", weight_version=0)
    groups = made.group(
        choice, [[None, None], [None, None], [response(5), None], [response(5)], [None], [None]], 0
    )
    assert {i: (len(g.rollouts), len(g.guided)) for i, g in groups.items()} == {"p1": (0, 1), "p3": (1, 0)}


@pytest.mark.parametrize(("own", "continued", "kind"), [(6, 5, "demonstration"), (5, 6, "rollout")])
def test_guided_rollouts_decide_what_is_trained_on(own: int, continued: int, kind: str) -> None:
    """The stand-in verifier reads the first token, so a group's guide of one token is replaced here."""
    made = refresh_of(
        config_of(rollout=guided(), weighting=WeightingConfig(weighting_guidance_threshold=0.5))
    )
    ids = ["p1", "p2", "p3"]
    responses = [[response(own, i, 9), response(6, i, 9)] for i in range(3)]
    responses += [[response(continued, i, 9)] for i in range(3)]
    groups = made.group(sampled(*ids, weight_version=0), responses, 0)
    for group in groups.values():
        group.guided[0].response_ids = group.guided[0].response_ids[1:]
    made.verify(groups)
    samples = [sample for part in made.weigh(ids, groups) for sample in part]
    assert {s.kind for s in samples if s.weight} == {kind}
    assert {s.kind for s in samples if s.is_computed} == {kind}
    uncomputed = sum(len(s.response_ids) for s in samples if s.weight == 0)
    assert made.end([samples])[0].num_uncomputed == uncomputed
    assert all(group.guided[0].weight == 0 for group in groups.values())
    assert (made.guidance > 0.5) == (kind == "demonstration")
    again = refresh_of(config_of(rollout=guided()))
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.guidance == made.guidance


def test_the_store_replays_guided_rollouts_as_guided(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    made = refresh_of(config_of(rollout=guided()), store=store)
    groups = verified(made, ["p1"])
    made.record(groups)
    assert made.curriculum.solvability["p1"].num_samples == 2, (
        "guided rollouts are not part of the solve rate"
    )
    replay = ReplayEngine([store.path], {"p1": [1, 1]})
    (group,) = refresh_of(config_of(rollout=guided()), replay=replay).replay(sampled("p1")).values()
    assert [r.response_ids for r in group.guided] == [r.response_ids for r in groups["p1"].guided]
    assert [r.response_ids for r in group.rollouts] == [r.response_ids for r in groups["p1"].rollouts]


# ---- verify, weigh, record


def test_rollouts_are_graded_and_bad_texts_are_filtered() -> None:
    made = refresh_of(config_of(), decode=lambda ids: decode(ids) if ids[1] else "x")
    rollouts = verified(made, ["p0"])["p0"].rollouts
    assert [r.verdict for r in rollouts] == ["correct", "wrong", "correct", "wrong"]
    assert [bool(r.filtered_by) for r in rollouts] == [True, False, False, False], "too short"


def test_correct_rollouts_are_trained_beside_the_demonstration() -> None:
    made = refresh_of(config_of())
    groups = verified(made, ["p0"])
    solved, unsampled = made.weigh(["p0", "p1"], groups)
    assert [(s.kind, s.response_ids) for s in solved] == [
        ("demonstration", [5, 9]),
        ("rollout", [5, 0, 9]),
        ("rollout", [5, 2, 9]),
    ]
    assert [(s.kind, s.weight) for s in unsampled] == [("demonstration", 1.0)]
    assert [r.weight > 0 for r in groups["p0"].rollouts] == [True, False, True, False]


def test_weights_use_the_memory_from_before_this_refresh() -> None:
    made, fresh = refresh_of(config_of()), refresh_of(config_of())
    made.curriculum.record("p0", 4, 4)
    solved, unknown = (r.weigh(["p0"], verified(r, ["p0"]))[0][0].weight for r in (made, fresh))
    assert solved < unknown, "a problem that was solved before needs its demonstration less"


def test_the_placebo_weighs_every_problem_by_the_solvability_of_another() -> None:
    placebo = WeightingConfig(weighting_placebo=True, weighting_prior_strength=0.0)
    made = refresh_of(config_of(weighting=placebo))
    for problem_id, num_correct in {"p0": 0, "p1": 1, "p2": 4}.items():
        made.curriculum.record(problem_id, num_correct, 4)
    samples = made.weigh(["p0", "p1", "p2", "p3"], {})
    weights = [part[0].weight for part in samples]
    own = [1.5, 1.2, 0.3]
    assert sorted(weights[:3]) == pytest.approx(sorted(own)) and weights[3] == 1.0
    assert all(found != pytest.approx(mine) for found, mine in zip(weights, own, strict=False))
    assert [part[0].weight for part in made.weigh(["p0", "p1", "p2", "p3"], {})] == weights


def test_samples_that_do_not_fit_a_training_row_are_left_out() -> None:
    made = refresh_of(config_of())
    long = [response(5, *range(100, 160), 9), response(5, *range(200, 261), 9)]
    groups = made.group(sampled("p0"), [long], iteration=0)
    made.verify(groups)
    assert [s.num_tokens for s in made.weigh(["p0"], groups)[0]] == [4, 64]


def test_every_group_is_remembered_and_stored(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    made = refresh_of(config_of(), store=store)
    problem_ids = made.next_problems(0)
    pooled = "p0" if "p0" not in problem_ids else "p1"
    groups = verified(made, [problem_ids[0], pooled])
    made.weigh(problem_ids, groups)
    made.record(groups)
    assert made.curriculum.solvability == dict.fromkeys(groups, Solvability(0.5, 4.0, 1, 1))
    stored = list(read_rollouts(store.path))
    assert [r.problem_id for r in stored] == [problem_ids[0]] * 4 + [pooled] * 4
    assert [r.verdict for r in stored[:2]] == ["correct", "wrong"]


def test_batches_follow_the_order_of_the_problems() -> None:
    made = refresh_of(config_of())
    samples = made.weigh(["p0", "p1", "p2"], verified(made, ["p2"]))
    assert made.end(samples) == [(2, 2, 0), (1, 3, 0)]


# ---- score under the reference


def test_samples_with_equal_content_are_scored_once_and_remembered() -> None:
    made = refresh_of(config_of(objective=SftKl()), cache=LogprobCache(None, ""))

    def samples(*prompts: int) -> list[TrainingSample]:
        return [
            TrainingSample(
                problem_id=str(i), kind="demonstration", prompt_ids=[p], response_ids=[2], weight=1.0
            )
            for i, p in enumerate(prompts)
        ]

    first = samples(7, 7, 8)
    unknown = made.fill_reference(first)
    assert [s.prompt_ids for s in unknown] == [[7], [8]]
    made.add_reference(first, unknown, [[-0.5], [-0.25]])
    assert [list(s.ref_logprobs or ()) for s in first] == [[-0.5], [-0.5], [-0.25]]
    assert made.fill_reference(samples(8, 7)) == []


# ---- --rollout-lag 1


@pytest.mark.parametrize(
    ("lag", "iteration", "num_problems", "ahead"),
    [
        (0, 0, 4, None),
        (1, 0, 4, 2),
        (1, 2, 3, 4),
        (1, 8, 4, 10),
        (1, 10, 4, None),
        (1, 10, 3, None),
    ],
)
def test_the_next_refresh_is_sampled_ahead_unless_the_run_ends_first(
    lag: Any, iteration: int, num_problems: int, ahead: int | None
) -> None:
    engine = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"], rollout_lag=lag)
    made = refresh_of(config_of(rollout=engine))
    assert made.iteration_ahead(sampled(*"abcd"[:num_problems]), iteration) == ahead


def test_problems_chosen_ahead_are_handed_out_once() -> None:
    made = refresh_of(config_of())
    choice = sampled("p0")
    assert made.take_ahead() is None
    made.keep_ahead(choice)
    assert made.take_ahead() is choice
    assert made.take_ahead() is None


# ---- resume


def test_a_checkpoint_written_during_a_refresh_repeats_it() -> None:
    made = refresh_of(config_of())
    made.keep_ahead(sampled("p0", "p1"))
    before = json.dumps(made.state_dict())
    made.begin()
    made.take_ahead()
    made.record(verified(made, made.next_problems(0)))
    assert json.dumps(made.state_dict()) == before
    made.end([])
    assert json.dumps(made.state_dict()) != before


def test_problems_chosen_ahead_are_sampled_again_after_resuming() -> None:
    made, resumed = refresh_of(config_of()), refresh_of(config_of())
    made.keep_ahead(ProblemChoice(problem_ids=["p0", "p1"], sampled_ids=["p1"], weight_version=3))
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    lost = ProblemChoice(problem_ids=["p0", "p1"], sampled_ids=["p1"], weight_version=None)
    assert resumed.take_ahead() == lost


def test_a_resumed_refresh_chooses_and_weighs_like_the_unbroken_one() -> None:
    config = config_of(run=RunConfig(rasft_refresh_interval=2))
    made = refresh_of(config)
    made.record(verified(made, made.next_problems(0)))
    resumed = refresh_of(config)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert resumed.curriculum.solvability == made.curriculum.solvability
    for step in (2, 4):
        problem_ids = made.next_problems(step)
        assert resumed.next_problems(step) == problem_ids
        outcomes = [r.weigh(problem_ids, verified(r, problem_ids, step)) for r in (made, resumed)]
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("digests", [("a1", "b2"), ("", "b2"), ("a1", "")])
def test_resuming_with_other_code_of_the_verifying_function_is_said(digests: tuple[str, str]) -> None:
    made, same, other = (refresh_of(config_of(), function_digest=d) for d in (digests[0], *digests))
    state = json.loads(json.dumps(made.state_dict()))
    assert same.load_state_dict(state) == []
    (line,) = other.load_state_dict(state)
    assert "--verify-function" in line and all(digest in line for digest in digests)


def test_state_of_a_run_before_there_were_functions_is_read() -> None:
    state = refresh_of(config_of()).state_dict()
    del state["verify_function"]
    assert refresh_of(config_of()).load_state_dict(state) == []


class RewardingVerifier:
    """Gives every second response half of the reward."""

    def verify(self, rollouts: Any, checks: Any, look_up: Any) -> None:
        for rollout in rollouts:
            rollout.reward = 1.0 if rollout.response_ids[0] == 5 else 0.5
            rollout.verdict = "correct" if rollout.reward == 1.0 else "wrong"


def test_rewards_enter_the_solve_rate_and_the_store_keeps_them(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    made = refresh_of(config_of(), store=store, verifier=RewardingVerifier())
    groups = verified(made, ["p0"])
    weighed = made.weigh(["p0"], groups)
    made.record(groups)
    assert made.curriculum.solvability["p0"].solve_rate == 0.75
    assert [r.reward for r in read_rollouts(store.path)] == [1.0, 0.5, 1.0, 0.5]
    trained = [s.response_ids for s in weighed[0] if s.kind == "rollout"]
    assert trained and all(ids[0] == 5 for ids in trained), "a part of the reward is not trained on"


def test_text_filters_leave_responses_alone_that_an_own_function_grades() -> None:
    made = refresh_of(config_of(), decode=lambda ids: "short")
    assert {r.filtered_by for r in verified(made, ["p0"])["p0"].rollouts} == {"too_short"}
    judged = refresh_of(config_of(), decode=lambda ids: "short", judges=True)
    assert {r.filtered_by for r in verified(judged, ["p0"])["p0"].rollouts} == {""}


def test_sampling_follows_the_flags() -> None:
    config = config_of(rollout=RolloutConfig(rollout_num_samples=4, rollout_top_p=0.5))
    params = refresh.sampling_params(config, STOP_IDS, 128)
    assert (params.num_samples, params.top_p, params.stop_ids, params.max_response_tokens(120)) == (
        3,
        0.5,
        STOP_IDS,
        8,
    )
