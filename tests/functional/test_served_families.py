"""A real server takes the weights of a family whose tensors SGLang fuses in its own way."""

from pathlib import Path

import pytest

from benchmarks.served_families import try_case
from megatron_rasft.sync import buckets
from tests.servers.running import NEWEST


def test_a_server_has_the_latent_attention_that_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are sent in many buckets. SGLang cannot compute with them on a CPU; the weights are compared with a folder's."""
    monkeypatch.setattr(buckets, "_FIRST_BUCKET_BYTES", 4096)
    result = try_case("glm4_moe_lite", NEWEST, tmp_path)
    assert result["step"] in ("compute", "all"), result
