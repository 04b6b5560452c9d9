"""The versions of torch and NCCL that come with a version of SGLang."""

import re
import tomllib
from pathlib import Path

import pytest

from megatron_rasft.sync.nccl_versions import NEWEST_SGLANG, Pair, objection, own_pair, pair_of_sglang, table

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("sglang", "pair"),
    [
        ("0.5.11", Pair("2.11", "2.28.9")),
        ("0.5.15.post1", Pair("2.11", "2.28.9")),
        ("0.5.17.dev30", Pair("2.11", "2.28.9")),
        ("0.5.18", Pair("2.13", "2.29.7")),
        ("0.5.21", Pair("2.13", "2.29.7")),
        ("0.5.22", Pair("2.14", "2.30.7")),
        ("0.5.23", Pair("2.14", "2.30.7")),
        ("0.5.10", None),
        ("0.5.24", None),
        ("of unknown version", None),
    ],
)
def test_a_version_of_sglang_comes_with_a_torch_and_an_nccl(sglang: str, pair: Pair | None) -> None:
    assert pair_of_sglang(sglang) == pair


def test_an_objection_names_both_sides_and_both_ways_out() -> None:
    assert objection("0.5.23", Pair("2.14", "2.30.7")) == ""
    text = objection("0.5.17", Pair("2.14", "2.30.7"))
    for part in ("SGLang 0.5.17", "2.28.9", "torch 2.14", "2.30.7", "torch 2.11", "SGLang 0.5.22 to 0.5.23"):
        assert part in text
    with pytest.raises(LookupError, match=r"SGLang 0\.6\.1"):
        objection("0.6.1", Pair("2.14", "2.30.7"))


def test_the_documented_table_is_the_one_in_use() -> None:
    rows = re.findall(
        r"^\| (0\.\S+ to 0\.\S+) \| (\S+) \| (\S+) \|", (ROOT / "docs/servers.md").read_text(), re.MULTILINE
    )
    assert [(versions, Pair(torch, nccl)) for versions, torch, nccl in rows] == table()


def test_a_default_installation_connects_to_the_newest_sglang() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = re.findall(r"^torch>=\S+,<(\d+)\.(\d+)$", "\n".join(project["dependencies"]), re.MULTILINE)
    newest = pair_of_sglang(".".join(map(str, NEWEST_SGLANG)))
    assert newest is not None and newest.torch == f"{bound[0]}.{int(bound[1]) - 1}"


def test_the_own_pair_is_that_of_the_installed_torch() -> None:
    assert re.fullmatch(r"\d+\.\d+", own_pair().torch) and re.fullmatch(r"\d+\.\d+\.\d+", own_pair().nccl)
