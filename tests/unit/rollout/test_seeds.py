import hashlib

from megatron_rasft.rollout.seeds import sample_seed


def test_a_seed_is_the_first_bits_of_a_checksum_over_the_samples_identity() -> None:
    checksum = hashlib.sha256(b"7 file.jsonl:12 40 3").hexdigest()
    assert sample_seed(7, "file.jsonl:12", 40, 3) == int(checksum[:14], 16)
    assert sample_seed(7, "file.jsonl:12", 40, 3, num_bits=31) == int(checksum[:8], 16) // 2


def test_seeds_of_different_samples_differ_and_fit_their_bits() -> None:
    seeds = {sample_seed(1, f"p{i}", j, num_bits=31) for i in range(100) for j in range(16)}
    assert len(seeds) == 1600
    assert min(seeds) >= 0 and 2**30 < max(seeds) < 2**31
