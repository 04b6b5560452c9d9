"""Payloads for servers on the trainer's machine."""

import base64
import pickle

import torch

from megatron_rasft.sync.buckets import plan_buckets
from megatron_rasft.sync.colocated import serialize_bucket
from megatron_rasft.sync.wire_format import WireFormat
from tests.unit.sync.test_buckets import model


def test_a_bucket_is_sent_as_one_tensor_with_the_place_of_each_tensor() -> None:
    served = WireFormat(torch.bfloat16, is_block_fp8=True)
    (bucket,) = plan_buckets(model(), served, 10**9)
    arena = torch.randint(0, 256, (bucket.num_bytes + 64,), dtype=torch.uint8)
    memory = arena[32:-32]
    payload = base64.b64decode(serialize_bucket(bucket, memory))
    assert (
        len(payload) < arena.numel() + 10_000
    )  # the memory is sent once, although every tensor is a view of it

    sent = pickle.loads(payload)
    assert torch.equal(sent["flattened_tensor"], memory)
    views = bucket.views(memory)
    assert [place.name for place in sent["metadata"]] == list(views)
    for place in sent["metadata"]:
        bytes_of_it = sent["flattened_tensor"][place.start_idx : place.end_idx]
        assert place.numel == bytes_of_it.numel()
        found = bytes_of_it.view(place.dtype).reshape(place.shape)
        assert torch.equal(found.view(torch.uint8), views[place.name].view(torch.uint8))
