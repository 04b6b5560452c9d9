"""Looks at rollout servers before a large model is loaded for training: one line each, exit status 1 if any is unfit.

    tools/check_servers.py --hf-model DIR --urls http://host:port [...] | --server-file servers.txt

Of each server: whether it is reached, its SGLang version and what it can do, whether its model is the trainer's, and one
short generation, held against what it must look like. Then a test broadcast: this process joins a group with all good
servers, as the trainer will, and sends up to --broadcast-mib of the model's own tensors. The servers load them, so they
must still serve --hf-model itself; run this before training, not during it.
"""

import argparse
import math
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import RasftError, ServerError
from megatron_rasft.rollout.fleet import config_mismatch, named_twice
from megatron_rasft.rollout.sampling import check_generation
from megatron_rasft.servers.addresses import read_addresses
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo, released_memory
from megatron_rasft.servers.keys import read_key
from megatron_rasft.sync.buckets import Bucket, plan_buckets
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup, local_address, prepare_nccl
from megatron_rasft.sync.nccl_versions import objection, own_pair, pair_of_sglang
from megatron_rasft.sync.server_protocols import Server, ask_all
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.weights import HfFolder


class Planned(NamedTuple):
    """One tensor of the folder, as the sync plans it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Finding:
    """What was found out about one server."""

    control: ServerClient
    info: ServerInfo | None = None
    """None until it was reached."""
    said: list[str] = field(default_factory=list)
    fault: str = ""

    def line(self) -> str:
        """The verdict."""
        if self.fault:
            return f"FAIL  {self.control.url}  {self.fault}"
        return f"ok    {self.control.url}  {', '.join(self.said)}"


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hf-model", type=Path, required=True, help="the trainer's --hf-model")
    made.add_argument("--urls", nargs="+", default=[], help="addresses of servers, http://host:port each")
    made.add_argument("--server-file", type=Path, help="file that tools/serve_rollouts.py enters servers in")
    made.add_argument("--api-key-env", help="environment variable with the servers' --api-key")
    made.add_argument(
        "--admin-api-key-env", help="environment variable with their --admin-api-key, if they have one"
    )
    made.add_argument(
        "--deadline-s",
        type=float,
        default=60.0,
        help="longest time for one step, seconds (default: %(default)s)",
    )
    made.add_argument(
        "--broadcast-mib",
        type=int,
        default=512,
        help="weights to send in the test, MiB; 0 sends none (default: %(default)s)",
    )
    made.add_argument(
        "--sync-address", help="address of this machine as the servers reach it (default: found out)"
    )
    made.add_argument("--sync-port", type=int, default=0, help="port for the rendezvous; 0 takes a free one")
    made.add_argument("--sync-interface", help="network interface to send over, such as eth0")
    return made


def main() -> int:
    """Check all servers; 0 if every one is fit, 1 if not, 2 for flags that make no sense."""
    args = parser().parse_args()
    try:
        findings = check(args)
    except ValueError as error:
        print(f"check_servers: {error}", file=sys.stderr)
        return 2
    except RasftError as error:
        print(f"check_servers: {error}", file=sys.stderr)
        return 1
    for finding in findings:
        print(finding.line())
    num_bad = sum(bool(f.fault) for f in findings)
    print(f"{len(findings) - num_bad} of {len(findings)} servers are fit")
    return 1 if num_bad else 0


def check(args: argparse.Namespace) -> list[Finding]:
    """Everything about every server, in their order."""
    urls = [check_address(url, "--urls") for url in args.urls]
    if args.server_file is not None:
        urls += read_addresses(args.server_file)
    urls = list(dict.fromkeys(urls))
    if not urls:
        raise ValueError(
            f"no server is named: {args.server_file} holds none."
            if args.server_file
            else "no server is named: give --urls http://HOST:PORT [...] or --server-file FILE."
        )
    folder = HfFolder.open(args.hf_model)
    findings = [
        Finding(
            ServerClient(
                url,
                api_key=read_key("--api-key-env", args.api_key_env),
                admin_api_key=read_key("--admin-api-key-env", args.admin_api_key_env),
                deadline_s=args.deadline_s,
            )
        )
        for url in urls
    ]
    with ThreadPoolExecutor(len(findings)) as pool:
        list(pool.map(lambda finding: examine(finding, folder), findings))
    doubles = named_twice([f.info for f in findings if f.info is not None and not f.fault])
    for finding in findings:
        finding.fault = doubles.get(finding.control.url, finding.fault)
    good = [f for f in findings if not f.fault]
    if args.broadcast_mib > 0 and good:
        broadcast(good, folder, args)
    return findings


def examine(finding: Finding, folder: HfFolder) -> None:
    """Reach, version, model and one generation of one server."""
    control = finding.control
    try:
        info = finding.info = control.probe()
        mismatch = config_mismatch(folder.config, info.model_config)
        architectures = tuple(folder.config.get("architectures") or ())
        if mismatch:
            finding.fault = f"serves another model than --hf-model: {mismatch}"
        elif info.architectures and architectures and info.architectures != architectures:
            finding.fault = f"serves {info.architectures[0]}, --hf-model is {architectures[0]}"
        elif info.dp_size > 1 or info.pp_size > 1:
            finding.fault = (
                f"runs with --dp-size {info.dp_size} --pp-size {info.pp_size}: weights can only be sent to tensor-parallel "
                "servers. Start several instead"
            )
        elif released_memory(info.weight_label) is not None:
            finding.fault = "sleeps, as a run that was killed left it: the next run's first sync wakes it"
        if finding.fault:
            return
        began = time.monotonic()
        num_tokens = check_generation(control, folder.shape.vocab_size)
        finding.said += [
            f"SGLang {info.version}",
            nccl_text(info.version),
            f"tp {info.tp_size}",
            "update session" if info.has_update_session else "no update session",
            "heeds seeds" if info.is_deterministic else "seeds not heeded",
            f"{info.max_total_tokens:,} tokens of cache"
            if info.max_total_tokens
            else "size of cache unknown",
            f"weights {info.weight_label!r}",
            f"{num_tokens} tokens in {time.monotonic() - began:.2f} s",
        ]
        if info.model_config is None:
            finding.said.append("its config.json cannot be read here: model compared by architecture only")
    except ServerError as error:
        finding.fault = error.reason
        if error.reason.startswith("/generate gave no answer"):
            finding.fault += (
                ". A server that a run left paused takes requests again after the next run's first sync"
            )


def nccl_text(sglang: str) -> str:
    """The server's NCCL, as its version of SGLang comes with it, and whether this process's connects to it."""
    pair = pair_of_sglang(sglang)
    if pair is None:
        return "NCCL unknown"
    fits = (
        "as here"
        if not objection(sglang, own_pair())
        else f"here {own_pair().nccl}: on GPUs they do not connect"
    )
    return f"NCCL {pair.nccl} of torch {pair.torch} ({fits})"


def broadcast(findings: Sequence[Finding], folder: HfFolder, args: argparse.Namespace) -> None:
    """Send some of the folder's tensors to all servers at once and add the speed to what is said of them."""
    controls = [f.control for f in findings]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        served = WireFormat.read(controls[0].info.model_config or folder.config)
        if served.is_block_fp8:
            raise ValueError(
                "the servers want FP8 weights, which only the trainer makes: use --broadcast-mib 0."
            )
        buckets = first_buckets(folder, served, args.broadcast_mib * 2**20)
        prepare_nccl(args.sync_interface)
        group = UpdateGroup(
            controls,
            [c.info.tp_size for c in controls],
            name=f"check-{uuid.uuid4().hex[:8]}",
            backend="nccl" if device.type == "cuda" else "gloo",
            address=args.sync_address or local_address([c.url for c in controls], args.sync_interface),
            port=args.sync_port,
            interface=args.sync_interface,
            device=device,
            timeout_s=args.deadline_s,
        )
    except GroupFailure as failure:
        blame(findings, failure, "joining the test broadcast")
        return
    try:
        seconds = send(group, controls, folder, buckets, device)
    except GroupFailure as failure:
        blame(findings, failure, "the test broadcast")
        return
    finally:
        group.close()
    num_bytes = sum(b.num_bytes for b in buckets)
    for finding in findings:
        finding.said.append(
            f"broadcast to {len(findings)} of {num_bytes / 1e6:,.1f} MB at {num_bytes / 1e9 / seconds:.2f} GB/s"
        )


def first_buckets(folder: HfFolder, served: WireFormat, limit: int) -> list[Bucket]:
    """Tensors of the model up to ``limit`` bytes, one at least, in buckets of an eighth of it."""
    chosen: list[Planned] = []
    total = 0
    for name, stored in folder.tensors.items():
        total += math.prod(stored.shape) * served.dtype.itemsize
        if chosen and total > limit:
            break
        chosen.append(Planned(name, stored.shape, served.dtype))
    return plan_buckets(chosen, served, max(1, limit // 8))


def send(
    group: UpdateGroup,
    controls: Sequence[ServerClient],
    folder: HfFolder,
    buckets: Sequence[Bucket],
    device: torch.device,
) -> float:
    """Broadcast the buckets as a sync would; seconds spent sending.

    However it ends, every server that can be reached is let go on.

    Raises:
        GroupFailure: a server failed; the first failure, not one of the cleaning up after it.
    """

    def stop(control: Server) -> None:
        control.pause("abort")
        control.begin_weight_update()

    seconds = 0.0
    try:
        check_none(ask_all(controls, stop))
        for bucket in buckets:
            memory = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
            for name, view in bucket.views(memory).items():
                view.copy_(folder.read(name))
            began = time.monotonic()
            group.broadcast(bucket, memory)
            seconds += time.monotonic() - began
    except BaseException:
        ask_all(controls, let_go_on)
        raise
    check_none(ask_all(controls, let_go_on))
    return seconds


def let_go_on(control: Server) -> None:
    """Close the session, forget what was cached and generate again; each is tried whatever became of the one before."""
    failures = []
    for step in (control.end_weight_update, control.flush_cache, control.resume):
        try:
            step()
        except ServerError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def check_none(failed: dict[str, str]) -> None:
    """GroupFailure if a server failed."""
    if failed:
        raise GroupFailure(next(iter(failed.values())), failed)


def blame(findings: Sequence[Finding], failure: GroupFailure, what: str) -> None:
    """Put a failed broadcast down to the servers at fault, or to all if it cannot be told."""
    for finding in findings:
        reason = failure.servers.get(finding.control.url)
        if reason is not None or not failure.servers:
            finding.fault = f"{what} failed: {reason or failure}. Restart it before training"
            doubt = _nccl_doubt(finding)
            if doubt:
                finding.fault += f". {doubt}"


def _nccl_doubt(finding: Finding) -> str:
    """Why NCCL may be what failed; empty on a CPU, and where both sides have the same version as far as is known."""
    if finding.info is None or not torch.cuda.is_available():
        return ""
    try:
        return objection(finding.info.version, own_pair())
    except LookupError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
