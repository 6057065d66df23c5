"""Bad rows are printed, counted against the number allowed, and dropped."""

import pytest
from row_helpers import bad_rows, load, row, write

from cptjax.tasks.bad_rows import drop_bad_rows


def test_check_prints_every_bad_row_and_stops_unless_so_many_are_allowed(folder):
    source = write(folder, row(), "nonsense", row(images=["no.png"]), row(answer=""), row())
    said, examples = [], load(source)
    with pytest.raises(
        ValueError,
        match=r"3 bad row\(s\), 2 allowed by data.bad_rows; the first: .*train.jsonl:2: not JSON",
    ):
        drop_bad_rows(examples, bad_rows(examples), allowed=2, print_line=said.append)
    assert (
        said[0] == "3 bad row(s) and 2 good ones:"
        and len(said) == 4
        and "train.jsonl:4: the answer is empty" in said[3]
    )
    (folder / "a.png").write_bytes(b"")
    examples = load(source)
    with pytest.raises(ValueError, match="5 bad"):
        drop_bad_rows(examples, bad_rows(examples), allowed=4, print_line=said.append)
    with pytest.raises(ValueError, match="no good row is left"):
        drop_bad_rows(examples, bad_rows(examples), allowed=5, print_line=said.append)


def test_check_leaves_out_rows_whose_image_does_not_open(folder):
    (folder / "bad.png").write_bytes(b"x")
    examples = load(write(folder, row(images=["bad.png"]), row(answer="kept")))
    good = drop_bad_rows(examples, bad_rows(examples), allowed=1, print_line=lambda line: None)
    assert [e.answer for e in good] == ["kept"] and good.where(0) == (
        str(folder / "train.jsonl"),
        2,
    )
