"""Pre-trains the base model of a world with plain PyTorch: a Llama of 0.6 million parameters. Takes four to seven minutes on one core.

pretrain_base.py NAME --output DIR [--begin-with DIR]

Prints the loss as it goes, and at the end the SHA-256 of the weights. Another machine makes slightly different ones, because the order in
which a processor sums up differs.
"""

import argparse
import hashlib
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lets the file run from a checkout that is not installed

from examples.proving_ground.worlds import CORPORA, Corpus, Phase, corpus_item, symbols  # noqa: E402

PIECES = r" ?\\boxed\{| ?[a-z]+|[\s\S]"
"""A token: a box, a word with the blank before it, or one character."""

Example = tuple[list[int], int]
"""Token ids of prompt and response, and the number of those of the prompt."""


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer of all worlds."""
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    )


def encode(text: str, ids: dict[str, int]) -> list[int]:
    """Returns the token ids that the tokenizer gives, faster."""
    return [ids[piece] for piece in re.findall(PIECES, text)]


def new_model() -> transformers.LlamaForCausalLM:
    """Returns a model with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(symbols()), hidden_size=128, intermediate_size=320, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=None, rope_theta=10000.0, initializer_range=0.05,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(corpus: Corpus, phase: Phase, rng: random.Random, ids: dict[str, int]) -> Iterator[list[Example]]:
    """Yields batches of ``phase.batch_tokens`` tokens with their padding, without end."""
    while True:
        pool: list[Example] = []
        for _ in range(8000):
            problem, response = corpus_item(corpus, rng, phase)
            prompt = encode(problem + "\n", ids)
            pool.append((prompt + encode(response, ids) + [0], len(prompt)))
        pool.sort(key=lambda example: len(example[0]) + 3 * rng.random())
        ready: list[list[Example]] = []
        batch: list[Example] = []
        for example in pool:  # ends with the longest example of its batch
            if batch and len(example[0]) * (len(batch) + 1) > phase.batch_tokens:
                ready.append(batch)
                batch = []
            batch.append(example)
        rng.shuffle(ready)
        yield from ready


def loss_of(model: transformers.LlamaForCausalLM, batch: list[Example]) -> torch.Tensor:
    """Returns the mean cross-entropy of the responses."""
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, (tokens, num_prompt) in enumerate(batch):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, num_prompt : len(tokens)] = torch.tensor(tokens[num_prompt:])
    logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(model: transformers.LlamaForCausalLM, corpus: Corpus, phase: Phase, seed: int) -> None:
    """Trains through one phase: Muon for the matrices, AdamW for the rest; 50 steps of warm-up, then linear decay after 20 %."""
    rng, ids = random.Random(seed), {symbol: number for number, symbol in enumerate(symbols())}
    named = list(model.named_parameters())
    is_matrix = {name: p.ndim == 2 and "embed" not in name and "lm_head" not in name for name, p in named}
    optimizers = [
        torch.optim.Muon(
            [p for n, p in named if is_matrix[n]], lr=phase.muon_lr, momentum=0.95, weight_decay=0.0
        ),
        torch.optim.AdamW(
            [p for n, p in named if not is_matrix[n]], lr=phase.adam_lr, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _share_of_peak(step, phase.steps))
        for o in optimizers
    ]
    began, mean = time.monotonic(), 0.0
    for step, batch in zip(range(phase.steps), batches(corpus, phase, rng, ids)):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 60 == 0 or step + 1 == phase.steps:
            print(
                f"step {step + 1} of {phase.steps}, loss {mean:.4f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )


def _share_of_peak(step: int, total: int) -> float:
    """Learning rate of a step as a share of the peak."""
    decay = 1.0 if step < 0.2 * total else 1 - 0.98 * (step / total - 0.2) / 0.8
    return min(1.0, (step + 1) / 50) * decay


def depth_of(name: str) -> int:
    """Returns how many models a base model begins with, one after the other."""
    begins_with = CORPORA[name].begins_with
    return 1 + depth_of(begins_with) if begins_with else 0


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(CORPORA))
    parser.add_argument("--output", type=Path, required=True, help="model folder")
    parser.add_argument(
        "--begin-with", type=Path, help="model folder of the corpus that this one begins with"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    corpus = CORPORA[args.name]
    if bool(corpus.begins_with) != bool(args.begin_with):
        parser.error(
            f"--begin-with must be {f'the model {corpus.begins_with}' if corpus.begins_with else 'left out'}"
        )
    torch.set_num_threads(1)  # sums up in the same order on machines with more cores
    transformers.utils.logging.disable_progress_bar()  # the log is kept
    torch.manual_seed(args.seed)
    model = transformers.LlamaForCausalLM.from_pretrained(args.begin_with) if args.begin_with else new_model()
    model.float()
    for number, phase in enumerate(corpus.phases):
        train(model, corpus, phase, seed=100 * args.seed + 10 * depth_of(args.name) + number)
    model.half().save_pretrained(args.output)
    build_tokenizer().save_pretrained(args.output)
    weights = (args.output / "model.safetensors").read_bytes()
    print(f"SHA-256 of model.safetensors: {hashlib.sha256(weights).hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
