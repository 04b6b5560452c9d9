import json
from pathlib import Path

import pytest

from megatron_rasft.errors import RasftError
from megatron_rasft.files import replacing, similar_file, write_json, write_text, written_to


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path, is_synced: bool) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with replacing(path, is_synced=is_synced) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("crash", [OSError, KeyboardInterrupt])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, crash: type[BaseException]) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(crash), replacing(path) as temporary:
        temporary.write_text("ne")
        raise crash
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    (tmp_path / "state.tmp").write_text("ne")  # SIGKILL runs no handler that could delete it
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_permissions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(0o640)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_content_is_utf_8_and_json_ends_with_a_newline(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "π\n")
    assert (tmp_path / "text").read_bytes() == "π\n".encode()
    write_json(tmp_path / "value", {"a": [1]}, indent=None)
    assert (tmp_path / "value").read_text() == '{"a": [1]}\n'
    write_json(tmp_path / "value", {"a": [1]}, is_synced=True)
    assert json.loads((tmp_path / "value").read_text()) == {"a": [1]}


def test_a_failed_write_names_file_flag_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(RasftError) as caught, written_to(path, "--save"):
        write_text(path, "x")
    assert all(part in str(caught.value) for part in (str(path), "--save", "No such file"))


def test_the_file_with_the_most_similar_name_is_found(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert similar_file(tmp_path / "trian.jsonl") == tmp_path / "train.jsonl"
    assert similar_file(tmp_path / "other.parquet") is None
    assert similar_file(tmp_path / "nowhere" / "train.jsonl") is None
