"""Files are replaced atomically, and files of lines survive a kill."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cptjax.common import files
from cptjax.common.files import LineFile


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = LineFile(path)
    lines.append({"a": 1})
    position = lines.position()
    assert files.describe_change(path, position) == "" == files.describe_change(path, {"bytes": 9})
    lines.append({"a": 2})
    assert files.describe_change(path, position) == ""
    assert lines.position() == files.file_position(path)
    change = files.describe_change(path, {"bytes": 99})
    assert change == f"{path} has 18 bytes; 99 were recorded"
    path.write_text('{"a": 3}\n')
    change = files.describe_change(path, position)
    assert change == f"{path} was changed: its first 9 bytes are not those that were recorded"
    path.unlink()
    change = files.describe_change(path, position)
    assert change == f"{path} is missing; 9 bytes of it were recorded"


def test_a_file_that_is_cut_ends_with_a_complete_line(tmp_path):
    lines = LineFile(tmp_path / "x.jsonl")
    lines.append({"a": 1}, {"a": 2})
    first = lines.position()
    lines.truncate(12)
    assert lines.position()["bytes"] == 9 and lines.position() != first
    lines.truncate(99)
    lines.append({"a": 2})
    assert lines.position() == first


def test_line_ends_that_a_spreadsheet_changed_are_restored(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'a,b\n1,"two\nlines"\n')
    position = files.file_position(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert files.describe_change(path, position) and files.restore_line_ends(path, position)
    assert files.describe_change(path, position) == ""
    path.write_bytes(path.read_bytes().replace(b"1", b"2").replace(b"\n", b"\r\n"))
    assert not files.restore_line_ends(path, position) and b"\r\n" in path.read_bytes()


def test_a_changed_or_broken_json_file_is_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    files.write_checked_json(path, {"a": 1, "b": [1.5, None]})
    assert files.read_checked_json(path) == {"a": 1, "b": [1.5, None]}
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(ValueError, match=r"x.json: its values differ from their sha256; restore"):
        files.read_checked_json(path)
    for text in ("", "\0\0", '{"a": 1', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x.json: expected JSON \(.*\); restore the file"):
            files.read_json(path)


def test_an_incomplete_last_line_is_removed_when_the_file_is_opened(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ')
    lines = LineFile(tmp_path / "x.jsonl")
    lines.append({"a": 2})
    assert [row["a"] for row in files.read_jsonl(tmp_path / "x.jsonl")] == [1, 2]


def test_replacing_a_file_keeps_the_old_one_when_writing_fails(tmp_path, monkeypatch):
    files.write_json(tmp_path / "s.json", {"x": math.inf, "y": np.arange(2)})
    assert json.loads((tmp_path / "s.json").read_text()) == {"x": None, "y": [0, 1]}
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        files.write_json(tmp_path / "s.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"] and "[" in (
        tmp_path / "s.json"
    ).read_text()


def test_a_file_is_on_disk_before_it_replaces_another_and_its_name_after(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "s.json"
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: calls.append(names) or replace(*names))
    files.write_json(path, {"a": 1})
    temporary, (source, target), folder = calls
    assert temporary == source and target == path and folder == tmp_path


def test_the_size_of_a_folder_that_changes_meanwhile(tmp_path, monkeypatch):
    for name in ("a", "b/c", "b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    assert files.folder_bytes(tmp_path) == 15
    stat = os.stat

    def remove_first(path, *args, **kwargs):
        if str(path).endswith("c"):
            Path(path).unlink(missing_ok=True)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", remove_first)
    assert files.folder_bytes(tmp_path) == 10


def test_a_folder_may_start_with_a_tilde_and_has_no_bracket(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.orbax_folder("~/runs") == tmp_path / "runs"
    with pytest.raises(
        ValueError, match=r"--workdir=a/run\[1\]: Orbax cannot read .*another folder"
    ):
        files.orbax_folder("a/run[1]")


class TransportError(Exception):
    """As that of httpx, which is no OSError."""


class OfflineModeIsEnabled(ConnectionError):
    """As that of huggingface_hub."""


@pytest.mark.parametrize(
    ("cause", "is_outage"),
    [
        (TransportError("no route"), True),
        (TimeoutError(), True),
        (OfflineModeIsEnabled(), False),
        (FileNotFoundError("no such model"), False),
        (None, False),
    ],
    ids=repr,
)
def test_an_outage_is_told_from_a_wrong_name_by_the_cause(cause, is_outage):
    try:
        raise OSError("not in the cache") from cause
    except OSError as error:
        assert files.is_outage(error) == is_outage


@pytest.mark.parametrize(("status", "is_outage"), [(404, False), (429, True), (503, True)])
def test_an_outage_is_told_by_the_answer_of_the_server(status, is_outage):
    error = ValueError("answer")
    error.response = SimpleNamespace(status_code=status)
    assert files.is_outage(error) == is_outage
