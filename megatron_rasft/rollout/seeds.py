"""Seeds of single samples, for training and for evaluation."""

import hashlib


def sample_seed(seed: int, *sample: str | int, num_bits: int = 56) -> int:
    """Derives a sample's seed from its identity alone, so that the other samples of a batch cannot change it.

    Args:
        seed: the seed of the whole run.
        sample: values that identify the sample, for example problem id, iteration and index in its group.
        num_bits: the result is in [0, 2 ** num_bits); at most 64. 56 bits stay positive in the int64 of
            torch.Generator.manual_seed and of SGLang's sampling_seed.
    """
    digest = hashlib.sha256(" ".join(map(str, (seed, *sample))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - num_bits)
