"""The weight sync: one state machine that takes every rank through pause, transfer, proof and release together.

Rank 0 of the world leads: it speaks to the servers of everything but data, decides, and tells the others.
The first rank of each pipeline stage is the stage's source: it gathers that stage's tensors from its
tensor- and expert-parallel ranks and sends them; stages take turns, so a server is never asked for two at once. Whatever fails,
all ranks learn of it at the next step and go the same way: the server at fault is left out and everything
is sent again, over new groups, to the others.
"""

import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rasft.config.sync import SyncConfig
from megatron_rasft.errors import RasftError, ServerError
from megatron_rasft.servers.info import ServerInfo, released_memory, sleep_label
from megatron_rasft.sync.colocated import RequestSender
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup, is_own_address, local_address
from megatron_rasft.sync.nccl_versions import objection, own_pair
from megatron_rasft.sync.report import PeakMemory, SyncReport
from megatron_rasft.sync.server_protocols import Server, ask_all
from megatron_rasft.sync.streaming import GatherTensors, Outcome, PlanTensors, Send, StageStream, timed
from megatron_rasft.sync.weight_checks import ProofKind, Witness, check_checksums, check_rows
from megatron_rasft.sync.wire_format import WireFormat

_MIB = 2**20

_MEMORY = ("weights", "kv_cache")
"""What a sleeping server has released, in the order in which it is taken back: weights before they are written."""

_KEPT_FOLDERS = 2
"""Versions left in --sync-disk-folder: the servers' own, and the one before it."""

_CAN_READ_BACK = ("LlamaForCausalLM",)
"""Families for which SGLang implements /get_weights_by_name, of those this package trains."""

_PROOF_NAMES: dict[ProofKind, str] = {
    "checksum": "checksums of every tensor",
    "read_back": "reading values back",
    "none": "",
}


@dataclass(frozen=True)
class _Attempt:
    """What rank 0 decided that all ranks do now."""

    servers: tuple[tuple[str, int], ...] = ()
    """Address and tensor-parallel size of each server, in the order of their ranks."""
    failed: dict[str, str] = field(default_factory=dict)
    group: str = ""
    """Name of this set of groups; another name means new groups."""
    served: WireFormat = field(default_factory=lambda: WireFormat(torch.bfloat16))
    proof: ProofKind = "none"
    notes: tuple[str, ...] = ()
    """Lines for the run's output. Each is printed once a run."""
    doubtful: dict[str, str] = field(default_factory=dict)
    """Servers whose NCCL should differ from ours, and why. They are at fault if a group with them fails and no other is."""


class WeightSync:
    """Sends this model's weights to the rollout servers. Every rank of the world makes one and calls it together.

    Args:
        config: the flags.
        plan: names, shapes and types that ``gather`` gives; runs no collective.
        gather: the stage's Hugging Face tensors, whole on its source; a collective of the ranks that take part.
        connect: address -> control plane of a server; called on rank 0 and on the sources.
        model_config: config.json of the model, for servers whose own cannot be read here.
        device: where the parameters are.
        stage: pipeline stage of this rank.
        num_stages: pipeline stages.
        takes_part: whether this rank's weights are gathered; other replicas only wait. The first such rank
            of a stage is its source.
        export: writes the model as a Hugging Face folder, a collective of all ranks; for --sync-method disk.

    Raises:
        ValueError: --sync-address is not that of every node that sends; or --sync-proof checksum on GPUs.
    """

    def __init__(
        self,
        config: SyncConfig,
        *,
        plan: PlanTensors,
        gather: GatherTensors,
        connect: Callable[[str], Server],
        model_config: dict[str, Any],
        device: torch.device,
        stage: int,
        num_stages: int,
        takes_part: bool,
        export: Callable[[str], None] | None = None,
    ) -> None:
        if config.sync_method == "disk" and export is None:
            raise ValueError("--sync-method disk needs a way to export the model.")
        if config.sync_proof == "checksum" and device.type == "cuda":
            # tensor_hash in srt/managers/mm_utils.py: sha256 of the bytes on a CPU, a kernel's own hash on a GPU
            raise ValueError(
                "--sync-proof checksum is for servers on a CPU: on a GPU SGLang's checksums are others than the trainer can "
                "calculate. Use --sync-proof auto."
            )
        self.config = config
        self._plan = plan
        self._gather = gather
        self._connect = connect
        self._model_config = model_config
        self._device = device
        self._stage = stage
        self._num_stages = num_stages
        self._export = export
        self._is_lead = dist.get_rank() == 0
        self._takes_part = takes_part
        # of its own, on the CPU: ranks wait in it for the lead, whose every step has its own deadline
        patience = timedelta(seconds=max(1800.0, 60 * config.sync_timeout_s))
        self._control: Any = dist.new_group(backend="gloo", timeout=patience)
        self._givers: ProcessGroup | None = None
        self._is_source = False
        places = self._exchange((stage, takes_part))
        for number in range(num_stages):
            ranks = [rank for rank, place in enumerate(places) if place == (number, True)]
            group: Any = dist.new_group(ranks, backend="gloo", timeout=patience)
            if dist.get_rank() in ranks:
                self._givers, self._is_source = group, dist.get_rank() == ranks[0]
        problem = next(filter(None, self._exchange(self._address_problem())), "")
        if problem:
            raise ValueError(problem)
        self._servers: dict[str, Server] = {}
        self._stream: StageStream | None = None
        self._stream_served: WireFormat | None = None
        self._noted: set[str] = set()
        self._group: UpdateGroup | None = None
        self._group_name = ""
        # of the lead alone
        self._members: tuple[tuple[str, int], ...] = ()
        self._members_group = ""
        self._versions: dict[str, int] = {}
        self._served: WireFormat | None = None
        """What the servers of the last sync that succeeded wanted."""
        self._asleep: dict[str, list[str]] = {}
        """What each server has released and not taken back yet."""
        self._start_configs: dict[str, dict[str, Any] | None] = {}
        """config.json that each server began with, None if it cannot be read here."""
        self._syncs_since_proof: int | None = None

    # ---- all ranks

    def describe(self) -> str:
        """What a sync will take of the trainer's memory, for the start of a run; a collective of the world."""
        mine = (0, 0, "")
        if self._is_source:
            memory = self._stage_stream(WireFormat.read(self._model_config)).memory
            largest = max(memory.buckets, key=lambda bucket: bucket.num_bytes)
            mine = (memory.peak_bytes, largest.num_bytes, largest.sources[0])
        peak, largest_bytes, name = max(self._exchange(mine))
        text = f"a weight sync takes up to {peak / _MIB:.0f} MiB of a sending rank's memory"
        if largest_bytes > self.config.sync_bucket_mib * _MIB:
            text += (
                f": {name} and what belongs to it are {largest_bytes / _MIB:.0f} MiB, above --sync-bucket-mib "
                f"{self.config.sync_bucket_mib}, and go alone"
            )
        return text

    def push(self, weight_version: int, urls: Sequence[str] = ()) -> SyncReport:
        """Give the servers the weights as they are now; a collective of the world, between steps.

        Returns when every server has them or is given up, after at most one attempt more than there are
        servers that fail, each step of which ends within --sync-timeout-s. The parameters must be current.

        Args:
            weight_version: optimizer steps done; becomes the servers' version label.
            urls: the servers to reach; rank 0's count.

        Raises:
            ValueError: at the first sync, of the servers that answer none can be fed by this trainer; the message says
                what to change. Later, and beside others that can, such a server is only left out.
        """
        began = time.monotonic()
        report = SyncReport(weight_version=weight_version)
        memory = PeakMemory(self._device, 0 if self._stream is None else self._stream.num_resting)
        while not self._try(report, urls):
            pass
        report.peak_bytes = max(self._exchange(memory.peak_bytes()))
        report.seconds["total"] = time.monotonic() - began
        return report

    def _try(self, report: SyncReport, urls: Sequence[str]) -> bool:
        """One attempt with the servers that have not failed; False: it is to be repeated with fewer."""
        with timed(report.seconds, "pause"):
            self.make_room()
            attempt = self._decided(lambda: self._prepare([u for u in urls if u not in report.failed]))
        report.failed.update(attempt.failed)
        report.notes += attempt.notes
        if not attempt.servers:
            return True
        report.num_attempts += 1
        with timed(report.seconds, "transfer"):
            outcome = self._transfer(attempt, report.weight_version)
        if outcome.refusal:
            raise ValueError(outcome.refusal)
        report.num_bytes, report.num_buckets = outcome.num_bytes, outcome.num_buckets
        for phase, seconds in outcome.seconds.items():
            report.seconds[phase] = report.seconds.get(phase, 0.0) + seconds
        if outcome.reason:
            outcome.failed = outcome.failed or attempt.doubtful
            # where nobody can be blamed, once more with all; if that fails too, all are
            is_blaming_all = not outcome.failed and report.num_attempts > 1 + len(report.failed)
            report.failed.update(
                {url: outcome.reason for url, _ in attempt.servers} if is_blaming_all else outcome.failed
            )
            self._forget(*report.failed)
            return False
        with timed(report.seconds, "release"):
            self.make_room()
            failed = self._decided(lambda: self._release(attempt, outcome, report.weight_version))
        report.failed.update(failed)
        report.synced = [url for url, _ in attempt.servers if url not in failed]
        report.proof = _PROOF_NAMES[attempt.proof] if report.synced else ""
        return True

    def make_room(self, *, waits: bool = True) -> None:
        """Let servers on these GPUs have what torch's allocator keeps for this process.

        A server that takes its memory back while there is too little ends. Without such servers it does nothing.

        Args:
            waits: until every rank has done it, as a collective of the world.
        """
        if self.config.sync_method != "tensor":
            return
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # of buckets that servers have read
        torch.cuda.empty_cache()
        if waits:
            dist.barrier(group=self._control)

    def sleep(self, urls: Sequence[str] = ()) -> dict[str, str]:
        """Have colocated servers give their GPU memory to the trainer until the next ``push``; a collective of the world.

        Args:
            urls: servers started with --enable-memory-saver; rank 0's count. Running requests are aborted.

        Returns:
            url -> reason of those that did not.
        """

        timeout = self.config.sync_timeout_s

        def release(server: Server) -> None:
            held = [tag for tag in _MEMORY if tag not in self._asleep.get(server.url, ())]
            if held:
                server.pause("abort", timeout)
                server.release_memory(held, timeout)
                self._asleep[server.url] = list(_MEMORY)
                server.set_weight_label(sleep_label(_MEMORY), timeout)

        return self._decided(lambda: ask_all([self._server(url) for url in urls], release))

    def wake(self) -> dict[str, str]:
        """Have servers that sleep take their memory back, without new weights; no collective, rank 0 does it.

        They stay paused, since what they hold now is undefined: the next run's first sync lets them go on.

        Returns:
            url -> reason of those that did not.
        """
        return ask_all([self._server(url) for url in self._asleep], lambda s: self._take_back(s, *_MEMORY))

    def close(self) -> None:
        """Leave the servers' groups; a collective of the world."""
        for stage in range(self._num_stages):
            if self._group is not None and self._stage == stage:
                self._group.close()
                self._group = None
            dist.barrier(group=self._control)
        for server in self._servers.values():
            server.close()

    def _decided[T](self, decide: Callable[[], T]) -> T:
        """Rank 0's decision on every rank; what it raises is raised on all."""
        box: list[Any] = [None, False, ""]
        failure: BaseException | None = None
        if self._is_lead:
            try:
                box[0] = decide()
            except Exception as error:
                failure = error
                box = [None, isinstance(error, ValueError), f"{error}" or repr(error)]
        dist.broadcast_object_list(box, src=0, group=self._control)
        if failure is not None:
            raise failure
        if box[2]:
            raise (ValueError if box[1] else RasftError)(box[2])
        return box[0]

    def _exchange[T](self, value: T) -> list[T]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._control)
        return values

    def _transfer(self, attempt: _Attempt, weight_version: int) -> Outcome:
        """Bring the weights over, stage by stage; every rank returns the same."""
        total = Outcome()
        if self.config.sync_method == "disk":
            total.merge(self._load_from_disk(attempt, weight_version))
            if total.reason or attempt.proof == "none":
                return total
        for stage in range(self._num_stages):
            mine = None
            if self._takes_part and self._stage == stage:
                mine = self._run_stage(attempt)
            for outcome in self._exchange(mine if self._is_source else None):
                if outcome is not None:
                    total.merge(outcome)
            if total.reason:
                break
        return total

    def _load_from_disk(self, attempt: _Attempt, weight_version: int) -> Outcome:
        """Export, and have the servers load that; a collective of the world."""
        assert self._export is not None and self.config.sync_disk_folder is not None
        root = Path(self.config.sync_disk_folder)
        name: str = self._decided(lambda: f"weights-{weight_version:08d}-{uuid.uuid4().hex[:8]}")
        folder = (root / name).absolute()
        outcome = Outcome()
        with timed(outcome.seconds, "export"):
            self._export(str(folder))

        def load() -> Outcome:
            with timed(outcome.seconds, "send"):
                outcome.failed = ask_all(
                    self._connected(attempt),
                    lambda s: s.update_weights_from_disk(
                        folder, flush_cache=False, deadline_s=self.config.sync_timeout_s
                    ),
                )
            outcome.reason = next(iter(outcome.failed.values()), "")
            outcome.num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            outcome.num_buckets = 1
            for old in sorted(root.glob("weights-*"), key=lambda p: p.stat().st_mtime)[:-_KEPT_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)
            return outcome

        return self._decided(load)

    # ---- the ranks of one stage

    def _run_stage(self, attempt: _Attempt) -> Outcome:
        """Take this stage's tensors past the witness and, unless they went by disk, to the servers."""
        outcome = Outcome()
        stream = self._stage_stream(attempt.served)
        witness = None
        if self._is_source and attempt.proof != "none":
            sizes = [size for _, size in attempt.servers]
            witness = Witness(attempt.proof, sizes, self._num_heads, stream.shapes)
        sends = self.config.sync_method != "disk"
        arena, send = None, _not_here if sends else None
        try:
            if self._is_source:
                arena = stream.take_arena()
                if sends:
                    with timed(outcome.seconds, "connect"):
                        send = self._sender(attempt)
        except (GroupFailure, ServerError) as error:
            outcome.note(error)
        except (ValueError, torch.OutOfMemoryError) as error:
            outcome.reason = outcome.refusal = str(error)
        if stream.agree(not outcome.reason):
            stream.run(outcome, witness, arena, send)
        if outcome.reason:
            self._group = None  # aborted
        if witness is not None:
            outcome.evidence = witness.evidence()
        return outcome

    def _stage_stream(self, served: WireFormat) -> StageStream:
        """This stage's tensors, planned once."""
        if self._stream is None or self._stream_served != served:
            self._stream_served = served
            self._stream = StageStream(
                self._plan,
                self._gather,
                givers=self._givers,
                device=self._device,
                served=served,
                bucket_bytes=self.config.sync_bucket_mib * _MIB,
                is_shared=self.config.sync_method == "tensor",
            )
        return self._stream

    def _sender(self, attempt: _Attempt) -> Send:
        """What takes a bucket to the servers."""
        if self.config.sync_method == "tensor":
            self._check_is_here(attempt)
            sizes = [size for _, size in attempt.servers]
            return RequestSender(self._connected(attempt), sizes, self.config.sync_timeout_s).send
        return self._joined(attempt).broadcast

    def _check_is_here(self, attempt: _Attempt) -> None:
        """Raise GroupFailure for servers on another machine: to open a handle of this one's GPU there ends SGLang."""
        if self._device.type != "cuda":
            return
        reason = (
            f"is not on {socket.gethostname()}, from whose GPU --sync-method tensor gives it pipeline stage {self._stage}: use "
            "--sync-method broadcast"
        )
        far = {url: reason for url, _ in attempt.servers if not is_own_address(urlsplit(url).hostname or "")}
        if far:
            raise GroupFailure(reason, far)

    @property
    def _num_heads(self) -> tuple[int, int]:
        config = self._model_config
        num_heads = config["num_attention_heads"]
        return int(num_heads), int(config.get("num_key_value_heads") or num_heads)

    def _joined(self, attempt: _Attempt) -> UpdateGroup:
        """This stage's group: a new one, unless the one there is still good."""
        if self._group is not None and self._group_name == attempt.group:
            return self._group
        servers = self._connected(attempt)
        if self._group is not None:
            urls = {server.url for server in servers}
            self._group.close([server for server in self._group.servers if server.url in urls])
            self._group = None
        self._group_name = attempt.group
        config = self.config
        self._group = UpdateGroup(
            servers,
            [size for _, size in attempt.servers],
            name=f"{attempt.group}-stage{self._stage}",
            backend="nccl" if self._device.type == "cuda" else "gloo",
            address=config.sync_address
            or local_address([server.url for server in servers], config.sync_interface),
            port=config.sync_port and config.sync_port + self._stage,
            interface=config.sync_interface,
            device=self._device,
            timeout_s=config.sync_timeout_s,
        )
        return self._group

    def _address_problem(self) -> str:
        """Why servers that are told --sync-address would not find this rank; empty if they would, or need not."""
        address = self.config.sync_address
        if address is None or not self._is_source or self.config.sync_method != "broadcast":
            return ""
        if is_own_address(address):
            return ""
        return (
            f"--sync-address {address} is no address of {socket.gethostname()}, from where pipeline stage {self._stage} is "
            "sent. Leave the flag out: each stage then tells the servers its own node's address, that of --sync-interface "
            "if one is given."
        )

    def _connected(self, attempt: _Attempt) -> list[Server]:
        return [self._server(url) for url, _ in attempt.servers]

    def _server(self, url: str) -> Server:
        if url not in self._servers:
            self._servers[url] = self._connect(url)
        return self._servers[url]

    # ---- rank 0 alone

    def _prepare(self, urls: Sequence[str]) -> _Attempt:
        """Stop the servers, open their sessions, and decide what the ranks will do."""
        servers = [self._server(url) for url in urls]
        timeout = self.config.sync_timeout_s
        failed = ask_all(servers, lambda s: s.probe(timeout))
        servers = [s for s in servers if s.url not in failed]
        served, unfit = self._fitting(servers)
        if served is None and unfit and self._served is None:
            raise ValueError("; ".join(f"rollout server {url} {reason}" for url, reason in unfit.items()))
        failed |= unfit
        servers = [s for s in servers if s.url not in failed]
        for server in servers:
            released = released_memory(server.info.weight_label)
            if released is None:  # it is awake, perhaps restarted
                self._asleep.pop(server.url, None)
            else:
                self._asleep.setdefault(server.url, released)
        failed |= ask_all(servers, self._pause)
        servers = [s for s in servers if s.url not in failed]
        if self.config.sync_method != "disk":
            failed |= ask_all(servers, self._begin)
            servers = [s for s in servers if s.url not in failed]
        for url in failed:
            self._versions.pop(url, None)
        if served is None or not servers:
            return _Attempt(failed=failed)
        members = tuple((s.url, s.info.tp_size) for s in servers)
        if members != self._members or not all(self._is_as_left(s) for s in servers):
            self._members = members
            self._members_group = f"rasft-{uuid.uuid4().hex[:12]}"
            self._syncs_since_proof = None
        notes, doubtful = self._nccl_doubts(servers)
        return _Attempt(
            members,
            failed,
            self._members_group,
            served,
            self._proof_kind(servers, served),
            notes,
            doubtful,
        )

    @property
    def _uses_nccl(self) -> bool:
        return self._device.type == "cuda" and self.config.sync_method == "broadcast"

    def _nccl_doubts(self, servers: Sequence[Server]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Compares both sides' NCCL before the first collective. Returns new lines for the output, and url -> doubt of servers."""
        if not self._uses_nccl:
            return (), {}
        own, doubtful, lines = own_pair(), dict[str, str](), list[str]()
        for server in servers:
            if server.url in self._versions:  # it has been connected before
                continue
            try:
                doubt = objection(server.info.version, own)
            except LookupError as unknown:
                lines.append(str(unknown))
                continue
            if doubt:
                doubtful[server.url] = doubt
                lines.append(f"rollout server {server.url}: {doubt}")
        new = tuple(line for line in dict.fromkeys(lines) if line not in self._noted)
        self._noted.update(new)
        return new, doubtful

    def _is_as_left(self, server: Server) -> bool:
        """False if it was restarted or given other weights: it is in no group any more, and nothing is known of it."""
        if server.url not in self._versions:
            return False
        return server.url in self._asleep or self._versions[server.url] == server.info.weight_version

    def _fitting(self, servers: Sequence[Server]) -> tuple[WireFormat | None, dict[str, str]]:
        """The one format that will be sent, None if no server can be fed; url -> reason of those that cannot."""
        unfit: dict[str, str] = {}
        formats: dict[str, WireFormat] = {}
        for server in servers:
            try:
                self._check_fits(server.info)
                formats[server.url] = self._format_of(server.info)
            except ValueError as error:
                unfit[server.url] = str(error)
        if not formats:
            return None, unfit
        wanted = list(formats.values())
        # one broadcast feeds them all: what was sent before, else what most of them want
        served = self._served if self._served in wanted else max(wanted, key=wanted.count)
        for url, other in formats.items():
            if other != served:
                unfit[url] = (
                    f"serves a folder of another dtype or quantization_config than the other servers: it wants {other}, "
                    f"they {served}. Serve the same folder on each."
                )
        return served, unfit

    def _check_fits(self, info: ServerInfo) -> None:
        """Refuse what could not work, or would work on something else; the message goes on from the server's name."""
        if info.dp_size > 1 or info.pp_size > 1:
            raise ValueError(
                f"runs with dp {info.dp_size} and pp {info.pp_size}; weights can only be sent to tensor-parallel servers. "
                "Start several servers instead, without --dp and --pp."
            )
        ours = self._model_config
        theirs = info.model_config or {}
        if info.architectures and not set(info.architectures) & set(ours.get("architectures", ())):
            raise ValueError(
                f"serves {info.model_path}, a {', '.join(info.architectures)}; this run trains a "
                f"{', '.join(ours.get('architectures', ()))}. Serve the folder that is given as --hf-model."
            )
        sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_key_value_heads")
        for name in sizes:
            if name in theirs and name in ours and theirs[name] != ours[name]:
                raise ValueError(
                    f"serves {info.model_path} with {name} {theirs[name]}; this run trains a model with {ours[name]}. "
                    "Serve the folder that is given as --hf-model."
                )

    def _format_of(self, info: ServerInfo) -> WireFormat:
        """What a server wants; ValueError if that cannot be made, or is not what this method sends."""
        folder = self.config.sync_disk_folder
        # one that loaded an export names that as its model, but its tensors are still of the type it began with
        if folder is None or not Path(info.model_path).is_relative_to(Path(folder).absolute()):
            self._start_configs[info.url] = info.model_config
        config = self._start_configs.get(info.url, info.model_config) or self._model_config
        if info.quantization and not config.get("quantization_config"):
            raise ValueError(
                f"quantizes on its own (--quantization {info.quantization}). Serve a folder whose config.json has the "
                "quantization_config instead, or leave that flag out."
            )
        served = WireFormat.read(config, info.dtype)
        if served.is_block_fp8 and self.config.sync_proof == "checksum":
            raise ValueError(
                "serves FP8, and hashes its weights as what they mean, not as they were sent: no --sync-proof checksum can "
                "succeed. Use --sync-proof auto, or serve a folder in bfloat16."
            )
        if served.is_block_fp8 and self.config.sync_method == "disk":
            raise ValueError(
                "serves FP8, and --sync-method disk writes whole weights, which it would multiply by the scales of those "
                "before. Send them by --sync-method broadcast, or serve a folder in bfloat16."
            )
        return served

    def _pause(self, server: Server) -> None:
        mode = self.config.sync_pause_mode
        # before 0.5.21, which brought sessions, an update while requests wait ends the server
        server.pause(mode if server.info.has_update_session else "abort", self.config.sync_timeout_s)
        self._take_back(server, "weights")

    def _take_back(self, server: Server, *tags: str) -> None:
        """Wake a server as far as that; nothing happens to what is awake."""
        released = self._asleep.get(server.url, [])
        for tag in tags:
            if tag in released:
                server.resume_memory([tag], self.config.sync_timeout_s)
                # at once: asked for the same memory twice, SGLang ends with a KeyError
                released.remove(tag)
                server.set_weight_label(sleep_label(released), self.config.sync_timeout_s)

    def _begin(self, server: Server) -> None:
        try:
            server.begin_weight_update(self.config.sync_timeout_s)
        except ServerError as error:
            if error.status is None:
                raise
            # perhaps a session that an interrupted sync left open
            try:
                server.end_weight_update(self.config.sync_timeout_s)
            except ServerError:
                raise error from None
            server.begin_weight_update(self.config.sync_timeout_s)

    def _proof_kind(self, servers: Sequence[Server], served: WireFormat) -> ProofKind:
        interval, wanted = self.config.sync_proof_interval, self.config.sync_proof
        is_due = self._syncs_since_proof is None or (interval > 0 and self._syncs_since_proof + 1 >= interval)
        # a server hashes its FP8 weights as what they mean, not as they were sent
        if not is_due or wanted == "off" or (wanted == "auto" and served.is_block_fp8):
            return "none"
        if wanted == "checksum" or (wanted == "auto" and self._device.type == "cpu"):
            return "checksum" if all(s.info.has_weights_checker for s in servers) else "none"
        can_read = all(set(s.info.architectures) & set(_CAN_READ_BACK) for s in servers)
        return "read_back" if can_read or wanted == "read_back" else "none"

    def _release(self, attempt: _Attempt, outcome: Outcome, weight_version: int) -> dict[str, str]:
        """Finalize, prove, label and let generate again; the servers that failed in it stay paused."""
        timeout = self.config.sync_timeout_s

        def release(server: Server) -> None:
            if self.config.sync_method != "disk":
                server.end_weight_update(timeout)
            self._take_back(server, "kv_cache")
            if self.config.sync_pause_mode != "in_place" or not server.info.has_update_session:
                server.flush_cache(timeout)
            if attempt.proof == "checksum":
                check_checksums(server, outcome.evidence, timeout)
            elif attempt.proof == "read_back":
                check_rows(server, outcome.evidence, timeout)
            server.set_weight_version(weight_version, timeout)
            label = server.weight_version(timeout)
            if label != weight_version:
                raise ServerError(
                    server.url, f"says it has the weights of step {label}, it was sent {weight_version}"
                )
            server.resume(timeout)

        failed = ask_all(self._connected(attempt), release)
        for url, _ in attempt.servers:
            self._versions[url] = weight_version
            if url not in failed:
                self._served = attempt.served
        if failed:
            self._forget(*failed)
        is_proven = attempt.proof != "none" or self._syncs_since_proof is None
        self._syncs_since_proof = 0 if is_proven else (self._syncs_since_proof or 0) + 1
        return failed

    def _forget(self, *urls: str) -> None:
        """The next attempt starts from nothing: new groups, and a proof."""
        for url in urls:
            self._versions.pop(url, None)
        self._members = ()


def _not_here(*_: Any) -> None:
    raise AssertionError("only the source sends")
