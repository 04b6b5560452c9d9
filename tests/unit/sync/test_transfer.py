"""The parts of a stage's transfer that a sync on one machine does not reach."""

import pytest

from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.transfer import check_same_machine


def test_servers_on_another_machine_are_given_no_handle_of_a_gpu() -> None:
    near, far = "http://127.0.0.1:1", "http://192.0.2.1:1"
    check_same_machine([near], stage=0)
    with pytest.raises(GroupFailure, match="--sync-method broadcast") as caught:
        check_same_machine([near, far], stage=0)
    assert list(caught.value.servers) == [far]
