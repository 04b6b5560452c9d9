"""Checks rollout servers before a training run loads a large model. Prints one line per server.

    tools/check_servers.py --hf-model DIR --urls http://host:port [...] | --server-file servers.txt

For each server it checks that the server answers, serves the trainer's model and can be synced, and that a short generation has the
form of a valid answer. Then it makes a test broadcast: this process joins a group with all fit servers, as the trainer will, and
sends up to --broadcast-mib of the model's own tensors. The servers load them, so they must still serve --hf-model itself. Run it
before training, not during it. The exit code is 1 if a server is unfit, 2 for wrong flags.
"""

import argparse
import math
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import ServerError, ServerTimeoutError, ServerUnreachableError
from megatron_rasft.rollout.answers import check_generation
from megatron_rasft.servers.addresses import read_addresses, remove_address
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.fit import STARTING, duplicates, misfit
from megatron_rasft.servers.info import released_memory
from megatron_rasft.servers.keys import ServerKeys, read_key
from megatron_rasft.servers.record import ServerRecord, ServerRecords, call_all
from megatron_rasft.sync.broadcaster import prepare_nccl
from megatron_rasft.sync.buckets import Bucket, plan_buckets
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup, local_address
from megatron_rasft.sync.nccl_versions import objection, own_pair, pair_of_sglang
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.tools import cli
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import TensorPlan
from megatron_rasft.wording import counted


@dataclass
class Finding:
    """The result of the checks of one server."""

    record: ServerRecord
    facts: list[str] = field(default_factory=list)
    fault: str = ""
    is_dead: bool = False
    """Whether nothing listens at the address."""

    def line(self) -> str:
        """Returns the result in one line."""
        if self.fault:
            return f"FAIL  {self.record.url}  {self.fault}"
        return f"ok    {self.record.url}  {', '.join(self.facts)}"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hf-model", type=Path, required=True, help="the trainer's --hf-model")
    made.add_argument("--urls", nargs="+", default=[], help="addresses of servers, http://host:port each")
    made.add_argument("--server-file", type=Path, help="file to which tools/serve_rollouts.py adds servers")
    made.add_argument(
        "--drop-dead",
        action="store_true",
        help="remove servers that cannot be reached from --server-file, instead of counting them as unfit. A server that "
        "tools/serve_rollouts.py starts again adds itself again",
    )
    made.add_argument("--api-key-env", help="environment variable that holds the servers' --api-key")
    made.add_argument(
        "--admin-api-key-env",
        help="environment variable that holds the servers' --admin-api-key, if they have one",
    )
    made.add_argument(
        "--deadline-s",
        type=float,
        default=60.0,
        help="longest time for one request or bucket, seconds (default: %(default)s)",
    )
    made.add_argument(
        "--broadcast-mib",
        type=int,
        default=512,
        help="size of the test broadcast, MiB; 0 skips it (default: %(default)s)",
    )
    made.add_argument(
        "--sync-address",
        help="address of this machine for the servers (default: the address of the route to them)",
    )
    made.add_argument(
        "--sync-port", type=int, default=0, help="port for the rendezvous; 0 chooses a free one"
    )
    made.add_argument("--sync-interface", help="network interface to send over, such as eth0")
    return made


def main() -> int:
    """Checks all servers. Returns 0 if all are fit, otherwise 1."""
    args = parser().parse_args()
    findings = check(args)
    if args.drop_dead:
        findings = drop_dead(findings, args.server_file)
    for finding in findings:
        print(finding.line())
    num_bad = sum(bool(f.fault) for f in findings)
    print(f"fit: {len(findings) - num_bad} of {counted(len(findings), 'server')}")
    return 1 if num_bad or not findings else 0


def drop_dead(findings: Sequence[Finding], server_file: Path | None) -> list[Finding]:
    """Removes servers that cannot be reached from the server file. Returns the findings about the others.

    Raises:
        ValueError: there is no server file.
    """
    if server_file is None:
        raise ValueError("--drop-dead needs --server-file, from which it removes servers.")
    listed, left = set(read_addresses(server_file)), []
    for finding in findings:
        if finding.is_dead and finding.record.url in listed:
            remove_address(server_file, finding.record.url)
            print(f"drop  {finding.record.url}  {finding.fault}: removed from {server_file}")
        else:
            left.append(finding)
    return left


def check(args: argparse.Namespace) -> list[Finding]:
    """Returns the findings about all servers, in the order of the flags."""
    urls = [check_address(url, "--urls") for url in args.urls]
    if args.server_file is not None:
        urls += read_addresses(args.server_file)
    urls = list(dict.fromkeys(urls))
    if not urls:
        raise ValueError(
            f"no server to check: {args.server_file} is empty."
            if args.server_file
            else "no server to check: give --urls http://HOST:PORT [...] or --server-file FILE."
        )
    folder = HfFolder.open(args.hf_model)
    keys = ServerKeys(
        read_key("--api-key-env", args.api_key_env),
        read_key("--admin-api-key-env", args.admin_api_key_env),
    )
    records = ServerRecords(keys, partial(ServerClient, deadline_s=args.deadline_s))
    findings = [Finding(records.get(url)) for url in urls]
    with ThreadPoolExecutor(len(findings)) as pool:
        list(pool.map(lambda finding: examine(finding, folder), findings))
    same = duplicates([f.record.known_info for f in findings if not f.fault])
    for finding in findings:
        finding.fault = same.get(finding.record.url, finding.fault)
    fit = [f for f in findings if not f.fault]
    if args.broadcast_mib > 0 and fit:
        broadcast(fit, folder, args)
    return findings


def examine(finding: Finding, folder: HfFolder) -> None:
    """Probes one server, checks that it fits, and makes it generate."""
    client = finding.record.client
    try:
        info = finding.record.info = client.probe()
        finding.fault = misfit(info, folder.config)
        if not finding.fault and released_memory(info.weight_label) is not None:
            finding.fault = (
                "has released its memory, because its run was killed: the first sync of the next run wakes it"
            )
        if not finding.fault and client.is_starting():
            finding.fault = STARTING
        if finding.fault:
            return
        began = time.monotonic()
        num_tokens = check_generation(client, folder.shape.vocab_size)
        finding.facts += [
            f"SGLang {info.version}",
            nccl_text(info.version),
            f"tp {info.tp_size}",
            "update session" if info.has_update_session else "no update session",
            "uses seeds" if info.is_deterministic else "ignores seeds",
            f"{info.max_total_tokens:,} tokens of cache" if info.max_total_tokens else "unknown cache size",
            f"weights {info.weight_label!r}",
            f"{num_tokens} tokens in {time.monotonic() - began:.2f} s",
        ]
        if info.model_config is None:
            finding.facts.append("its config.json cannot be read here, so only the architecture was compared")
    except ServerError as error:
        finding.fault = error.reason
        finding.is_dead = isinstance(error, ServerUnreachableError)
        if isinstance(error, ServerTimeoutError) and error.reason.startswith("/generate"):
            finding.fault += ". If a run left the server paused, the first sync of the next run resumes it"


def nccl_text(sglang: str) -> str:
    """Returns the NCCL that comes with a version of SGLang, and whether this process's NCCL connects to it."""
    pair = pair_of_sglang(sglang)
    if pair is None:
        return "NCCL unknown"
    fits = (
        "the same here"
        if not objection(sglang, own_pair())
        else f"{own_pair().nccl} here: they cannot connect on GPUs"
    )
    return f"NCCL {pair.nccl} of torch {pair.torch} ({fits})"


def broadcast(findings: Sequence[Finding], folder: HfFolder, args: argparse.Namespace) -> None:
    """Sends some of the folder's tensors to all servers at once, and adds the speed to the findings."""
    records = [f.record for f in findings]
    infos = [record.known_info for record in records]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wire_format = WireFormat.read(infos[0].model_config or folder.config)
        if wire_format.is_block_fp8:
            raise ValueError(
                "the servers need FP8 weights, which only a trainer produces: use --broadcast-mib 0."
            )
        buckets = first_buckets(folder, wire_format, args.broadcast_mib * 2**20)
        prepare_nccl(args.sync_interface)
        group = UpdateGroup(
            [record.client for record in records],
            [info.tp_size for info in infos],
            name=f"check-{uuid.uuid4().hex[:8]}",
            backend="nccl" if device.type == "cuda" else "gloo",
            address=args.sync_address
            or local_address([record.url for record in records], args.sync_interface),
            port=args.sync_port,
            interface=args.sync_interface,
            device=device,
            timeout_s=args.deadline_s,
        )
    except GroupFailure as failure:
        blame(findings, failure, "joining the test broadcast")
        return
    try:
        seconds = send(group, records, folder, buckets, device)
    except GroupFailure as failure:
        blame(findings, failure, "the test broadcast")
        return
    finally:
        group.close()
    num_bytes = sum(b.num_bytes for b in buckets)
    for finding in findings:
        finding.facts.append(
            f"{num_bytes / 1e6:,.1f} MB broadcast to {counted(len(findings), 'server')} at {num_bytes / 1e9 / seconds:.2f} GB/s"
        )


def first_buckets(folder: HfFolder, wire_format: WireFormat, limit: int) -> list[Bucket]:
    """Returns the first tensors of the model, up to ``limit`` bytes but at least one, in buckets of an eighth of the limit."""
    chosen: list[TensorPlan] = []
    total = 0
    for name, stored in folder.tensors.items():
        total += math.prod(stored.shape) * wire_format.dtype.itemsize
        if chosen and total > limit:
            break
        chosen.append(TensorPlan(name, stored.shape, wire_format.dtype))
    return plan_buckets(chosen, wire_format, max(1, limit // 8))


def send(
    group: UpdateGroup,
    records: Sequence[ServerRecord],
    folder: HfFolder,
    buckets: Sequence[Bucket],
    device: torch.device,
) -> float:
    """Broadcasts the buckets as a sync does, and resumes every server, also after a failure. Returns the seconds spent sending.

    Raises:
        GroupFailure: a server failed. Failures of resuming the servers after that are not reported.
    """

    def stop(record: ServerRecord) -> None:
        record.client.pause("abort")
        record.begin_update()

    seconds = 0.0
    try:
        raise_failures(call_all(records, stop))
        for bucket in buckets:
            memory = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
            for name, view in bucket.views(memory).items():
                view.copy_(folder.read(name))
            began = time.monotonic()
            group.broadcast(bucket, memory)
            seconds += time.monotonic() - began
    except BaseException:
        call_all(records, resume)
        raise
    raise_failures(call_all(records, resume))
    return seconds


def resume(record: ServerRecord) -> None:
    """Closes the update session, flushes the cache and resumes generation. If a step fails, the next steps still run."""
    failures = []
    for step in (record.end_update, record.client.flush_cache, record.client.resume):
        try:
            step()
        except ServerError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def raise_failures(failed: dict[str, str]) -> None:
    """Raises GroupFailure if a server failed."""
    if failed:
        raise GroupFailure(next(iter(failed.values())), failed)


def blame(findings: Sequence[Finding], failure: GroupFailure, what: str) -> None:
    """Records a failed broadcast for the servers that the failure names, or for all servers if it names none."""
    for finding in findings:
        reason = failure.servers.get(finding.record.url)
        if reason is not None or not failure.servers:
            finding.fault = f"{what} failed: {reason or failure}. Restart it before training"
            problem = _nccl_problem(finding)
            if problem:
                finding.fault += f". {problem}"


def _nccl_problem(finding: Finding) -> str:
    """Returns why NCCL may be the cause of a failure; empty on a CPU, and if both sides have the same or an unknown version."""
    if not torch.cuda.is_available():
        return ""
    try:
        return objection(finding.record.known_info.version, own_pair())
    except LookupError:
        return ""


if __name__ == "__main__":
    sys.exit(cli.run(main))
