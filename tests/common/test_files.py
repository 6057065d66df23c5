"""Files are replaced atomically, and files of lines survive a kill."""

import json
import math
import os

import numpy as np
import pytest

from cptjax.common import files
from cptjax.common.files import LineFile


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    lines = LineFile(tmp_path / "x.jsonl")
    lines.append({"a": 1})
    with pytest.raises(ValueError, match=r"expects at least 99 bytes, the file has 9"):
        lines.truncate(99)


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
