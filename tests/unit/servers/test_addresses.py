"""The server file: several processes add and remove addresses at once, and an invalid line is named."""

import multiprocessing
from pathlib import Path

import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.servers.addresses import add_address, read_addresses, remove_address


def test_servers_come_and_go_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "servers.txt"
    assert read_addresses(path) == []
    remove_address(path, "http://a:1")
    for address in ("http://a:1", "http://b:2", "http://a:1", "http://[::1]:3"):
        add_address(path, address)
    assert read_addresses(path) == ["http://a:1", "http://b:2", "http://[::1]:3"]
    remove_address(path, "http://a:1")
    assert read_addresses(path) == ["http://b:2", "http://[::1]:3"]


def test_a_file_written_by_hand_may_have_comments_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(
        "# node 1\nhttp://a:1/\n\n  http://a:1\nHTTP://A:01\nhttps://[FD00::1]:2/\nhttps://[fd00::1]:2\n"
    )
    assert read_addresses(path) == ["http://a:1", "https://[fd00::1]:2"]


@pytest.mark.parametrize(
    "line",
    [
        "a:1",
        "http://a",
        "http://a:1/v1",
        "ftp://a:1",
        "http://a:99999",
        "http://a:x",
        "http://a..b:1",
        "http://a b:1",
        "http://a\t:1",
        f"http://{'a' * 64}:1",
        "http://\u200b:1",
        "http://user:secret@a:1",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(f"http://a:1\n{line}\n")
    with pytest.raises(ValueError, match=r"servers\.txt:2") as caught:
        read_addresses(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="--rollout-urls"):
        RolloutConfig(rollout_engine="sglang", rollout_urls=[line])


def _come_and_go(path: Path, number: int) -> None:
    for _ in range(20):
        add_address(path, f"http://leaving:{number}")
        add_address(path, f"http://staying:{number}")
        remove_address(path, f"http://leaving:{number}")


def test_no_server_is_lost_when_many_sign_on_at_once(tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_come_and_go, args=(path, i + 1)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(read_addresses(path)) == [f"http://staying:{i + 1}" for i in range(3)]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        read_addresses(path)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be read"):
        read_addresses(tmp_path)
