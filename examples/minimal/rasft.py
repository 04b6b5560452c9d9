"""RASFT in one file: plain transformers, one process, without Megatron, servers or megatron_rasft.

    python examples/minimal/rasft.py --hf-model MODEL --train-data train.jsonl --rollout-store rollouts.jsonl

Start reading at ``main``. The file is also an independent check of the product: given the rollouts that it stored,
pretrain_rasft.py computes the same losses (tests/functional/test_minimal.py). It implements the objective ``rasft`` with
``--rasft-weighting adaptive``, in fp32, for problems whose answer is a number.
"""

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Problem:
    """A row of the training data, tokenised once. The demonstration ends with the end-of-sequence token."""

    problem_id: str
    answer: Fraction | None
    prompt_ids: list[int]
    demonstration_ids: list[int]


@dataclass
class Rollout:
    """A response that the policy sampled, and its verdict. It begins with ``num_guide_tokens`` of the demonstration."""

    response_ids: list[int]
    text: str
    is_correct: bool
    num_guide_tokens: int


@dataclass
class Sample:
    """A sequence to train on: a demonstration or a correct rollout, with its weight A."""

    prompt_ids: list[int]
    response_ids: list[int]
    weight: float
    is_demonstration: bool = False
    ref_logprobs: Any = None  # [response tokens] fp32, nats, under the frozen reference


# ---- the data


def read_problems(path: Path, tokenizer: Any, system_prompt: str) -> list[Problem]:
    """Reads rows {"id", "problem", "response", "answer"} and tokenises prompt and response separately.

    A rollout continues exactly the tokens that the demonstration continues, so both are conditioned on the same prompt.
    """
    problems = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": row["problem"]})
        prompt = "\n\n".join(message["content"] for message in messages) + "\n"
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        response_ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        response_ids.append(tokenizer.eos_token_id)
        problems.append(Problem(row["id"], number(row["answer"]), prompt_ids, response_ids))
    return problems


# ---- rollouts and their verdicts


@torch.no_grad()
def sample(model: Any, tokenizer: Any, problem: Problem, args: argparse.Namespace) -> list[Rollout]:
    """Samples and verifies K responses of the current policy. The last one continues the beginning of the demonstration."""
    end_id, demonstration = tokenizer.eos_token_id, problem.demonstration_ids
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": end_id}
    settings |= {"max_new_tokens": args.max_new_tokens, "pad_token_id": end_id}
    rollouts, beginning = [], demonstration[: max(1, int(GUIDED_SHARE * len(demonstration)))]
    for num, guide in ((args.num_samples - 1, []), (1, beginning)):
        prompt = torch.tensor([problem.prompt_ids + guide])
        mask = torch.ones_like(prompt)
        outputs = model.generate(prompt, attention_mask=mask, num_return_sequences=num, **settings)
        for ids in outputs[:, len(problem.prompt_ids) :].tolist():
            is_complete = end_id in ids
            ids = ids[: ids.index(end_id) + 1] if is_complete else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            # A response that was truncated by the length limit never counts as solved.
            is_correct = is_complete and given_answer(text) == problem.answer
            rollouts.append(Rollout(ids, text, is_correct, len(guide)))
    return rollouts


def given_answer(text: str) -> Fraction | None:
    r"""The final answer of a response: the content of its last \boxed{}, or without a box its last number."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = boxes or re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)
    return number(numbers[-1]) if numbers else None


def number(text: str) -> Fraction | None:
    """Parses an integer, a decimal or a fraction; None for anything else."""
    try:
        return Fraction(text.strip().strip("$").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def distinct(rollouts: list[Rollout]) -> list[Rollout]:
    """Drops rollouts whose word 3-grams have a Jaccard similarity of at least 0.82 with an earlier rollout's."""
    kept: list[tuple[set, Rollout]] = []
    for rollout in rollouts:
        words = rollout.text.lower().split()
        n = min(3, len(words))
        grams = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        if all(len(grams & other) / max(1, len(grams | other)) < 0.82 for other, _ in kept):
            kept.append((grams, rollout))
    return [rollout for _, rollout in kept]


# ---- from the solve rate to weights

DEMONSTRATION_MAX, DEMONSTRATION_MIN, ROLLOUT_TOTAL = 1.5, 0.3, 0.7
NEUTRAL = 1 - (1 - DEMONSTRATION_MIN) / (DEMONSTRATION_MAX - DEMONSTRATION_MIN)
"""The solvability at which a demonstration has weight 1, like the demonstration of an unsampled problem."""
# length of a guide, weight of a solved attempt in a gain, probability below which demonstrations are left out
GUIDED_SHARE, SOLVED_SHARE, THRESHOLD = 0.3, 0.25, 0.05
MEMORY = 0.5  # share of earlier counts that is kept: old rollouts describe the changed policy less well


def solvability(counts: dict[str, tuple[float, float]], problem_id: str, rollouts: list[Rollout]) -> float:
    """The solve rate s of a problem, with one pseudo-rollout at NEUTRAL. Adds its new rollouts to ``counts``: how many solved, how many in all."""
    solved, sampled = counts.get(problem_id, (0.0, 0.0))
    solved = MEMORY * solved + sum(r.is_correct for r in rollouts)
    sampled = MEMORY * sampled + len(rollouts)
    counts[problem_id] = solved, sampled
    return (solved + NEUTRAL) / (sampled + 1)


def gain(alone: list[Rollout], guided: Rollout) -> float:
    """How much better the policy does on a problem if it begins like the demonstration, above all where it fails.

    A failed attempt counts fully, a solved one a quarter. The other attempts say how often the policy solves the problem.
    """
    num, solved = len(alone), sum(r.is_correct for r in alone)
    in_failures = (1 - solved / num) * (guided.is_correct - solved / (num - 1))
    in_successes = solved / num * (guided.is_correct - max(0, solved - 1) / (num - 1))
    return in_failures + SOLVED_SHARE * in_successes


def guidance(sums: list[float], gains: list[float]) -> float:
    """The probability that the mean gain is above 0. ``sums`` are its number, sum and sum of squares over all refreshes, discounted."""
    new = (len(gains), sum(gains), sum(value * value for value in gains))
    sums[:] = [MEMORY * old + added for old, added in zip(sums, new, strict=True)]
    num, total, squares = sums
    # 2 / num: as if the gains 1 and -1 were among them. Equal gains of a few problems are not yet certainty.
    variance = max(0.0, squares / num - (total / num) ** 2) + 2 / num
    return 0.5 * (1 + math.erf(total / math.sqrt(2 * variance * num)))


def weigh(problem: Problem, alone: list[Rollout], s: float, imitates: bool) -> list[Sample]:
    """Weighs the demonstration more for a hard problem, or the policy's own solutions more for an easy problem."""
    weight = imitates * (DEMONSTRATION_MIN + (DEMONSTRATION_MAX - DEMONSTRATION_MIN) * (1 - s))
    demonstration = Sample(problem.prompt_ids, problem.demonstration_ids, weight, is_demonstration=True)
    # Solutions share their weight by tokens: weight x tokens of a problem does not depend on their number and lengths.
    solutions = [] if imitates else distinct([r for r in alone if r.is_correct])
    num_tokens = sum(len(r.response_ids) for r in solutions)
    each = ROLLOUT_TOTAL * s * len(problem.demonstration_ids) / max(1, num_tokens)
    return [demonstration, *(Sample(problem.prompt_ids, r.response_ids, each) for r in solutions)]


# ---- the loss


def response_logprobs(model: nn.Module, sample: Sample) -> Tensor:
    """[response tokens] fp32: log-probability of each response token, in nats."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]


def token_loss_sum(logprobs: Tensor, ref_logprobs: Tensor, weight: float) -> Tensor:
    """Sum over a response of the RASFT loss: -log p, weighted by A, by p itself and by the drift ratio.

    The ratio of reference to policy is one number per sequence, from the mean log-probabilities, clipped to 0.4 .. 1.2: a
    response that is much more likely under the policy than under the reference gets less weight. Only -log p has a gradient.
    """
    policy = logprobs.detach()
    ratio = (ref_logprobs - policy).mean().clamp(-20, 20).exp().clamp(0.4, 1.2)
    return (ratio * weight * policy.exp() * -logprobs).sum()


def train_step(model: nn.Module, optimizer: Any, samples: list[Sample], rate: float) -> tuple[float, int]:
    """One optimizer step on the samples of a batch of problems. Returns the loss and the number of samples with a gradient.

    The sum is divided once, by the demonstration tokens of the batch: the length of the rollouts does not change the gradient of a
    demonstration. Adam divides a gradient by its own size, so small weights make a smaller step only through the rate.
    """
    num_tokens = sum(len(s.response_ids) for s in samples if s.is_demonstration)
    total, computed = 0.0, [s for s in samples if s.weight]
    mass = sum(s.weight * len(s.response_ids) for s in computed) / num_tokens
    optimizer.param_groups[0]["lr"] = rate * min(1.0, mass)
    optimizer.zero_grad()
    for item in computed:
        loss = token_loss_sum(response_logprobs(model, item), item.ref_logprobs, item.weight) / num_tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total, len(computed)


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 0. Steps count from 0; the first has the rate 1 / (steps of the warm-up)."""
    if step < args.lr_warmup_iters:
        return args.lr * (step + 1) / args.lr_warmup_iters
    share = (step - args.lr_warmup_iters) / (total - args.lr_warmup_iters)
    return args.lr * 0.5 * (1 + math.cos(math.pi * share))


# ---- the run


def main() -> None:
    """Each refresh: sample, verify, weigh and score the next problems, then train on them."""
    args = parse()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(args.hf_model, dtype=torch.float32).eval() for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-8)
    problems = read_problems(args.train_data, tokenizer, args.system_prompt)
    counts: dict[str, tuple[float, float]] = {}
    total = args.train_iters or -(-len(problems) // args.batch_size)
    step, epoch, evidence = 0, 0, [0.0, 0.0, 0.0]
    while step < total:
        order = list(problems)
        random.Random(f"curriculum {args.seed} epoch {epoch}").shuffle(order)  # the product's order
        epoch += 1
        while order and step < total:
            num = min(args.refresh_interval, total - step) * args.batch_size
            chosen, order = order[:num], order[num:]
            groups = [sample(policy, tokenizer, problem, args) for problem in chosen]
            helps = guidance(evidence, [gain(alone, guided) for *alone, guided in groups])
            weighed = []
            for problem, (*alone, guided) in zip(chosen, groups, strict=True):
                s = solvability(counts, problem.problem_id, alone)
                weighed.append(weigh(problem, alone, s, imitates=helps >= THRESHOLD))
                for item in weighed[-1]:
                    if item.weight:
                        item.ref_logprobs = response_logprobs(reference, item).detach()
                store(args.rollout_store, problem, [*alone, guided], step, tokenizer.eos_token_id)
            for start in range(0, len(chosen), args.batch_size):
                batch = [item for samples in weighed[start : start + args.batch_size] for item in samples]
                loss, num_computed = train_step(policy, optimizer, batch, learning_rate(step, total, args))
                step += 1
                print(json.dumps({"step": step, "loss": loss, "num_samples": num_computed}), flush=True)


def store(path: Path, problem: Problem, rollouts: list[Rollout], step: int, eos_id: int) -> None:
    """Appends rollouts in the product's format, for its ``--rollout-engine replay --rollout-replay FILE``."""
    with path.open("a", encoding="utf-8") as file:
        for index, rollout in enumerate(rollouts):
            row = {name: value for name, value in vars(rollout).items() if name != "is_correct"}
            row |= {"problem_id": problem.problem_id, "sample_index": index, "weight_version": step}
            row["prompt_ids"] = problem.prompt_ids
            row["response_logprobs"] = [0.0] * (len(rollout.response_ids) - rollout.num_guide_tokens)
            row["finish_reason"] = "stop" if rollout.response_ids[-1] == eos_id else "length"
            file.write(json.dumps(row) + "\n")


def parse() -> argparse.Namespace:
    """The flags; their defaults are the quickstart's settings."""
    parser = argparse.ArgumentParser(description="RASFT in one file, on plain transformers.")
    parser.add_argument("--hf-model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--train-data", type=Path, required=True, metavar="FILE", help="rows in JSON lines")
    parser.add_argument("--rollout-store", type=Path, required=True, metavar="FILE", help="file to append to")
    parser.add_argument("--system-prompt", default="You solve arithmetic.")
    parser.add_argument("--batch-size", type=int, default=16, help="problems in a step")
    parser.add_argument("--refresh-interval", type=int, default=3, help="steps between rollouts")
    parser.add_argument("--train-iters", type=int, help="steps; default: one epoch")
    parser.add_argument("--num-samples", type=int, default=4, help="rollouts of a problem (K), at least 3")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longest rollout")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--lr-warmup-iters", type=int, default=2, help="steps of linear warm-up")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the order and of sampling")
    return parser.parse_args()


if __name__ == "__main__":
    main()
