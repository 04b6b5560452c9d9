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
    """A response that the policy sampled, and its verdict."""

    response_ids: list[int]
    text: str
    is_correct: bool


@dataclass
class Sample:
    """A sequence to train on: a demonstration or a correct rollout, with its weight A."""

    prompt_ids: list[int]
    response_ids: list[int]
    weight: float
    is_demonstration: bool = False
    ref_logprobs: Tensor | None = None  # [response tokens] fp32, nats, under the frozen reference


# ---- the data


def read_problems(path: Path, tokenizer: Any, system_prompt: str) -> list[Problem]:
    """Reads rows {"id", "problem", "response", "answer"} and tokenises prompt and response separately.

    A rollout continues exactly the tokens that the demonstration continues, so both are conditioned on the same prompt.
    """
    problems = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": row["problem"]})
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n\n".join(message["content"] for message in messages) + "\n"
        prompt_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        response_ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        problems.append(
            Problem(row["id"], number(row["answer"]), prompt_ids, [*response_ids, tokenizer.eos_token_id])
        )
    return problems


def in_order(problems: list[Problem], seed: int, epoch: int) -> list[Problem]:
    """Shuffles the problems for an epoch, in the order of the product's --data-seed."""
    order = list(problems)
    random.Random(f"curriculum {seed} epoch {epoch}").shuffle(order)
    return order


# ---- rollouts and their verdicts


@torch.no_grad()
def sample(model: Any, tokenizer: Any, problem: Problem, args: argparse.Namespace) -> list[Rollout]:
    """Samples K responses of the current policy and verifies them."""
    prompt = torch.tensor([problem.prompt_ids])
    end_id = tokenizer.eos_token_id
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": end_id}
    settings |= {"num_return_sequences": args.num_samples, "max_new_tokens": args.max_new_tokens}
    outputs = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=end_id, **settings)
    rollouts = []
    for ids in outputs[:, prompt.shape[1] :].tolist():
        is_complete = end_id in ids
        if is_complete:
            ids = ids[: ids.index(end_id) + 1]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # A response that was truncated by the length limit never counts as solved.
        rollouts.append(Rollout(ids, text, is_complete and given_answer(text) == problem.answer))
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

DEMONSTRATION_MAX, DEMONSTRATION_MIN = 1.5, 0.3
ROLLOUT_TOTAL = 0.7
NEUTRAL = 1 - (1 - DEMONSTRATION_MIN) / (DEMONSTRATION_MAX - DEMONSTRATION_MIN)
"""The solvability at which a demonstration has weight 1, like the demonstration of an unsampled problem."""
MEMORY = 0.5  # share of earlier counts that is kept: old rollouts describe the changed policy less well


class Solvability:
    """The policy's solve rate on each problem, smoothed over refreshes and by one pseudo-rollout at ``NEUTRAL``."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, float]] = {}

    def update(self, problem_id: str, rollouts: list[Rollout]) -> float:
        """Adds a problem's new rollouts and returns the estimate of s, 0 .. 1."""
        solved, sampled = self._counts.get(problem_id, (0.0, 0.0))
        solved = MEMORY * solved + sum(r.is_correct for r in rollouts)
        sampled = MEMORY * sampled + len(rollouts)
        self._counts[problem_id] = solved, sampled
        return (solved + NEUTRAL) / (sampled + 1)


def weigh(problem: Problem, rollouts: list[Rollout], s: float) -> list[Sample]:
    """Weighs the demonstration more for a hard problem, and the policy's own solutions more for an easy problem."""
    weight = DEMONSTRATION_MIN + (DEMONSTRATION_MAX - DEMONSTRATION_MIN) * (1 - s)
    demonstration = Sample(problem.prompt_ids, problem.demonstration_ids, weight, is_demonstration=True)
    # Solutions share their weight by tokens: weight x tokens of a problem does not depend on their number and lengths.
    solutions = distinct([r for r in rollouts if r.is_correct])
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


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> float:
    """One optimizer step on the samples of a batch of problems; returns the loss.

    The sum is divided once, by the number of demonstration tokens of the batch: neither the split into forward passes nor the
    length of the rollouts changes the gradient of a demonstration.
    """
    num_tokens = sum(len(s.response_ids) for s in samples if s.is_demonstration)
    total = 0.0
    optimizer.zero_grad()
    for item in samples:
        assert item.ref_logprobs is not None
        loss = token_loss_sum(response_logprobs(model, item), item.ref_logprobs, item.weight) / num_tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


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
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args.hf_model, dtype=torch.float32).eval() for _ in range(2)
    )
    reference.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-8)
    problems = read_problems(args.train_data, tokenizer, args.system_prompt)
    solvability = Solvability()
    total = args.train_iters or -(-len(problems) // args.batch_size)
    step = epoch = 0
    while step < total:
        order = in_order(problems, args.seed, epoch)
        epoch += 1
        while order and step < total:
            num = min(args.refresh_interval, total - step) * args.batch_size
            chosen, order = order[:num], order[num:]
            batches: dict[str, list[Sample]] = {}
            for problem in chosen:
                rollouts = sample(policy, tokenizer, problem, args)
                samples = weigh(problem, rollouts, solvability.update(problem.problem_id, rollouts))
                for item in samples:
                    item.ref_logprobs = response_logprobs(reference, item).detach()
                batches[problem.problem_id] = samples
                if args.rollout_store is not None:
                    store(args.rollout_store, problem, rollouts, step, tokenizer.eos_token_id)
            for start in range(0, len(chosen), args.batch_size):
                batch = [s for p in chosen[start : start + args.batch_size] for s in batches[p.problem_id]]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, args)
                loss = train_step(policy, optimizer, batch)
                step += 1
                print(json.dumps({"step": step, "loss": loss, "num_samples": len(batch)}), flush=True)
    if args.output is not None:
        policy.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


def store(path: Path, problem: Problem, rollouts: list[Rollout], step: int, eos_id: int) -> None:
    """Appends rollouts in the product's format, for its ``--rollout-engine replay --rollout-replay FILE``."""
    with path.open("a", encoding="utf-8") as file:
        for index, rollout in enumerate(rollouts):
            row = {
                "problem_id": problem.problem_id,
                "sample_index": index,
                "weight_version": step,
                "prompt_ids": problem.prompt_ids,
                "response_ids": rollout.response_ids,
                "response_logprobs": [0.0] * len(rollout.response_ids),
                "finish_reason": "stop" if rollout.response_ids[-1] == eos_id else "length",
                "text": rollout.text,
            }
            file.write(json.dumps(row) + "\n")


def parse() -> argparse.Namespace:
    """The flags; their defaults are the quickstart's settings."""
    parser = argparse.ArgumentParser(description="RASFT in one file, on plain transformers.")
    parser.add_argument("--hf-model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--train-data", type=Path, required=True, metavar="FILE", help="rows in JSON lines")
    parser.add_argument("--rollout-store", type=Path, metavar="FILE", help="file to append rollouts to")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the trained model")
    parser.add_argument("--system-prompt", default="You solve arithmetic.")
    parser.add_argument("--batch-size", type=int, default=16, help="problems in a step")
    parser.add_argument("--refresh-interval", type=int, default=3, help="steps between rollouts")
    parser.add_argument("--train-iters", type=int, help="steps; default: one epoch")
    parser.add_argument("--num-samples", type=int, default=4, help="rollouts of a problem (K)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longest rollout")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--lr-warmup-iters", type=int, default=2, help="steps of linear warm-up")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the order and of sampling")
    return parser.parse_args()


if __name__ == "__main__":
    main()
