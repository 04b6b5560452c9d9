"""Counts kernels, memory traffic and host reads per token when the trainer samples; measures tokens per second on a GPU.

    python benchmarks/generation.py --shape qwen2.5-1.5b --rows 256 --bf16 [any Megatron flag]

The decode step is counted on tensors without data, so the counts are the same on every machine. They hold for the plain layers.
Transformer Engine's layers need data and fuse some of the kernels, so their steps cannot be counted (use --transformer-impl local).
On a machine with a GPU the model also samples with random weights. Responses end at random tokens after --mean-tokens on average.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from benchmarks.shapes import SHAPES  # noqa: E402
from benchmarks.traffic import Traffic  # noqa: E402
from megatron_rasft.generation.decoding import KEY_BUCKET, Decoder  # noqa: E402
from megatron_rasft.generation.kv_cache import KeyValueCache  # noqa: E402
from megatron_rasft.generation.policy_sampler import STEPS_PER_READ, PolicySampler, generation_mode  # noqa: E402
from megatron_rasft.model.model_chunks import build_chunk  # noqa: E402
from megatron_rasft.training import startup  # noqa: E402
from megatron_rasft.types import Request, SamplingParams  # noqa: E402

HBM_BYTES_PER_S = 2.7e12
"""Memory bandwidth that an H100 SXM reaches in practice, of 3.35e12 bytes per second."""
MATMUL_FLOPS = 650e12
"""BF16 FLOPs per second that an H100 SXM reaches in practice, of 989e12."""
KERNEL_S = 2e-6
"""Minimum time of a small kernel inside a CUDA graph, seconds."""

BAR_TOKENS_PER_S = 12_000
"""Tokens per second to reach with the qwen2.5-1.5b shape and 256 rows on one H100: three tenths of SGLang's 39,900."""


def write_folder(shape: str, path: Path) -> None:
    """Writes a Qwen2 folder of this shape. The weights are a sparse file of zeros, because only the description is read."""
    config = transformers.Qwen2Config(**SHAPES[shape])
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    header, start = {}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        end = start + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    path.mkdir()
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(path)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def sampling(options: argparse.Namespace, vocab_size: int) -> SamplingParams:
    """Sampling parameters whose end tokens end a response after --mean-tokens on average: a random model's tokens are nearly
    uniform."""
    return SamplingParams(
        num_samples=4,
        max_new_tokens=options.new_tokens,
        temperature=1.0,
        top_p=options.top_p,
        repetition_penalty=1.0,
        stop_ids=frozenset(range(max(1, vocab_size // options.mean_tokens))),
        max_batch_size=options.rows,
    )


def requests(num: int, params: SamplingParams, prompt_tokens: int, vocab_size: int) -> list[Request]:
    """Makes prompts of random tokens."""
    draw = random.Random(0)
    return [
        Request(
            prompt_ids=[draw.randrange(vocab_size) for _ in range(prompt_tokens)],
            seeds=[draw.randrange(2**31) for _ in range(params.num_samples)],
        )
        for _ in range(num)
    ]


def count(sampler: PolicySampler, options: argparse.Namespace) -> dict[str, Any]:
    """Counts kernels and memory traffic of one decode step for all rows, at half of the longest sequence."""
    params = sampling(options, sampler.vocab_size)
    length = -(-(options.prompt_tokens + options.new_tokens) // KEY_BUCKET) * KEY_BUCKET
    cache = KeyValueCache(options.rows, length)
    model = replace(sampler.decoder_model(cache), has_graphs=False)
    keys = -(-(options.prompt_tokens + options.new_tokens // 2) // KEY_BUCKET) * KEY_BUCKET
    with generation_mode(sampler.chunks, cache):
        decoder = Decoder(model, cache, [], params, lambda: False)
        # a fake tensor has no data, so any read of a value on the host raises
        decoder.step(keys)
        with Traffic() as forward:
            decoder.logits(options.rows, keys)
        with Traffic() as whole:
            decoder.step(keys)
    launches_s = KERNEL_S * whole.num_kernels
    least_s = max(whole.all_bytes / HBM_BYTES_PER_S, whole.matmul_flops / MATMUL_FLOPS)
    return {
        "keys_attended": keys,
        "kernels_of_the_model": forward.num_kernels,
        "kernels_of_sampling": whole.num_kernels - forward.num_kernels,
        "gb_of_the_model": round(forward.all_bytes / 1e9, 3),
        "gb_of_sampling": round((whole.all_bytes - forward.all_bytes) / 1e9, 3),
        "host_reads_per_token_of_all_rows": 2 / STEPS_PER_READ["cuda"],
        "ESTIMATE_h100_ms_per_token_of_all_rows": round(1e3 * (least_s + launches_s), 2),
        "bar_h100_tokens_per_s": BAR_TOKENS_PER_S,
        "ESTIMATE_h100_tokens_per_s": round(options.rows / (least_s + launches_s)),
    }


def measure(sampler: PolicySampler, options: argparse.Namespace) -> dict[str, Any]:
    """Measures tokens per second, after a warm-up, over enough samples that most rows are refilled."""
    params = sampling(options, sampler.vocab_size)
    num = max(1, options.rounds * options.rows // params.num_samples)
    asked = requests(num, params, options.prompt_tokens, sampler.vocab_size)
    sampler.generate(asked[: max(1, num // 16)], params)
    torch.cuda.synchronize()
    memory_gib = host_memory_gib()
    began = time.perf_counter()
    groups = sampler.generate(asked, params)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens = sum(len(r.token_ids) for group in groups for r in group)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "host_gib_before": memory_gib,
        "host_gib_after": host_memory_gib(),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def host_memory_gib() -> float:
    """Resident memory of this process, which would grow if attention plans were kept for every length."""
    return round(psutil.Process().memory_info().rss / 2**30, 3)


def main() -> None:
    """Counts, measures if there is a GPU, and prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--rows", type=int, default=256, help="sequences decoded at once")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=1024, help="longest response")
    parser.add_argument("--mean-tokens", type=int, default=500, help="mean length of a response")
    parser.add_argument("--top-p", type=float, default=1.0, help="see --rollout-top-p")
    parser.add_argument("--rounds", type=int, default=4, help="samples per row in the measurement on a GPU")
    parser.add_argument(
        "--cudnn-attention",
        action="store_true",
        help="keep torch's cuDNN attention, which a run switches off",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options, megatron_flags = parser.parse_known_args()
    if options.cudnn_attention:
        # SdpaCoreAttention switches cuDNN attention off with this function
        torch.backends.cuda.enable_cudnn_sdp = lambda enabled: None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_folder(options.shape, folder)
        argv = ["--hf-model", str(folder), "--micro-batch-size", "1", "--seq-length", "2048", *megatron_flags]
        args, _, opened = startup.parse(argv, needs_data=False)
        startup.start(args)
        report: dict[str, Any] = {
            "shape": options.shape,
            "rows": options.rows,
            "cudnn_attention": options.cudnn_attention,
        }
        if args.transformer_impl == "local":
            args.perform_initialization = False  # random numbers cannot be drawn without data
            with FakeTensorMode():
                report["counted"] = count(policy_sampler(args, opened), options)
            args.perform_initialization = True
        if torch.cuda.is_available():
            report["measured"] = measure(policy_sampler(args, opened), options)
    if dist.get_rank() == 0:
        print(json.dumps(report), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def policy_sampler(args: Any, folder: Any) -> PolicySampler:
    """Builds the model with random weights in the precision of the flags."""
    chunk = build_chunk(args).requires_grad_(False)
    return PolicySampler([chunk], folder.shape.vocab_size)


if __name__ == "__main__":
    sys.exit(main())
