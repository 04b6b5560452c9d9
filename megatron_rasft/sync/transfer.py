"""The transfer of one pipeline stage's weights: its ranks gather them, and the first of these ranks sends them to the servers."""

import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.distributed import ProcessGroup

from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync.buckets import MemoryPlan
from megatron_rasft.sync.colocated import RequestSender
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup, is_own_address, local_address
from megatron_rasft.sync.session import Attempt
from megatron_rasft.sync.streaming import Outcome, Send, StageStream, timed
from megatron_rasft.sync.weight_checks import EvidenceCollector
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.weights.gathering import ModelTensors

_MIB = 2**20


class StageTransfer:
    """This rank's part in the transfer of its pipeline stage.

    Args:
        config: the sync flags.
        tensors: the stage's tensors.
        records: the servers' records; the sender uses their clients.
        model_config: config.json of the trainer's model.
        device: the device of the parameters.
        ranks: gloo group of the ranks that gather the stage's tensors, None if this rank is not in the group. Its first rank is
            the stage's sender.
    """

    def __init__(
        self,
        config: SyncConfig,
        tensors: ModelTensors,
        *,
        records: ServerRecords,
        model_config: dict[str, Any],
        device: torch.device,
        ranks: ProcessGroup | None,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._records = records
        self._model_config = model_config
        self._device = device
        self._stage = tensors.stage
        self._ranks = ranks
        # A world of one rank has no groups.
        self.is_sender = tensors.takes_part and (ranks is None or ranks.rank() == 0)
        self._stream: StageStream | None = None
        self._group: UpdateGroup | None = None
        self._group_name = ""
        self._outcome = Outcome()
        self._sent_before = 0
        """Bytes sent by the transfers before the present one."""

    def memory_plan(self) -> MemoryPlan:
        """Returns the buckets of a sync to servers that serve the trainer's own model, and the memory that they take."""
        return self._stage_stream(WireFormat.read(self._model_config)).memory

    @property
    def num_kept_bytes(self) -> int:
        """Size in bytes of the bucket memory that is kept between syncs."""
        return 0 if self._stream is None else self._stream.num_kept_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank sends in a sync; 0 if another rank sends them."""
        if self._stream is None or not self.is_sender:
            return 0
        return sum(bucket.num_bytes for bucket in self._stream.memory.buckets)

    @property
    def num_sent_bytes(self) -> int:
        """Bytes that this rank has sent so far, in all transfers. It grows while a transfer runs."""
        return self._sent_before + self._outcome.num_bytes

    def address_problem(self) -> str:
        """Returns why servers cannot reach this rank at --sync-address; empty if they can, or need not connect to it."""
        address = self._config.sync_address
        if address is None or not self.is_sender or self._config.sync_method != "broadcast":
            return ""
        if is_own_address(address):
            return ""
        return (
            f"--sync-address {address} is not an address of {socket.gethostname()}, which sends pipeline stage {self._stage}. "
            "Leave the flag out: each stage then uses an address of its own node, on --sync-interface if that is "
            "given."
        )

    def run(self, attempt: Attempt) -> Outcome:
        """Gathers the stage's tensors and sends them to the servers. A collective of the stage's ranks.

        With --sync-method disk nothing is sent; the tensors are only gathered for the proof.

        Returns:
            The outcome on the sender; an empty outcome on the other ranks.
        """
        self._sent_before = self.num_sent_bytes
        outcome = self._outcome = Outcome()
        stream = self._stage_stream(attempt.wire_format)
        collector = None
        if self.is_sender and attempt.proof != "none":
            collector = EvidenceCollector(attempt.proof, attempt.tp_sizes, self._num_heads, stream.shapes)
        sends = self._config.sync_method != "disk"
        arena, send = None, _unused if sends else None
        try:
            if self.is_sender:
                arena = stream.take_arena()
                if sends:
                    with timed(outcome.seconds, "connect"):
                        send = self._connect(attempt)
        except (GroupFailure, ServerError) as error:
            outcome.note(error)
        except (ValueError, torch.OutOfMemoryError) as error:
            outcome.reason = outcome.refusal = str(error)
        if stream.agree(not outcome.reason):
            stream.run(outcome, collector, arena, send)
        if outcome.reason:
            self._group = None  # it was aborted
        if collector is not None:
            outcome.evidence = collector.evidence()
        return outcome

    def leave_group(self) -> None:
        """Leaves the servers' update group, on the sender."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _stage_stream(self, wire_format: WireFormat) -> StageStream:
        """Returns the stage's planned tensors. The plan is made again only if the servers need another format."""
        if self._stream is None or self._stream.wire_format != wire_format:
            self._stream = StageStream(
                self._tensors,
                ranks=self._ranks,
                device=self._device,
                wire_format=wire_format,
                bucket_bytes=self._config.sync_bucket_mib * _MIB,
                is_shared=self._config.sync_method == "tensor",
            )
        return self._stream

    def _connect(self, attempt: Attempt) -> Send:
        """Returns the function that sends a bucket to the servers."""
        if self._config.sync_method != "tensor":
            return self._update_group(attempt).broadcast
        if self._device.type == "cuda":
            check_same_machine(attempt.urls, self._stage)
        clients = self._clients(attempt)
        return RequestSender(clients, attempt.tp_sizes, self._config.sync_timeout_s).send

    def _update_group(self, attempt: Attempt) -> UpdateGroup:
        """Returns the stage's update group: the existing group if the attempt names it, otherwise a new group."""
        if self._group is not None and self._group_name == attempt.group:
            return self._group
        clients = self._clients(attempt)
        if self._group is not None:
            # servers outside this attempt do not answer, so only the servers in it are asked to leave
            self._group.close([client for client in self._group.servers if client.url in attempt.urls])
            self._group = None
        self._group_name = attempt.group
        config = self._config
        self._group = UpdateGroup(
            clients,
            attempt.tp_sizes,
            name=f"{attempt.group}-stage{self._stage}",
            backend="nccl" if self._device.type == "cuda" else "gloo",
            address=config.sync_address or local_address(attempt.urls, config.sync_interface),
            port=config.sync_port and config.sync_port + self._stage,
            interface=config.sync_interface,
            device=self._device,
            timeout_s=config.sync_timeout_s,
        )
        return self._group

    def _clients(self, attempt: Attempt) -> list[ServerClient]:
        return [self._records.get(url).client for url in attempt.urls]

    @property
    def _num_heads(self) -> tuple[int, int]:
        """Query heads and key-value heads of the model."""
        config = self._model_config
        num_heads = config["num_attention_heads"]
        return int(num_heads), int(config.get("num_key_value_heads") or num_heads)


def check_same_machine(urls: Sequence[str], stage: int) -> None:
    """Refuses servers on other machines: SGLang ends if it opens a CUDA IPC handle of another machine's GPU.

    Raises:
        GroupFailure: names the servers that are not on this machine.
    """
    reason = (
        f"is not on {socket.gethostname()}, whose GPU memory it must map for pipeline stage {stage} with --sync-method tensor: use "
        "--sync-method broadcast"
    )
    far = {url: reason for url in urls if not is_own_address(urlsplit(url).hostname or "")}
    if far:
        raise GroupFailure(reason, far)


def _unused(*_: Any) -> None:
    raise AssertionError("only the sender sends")
