"""The published benchmarks: names, sizes and checksums."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["math", "code", "own"]
"""``own``: a set without answers or tests, which --verify-function grades."""


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A published benchmark, or the user's own set."""

    name: str
    title: str
    kind: Kind = "math"
    num_rows: int = 0
    """Number of rows. 0 for the user's own set, which is read without comparison."""
    text_sha256: str = ""
    """Checksum of the uncompressed file in this project's layout."""
    content_sha256: str = ""
    """Checksum of problems and answers (or tests) alone, the same in every layout; see ``benchmarks.fingerprint``."""
    also_called: tuple[str, ...] = ()
    """Other names of its files and folders, in lower case without - and _."""
    rel_tolerance: float = 0.0
    """Relative difference up to which two plain numbers are equal. The answers of Minerva are rounded."""


KNOWN_SETS = {
    known.name: known
    for known in (
        KnownSet(
            name="math500",
            title="MATH-500",
            num_rows=500,
            text_sha256="8fa50521e8e89f63d7e4687237ec286d4c091089df50220fbdfb3936e13455c5",
            content_sha256="d85ca86cb2e97aea30257325c85db1c7f8dfe89118932829c2fd5a0dad75a932",
            also_called=("mathoai",),
        ),
        KnownSet(
            name="minerva_math",
            title="Minerva Math",
            num_rows=272,
            text_sha256="4839734d80f9424c1c82a07a1a1b93edb52036e766c8e29761c8a4954f6806bc",
            content_sha256="2ebff90d263e64c28a694cdbc20add1e39ef8a415fa444b9e713c4d6f102326e",
            also_called=("minerva",),
            rel_tolerance=0.0001,
        ),
        KnownSet(
            name="olympiadbench",
            title="OlympiadBench",
            num_rows=675,
            text_sha256="97933724a5c90509e601f378ab893a8d15f91a84b28d07c6861477be98c55e19",
            content_sha256="0b2aad3bb38cd95fa646cecd7174e96480edd4e8b3edaa2874626661d7c0407c",
            also_called=(
                "olympiadbenchoetomathsencomp",
                "oetomathsencomp",
            ),
        ),
        KnownSet(
            name="aime24",
            title="AIME 2024",
            num_rows=30,
            text_sha256="9ce43c202fa7269e00fa4c7e7a100e1d99cc39e7c861b3477a3c2c1c2c8e952e",
            content_sha256="f21ec99c9e13fa168445e297ed62e650d86f5cbd4c8fb09538fc8ccef543d02d",
            also_called=("aime2024",),
        ),
        KnownSet(
            name="aime25",
            title="AIME 2025",
            num_rows=30,
            text_sha256="9f431f5388c4968e02788cfb8a5ebbc57e922c4f4f256da3b542d39308ba2cb0",
            content_sha256="e59c3718f1f302b8e1187e4b9a884746d08781519dfac378d888d3a4fe82472e",
            also_called=("aime2025",),
        ),
        KnownSet(
            name="amc23",
            title="AMC 2023",
            num_rows=40,
            text_sha256="47c63e1e8b72b5c19e8b7f832ed3d1013867d72e0d197655f74778bc88ed4e20",
            content_sha256="cedf90639c0c750a4de72b1ce16ae175ccb919a00b2b6723aa85abdacab7cb10",
            also_called=("amc2023",),
        ),
        KnownSet(
            name="gsm8k",
            title="GSM8K",
            num_rows=1319,
            text_sha256="5ead7c005a76aa5b09d33702e763f3a92438310dfe22081ddbd7fb3845a8df1b",
            content_sha256="e3ec5c25e8166ed663774851f30d2d818b20d2e14bd6fac53c119351601fc84c",
        ),
        KnownSet(
            name="humaneval",
            title="HumanEval",
            kind="code",
            num_rows=164,
            text_sha256="ce05ed2974a65963beca92b9238587ba786160d6d34daaa6d8ebadb2ff0950de",
            content_sha256="7b9e73c2ac7d531c6123df928f12ce6ccfc3c997f831ba3e2075101b1b1a1035",
            also_called=("openaihumaneval",),
        ),
        KnownSet(
            name="humaneval_plus",
            title="HumanEval+",
            kind="code",
            num_rows=164,
            text_sha256="0003123fbe320a3c2e774be4ab03d45a38e8d560af588eed5fcecc0f948fac60",
            content_sha256="e82114d4f74620f019d80103d2461067e66e84eed942bcd48345885f6f813c12",
            also_called=("humaneval+",),
        ),
        KnownSet(
            name="mbpp",
            title="MBPP",
            kind="code",
            num_rows=500,
            text_sha256="8616379903aff7d092bb3d52f0a2ec34dcc93f22a1df26fcfbe0dc96b9a41def",
            content_sha256="ab49f59544643947848fb5cb24f270a381ab25dad3c8f7c99c1594d3351626ac",
        ),
        KnownSet(
            name="mbpp_sanitized",
            title="MBPP (sanitized)",
            kind="code",
            num_rows=257,
            text_sha256="8607c82d35f927427a8d883146fda0138ce40e931fc6a28954916655da6765e2",
            content_sha256="300e11a06601a659d3256a3b0ced6b290e12c4e338a32acab895bdce1da833fe",
            also_called=("sanitizedmbpp",),
        ),
        KnownSet(
            name="mbpp_plus",
            title="MBPP+",
            kind="code",
            num_rows=378,
            text_sha256="563296aebd2a576f492746d5fb455db2448e3b6e78829524365cb68de344a33b",
            content_sha256="93769e5425d3d4e02d03f94db72737df70b12fe392c3e15e6982f05d99d77803",
            also_called=("mbpp+",),
        ),
        KnownSet(
            name="livecodebench_v1_public",
            title="LiveCodeBench v1 (public tests)",
            kind="code",
            num_rows=400,
            text_sha256="6d82ecea524d5e2557f2c5c20b9e9f39eafb14ed0fdb97eaebdcc357cfba4d39",
            content_sha256="02ed925891cd7b84eea16edda71c074030d9a786cb8d36c43243288d9f4e2b3c",
        ),
        KnownSet(
            name="livecodebench",
            title="LiveCodeBench (own file)",
            kind="code",
            also_called=(
                "lcb",
                "codegenerationlite",
            ),
        ),
    )
}
"""Known sets by name, in the order in which tables show them."""
