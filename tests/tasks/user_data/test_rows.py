"""A user's row: prompts, images, videos and answers, and every way in which they can be wrong."""

import io
import json
import logging
import unicodedata
import warnings
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image
from row_helpers import RED, bad_rows, load, only_bad, pixel, row, write

from cptjax.common.images import MAX_FILE_PIXELS, open_image
from cptjax.tasks.bad_rows import BadRow
from cptjax.tasks.scoring.puzzles import score_iou50
from cptjax.tasks.scoring.text import score_json
from cptjax.tasks.task import example_text


def image_size(example, turn=0, part=0):
    return open_image(example.messages[turn]["content"][part]["image"]).size


def test_a_prompt_is_built_from_columns(folder):
    source = write(
        folder, {"q": "What colour?", "hint": "look", "picture": "a.png", "label": "red"}
    )
    (example,) = load(
        source, columns={"images": "picture", "answer": "label"}, prompt="<image>{q} ({hint})"
    )
    assert example_text(example) == "<image>What colour? (look)" and example.meta == {
        "q": "What colour?",
        "hint": "look",
    }


def test_several_images_text_only_rows_and_the_other_columns(folder):
    source = write(
        folder,
        row(prompt="<image> or <image>?", images=["a.png", "b.jpg"], level=3),
        {"prompt": "1 + 1?", "answer": 2},
    )
    several, text = load(source)
    assert [part["type"] for part in several.messages[0]["content"]] == [
        "image",
        "text",
        "image",
        "text",
    ]
    assert pixel(several) == RED and several.meta == {"level": 3}
    assert (
        text.messages == [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
        and text.answer == "2"
    )


def test_videos_are_files_frame_lists_or_folders_of_frames(folder):
    (folder / "clip.mp4").write_bytes(b"film")
    (folder / "frames").mkdir()
    for number in (2, 1):
        Image.new("RGB", (number, 5)).save(folder / "frames" / f"{number}.png")
    examples = load(
        write(
            folder,
            {"prompt": "<video>What?", "videos": "clip.mp4", "answer": "x"},
            {"prompt": "<video>What?", "videos": [["a.png", "b.jpg"]], "answer": "x"},
            {"prompt": "<video>What?", "videos": ["a.png", "b.jpg"], "answer": "x"},
            {"prompt": "<video>What?", "videos": "frames", "answer": "x"},
            {"prompt": "<video>What?", "videos": "gone.mp4", "answer": "x"},
        )
    )
    films = [example.messages[0]["content"][0]["video"] for example in examples]
    assert films[0] == str(folder / "clip.mp4")
    assert (
        [open_image(frame).size for frame in films[1]]
        == [open_image(frame).size for frame in films[2]]
        == [(12, 8), (8, 12)]
    )
    assert [open_image(frame).width for frame in films[3]] == [1, 2]
    assert [bad.row for bad in examples.bad] == [5] and "gone.mp4: no such file" in examples.bad[
        0
    ].reason


def test_messages_bring_their_images_inline_or_take_them_from_the_column(folder):
    inline = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
        }
    ]
    waiting = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And "}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<image>?"},
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
    shared = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    first, second, third = load(
        write(
            folder,
            {"messages": inline, "answer": "red"},
            {"messages": waiting, "images": ["a.png", "b.jpg"]},
            {"messages": shared, "images": ["a.png"]},
        )
    )
    assert pixel(first) == RED and first.answer == "red"
    assert [turn["role"] for turn in second.messages] == ["system", "user", "assistant", "user"]
    assert image_size(second, turn=1) == (12, 8) and image_size(second, turn=3) == (8, 12)
    assert (second.answer, second.target) == ("blue", "blue") and (
        third.answer,
        example_text(third),
    ) == ("red", "<image>What?")


def test_with_a_users_reward_answers_may_be_missing_or_objects(folder):
    source = write(
        folder, {"prompt": "Write.", "rubric": "short"}, {"prompt": "Go.", "rubric": "long"}
    )
    examples = load(source, reward="my.py:reward", columns={"prompt": "prompt"})
    assert [e.answer for e in examples] == ["", ""] and examples[0].meta == {"rubric": "short"}
    assert [bad.reason for bad in load(source).bad] == ["the answer is empty"] * 2
    (example,) = load(
        write(folder, {"prompt": "Write.", "answer": {"max": 3}}), reward="my.py:reward"
    )
    assert example.answer == {"max": 3} and example.target == ""


def test_missing_file(folder):
    assert only_bad(load(write(folder, row(), row(images=["no.png"])))) == BadRow(
        str(folder / "train.jsonl"), 2, f"{folder / 'no.png'}: no such file"
    )


def test_truncated_jpeg(folder):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        whole, "JPEG"
    )
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:1500])
    bad = only_bad(load(write(folder, row(), row(images=["cut.jpg"]))))
    assert (
        bad.row == 2 and "cut.jpg: cut short or corrupt" in bad.reason and "truncated" in bad.reason
    )


def test_a_file_that_is_no_image(folder):
    (folder / "page.jpg").write_text("<html>not found</html>")
    assert (
        "page.jpg: not an image that can be read"
        in only_bad(load(write(folder, row(images=["page.jpg"])))).reason
    )


def test_cmyk_palette_grey_and_transparent_images_keep_their_colours(folder):
    red = Image.new("RGB", (6, 6), RED)
    red.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    red.quantize(4).save(folder / "palette.png")
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("LA", (6, 6), (90, 255)).save(folder / "la.png")
    near = lambda pixel, colour: max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 4
    assert near(open_image("cmyk.jpg", folder).getpixel((2, 2)), RED)
    assert open_image("palette.png", folder).getpixel((2, 2)) == RED
    assert open_image("clear.png", folder).getpixel((2, 2)) == (255, 255, 255)
    assert open_image("la.png", folder).getpixel((2, 2)) == (90, 90, 90)
    assert (
        bad_rows(
            load(
                write(
                    folder,
                    *(
                        row(images=[name])
                        for name in ("cmyk.jpg", "palette.png", "clear.png", "la.png")
                    ),
                )
            )
        )
        == []
    )


def test_sixteen_bit_images_are_scaled_not_cut(folder):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(folder / "deep.png")
    Image.fromarray(values.astype(np.float32) / 65535).save(folder / "float.tiff")
    for name in ("deep.png", "float.tiff"):
        grey = np.asarray(open_image(name, folder))[..., 0].astype(int)
        assert np.abs(grey - values / 257).max() <= 1 and grey.max() == 255


def test_one_pixel_is_an_image_but_a_strip_that_is_too_long_is_not(folder):
    Image.new("RGB", (1, 1), RED).save(folder / "dot.png")
    Image.new("RGB", (500, 1)).save(folder / "strip.png")
    examples = load(write(folder, row(images=["dot.png"]), row(images=["strip.png"])))
    assert pixel(examples[0]) == RED
    assert str(only_bad(examples)).endswith(
        "train.jsonl:2: an image of 500 x 1 pixels is too narrow; expected an aspect ratio of at "
        "most 200"
    )


def test_an_animation_gives_its_first_frame_and_says_so(folder, caplog):
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, "blue", "green")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, "cptjax"):
        assert pixel(load(write(folder, row(images=["film.gif"])))[0]) == RED
    assert "film.gif: an animation of 3 frames, the first one is used" in caplog.text


def test_placeholders_that_do_not_match_the_images(folder):
    examples = load(
        write(
            folder,
            row(prompt="What?"),
            row(prompt="<image><image>"),
            row(images=[]),
            row(prompt="<video>", images=None),
        )
    )
    assert [(bad.row, bad.reason.partition(";")[0]) for bad in bad_rows(examples)] == [
        (1, "0 <image> in the prompt but 1 image(s) in the row"),
        (2, "2 <image> in the prompt but 1 image(s) in the row"),
        (3, "1 <image> in the prompt but 0 image(s) in the row"),
        (4, "1 <video> in the prompt but 0 video(s) in the row"),
    ]


def test_empty_answers(folder):
    examples = load(
        write(
            folder,
            row(),
            *(row(answer=empty) for empty in ("", "  ", None, [], ["", None], {})),
            '{"prompt": "a"}',
        )
    )
    assert [(bad.row, bad.reason) for bad in bad_rows(examples)] == [
        (number, "the answer is empty") for number in range(2, 9)
    ]


def test_answers_of_other_types_become_text(folder):
    examples = load(
        write(folder, *(row(answer=answer) for answer in (3, 2.5, True, ["red", 7], 0)))
    )
    assert [e.answer for e in examples] == ["3", "2.5", "True", ["red", "7"], "0"]
    assert [e.target for e in examples] == ["3", "2.5", "True", "red", "0"]


def test_labels_of_multiple_choice_become_letters_or_are_refused(folder):
    labels = (2, "2", 2.0, "C", "(c).", 26, -1, True, "cat", ["C"])
    examples = load(write(folder, *(row(answer=label) for label in labels)), scorer="mcq_letter")
    assert [(e.answer, e.target) for e in examples] == [("C", "C")] * 5
    assert [bad.row for bad in examples.bad] == [6, 7, 8, 9, 10]
    assert "expected one letter, or the number of an option from 0 to 25, got 26; give" in (
        examples.bad[0].reason
    )
    (example,) = load(write(folder, row(answer=2, target="It is C.")), scorer="mcq_letter")
    assert (example.answer, example.target) == ("C", "It is C.")


def test_a_list_of_numbers_is_trained_on_as_one_answer(folder):
    (box,) = load(write(folder, row(answer=[10, 20, 30, 40])), scorer="iou50")
    assert box.target == "[10, 20, 30, 40]"
    assert score_iou50(box.target, box.answer) == 1.0
    (again,) = load(write(folder, row(answer="a box", target=[0.5, 1])))
    assert (again.answer, again.target) == ("a box", "[0.5, 1]")


@pytest.mark.parametrize("answer", [{"name": "Évry", "age": 7}, [1, {"a": None}], 3, True])
def test_objects_are_answers_of_the_json_scorer(folder, answer):
    (example,) = load(write(folder, row(answer=answer)), scorer="json")
    assert example.answer == answer and example.target == json.dumps(answer, ensure_ascii=False)
    assert score_json(example.target, example.answer) == 1.0
    assert score_json('"x"', example.answer) == 0.0


def test_a_column_missing_from_one_row_is_an_error_of_that_row(folder):
    assert str(only_bad(load(write(folder, row(), {"images": [], "answer": "x"})))).endswith(
        "train.jsonl:2: the prompt is empty"
    )


def test_unicode_names_in_either_normal_form(folder):
    for stored, asked in (("NFD", "NFC"), ("NFC", "NFD")):
        name = f"été-{stored}-图.png"
        Image.new("RGB", (5, 5), RED).save(folder / unicodedata.normalize(stored, name))
        (example,) = load(
            write(folder, row(images=[unicodedata.normalize(asked, name)], prompt="<image>색깔?"))
        )
        assert pixel(example) == RED and example_text(example) == "<image>색깔?"


@pytest.fixture
def outside(tmp_path_factory):
    """A folder with an image, which is not the folder of the data."""
    path = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (5, 5), RED).save(path / "far.png")
    return path


def test_images_lie_in_the_folder_of_the_data_file_or_in_that_of_the_task(
    folder, outside, monkeypatch
):
    monkeypatch.chdir(outside)
    (folder / "link.png").symlink_to("a.png")
    source = write(
        folder,
        row(images=["./a.png"]),
        row(images=[str(folder / "a.png")]),
        row(images=["link.png"]),
        row(images=["/no/such.png"]),
    )
    examples = load(source)
    assert [pixel(example) for example in examples] == [RED, RED, RED]
    (bad,) = examples.bad
    assert bad.row == 4 and "/no/such.png: no such file" in bad.reason
    (example,) = load(write(folder, row(images=["far.png"])), image_root=str(outside))
    assert pixel(example) == RED


def test_images_elsewhere_need_a_setting(folder, outside, monkeypatch):
    monkeypatch.chdir(outside)
    (folder / "data").mkdir()
    (folder / "data" / "file.png").symlink_to(outside / "far.png")
    (folder / "data" / "photos").symlink_to(outside)
    ways = ("../a.png", str(outside / "far.png"), "file.png", "photos/far.png")
    source = write(
        folder / "data",
        *(row(images=[way]) for way in ways),
        row(
            images=[],
            messages=[{"role": "user", "content": [{"type": "image", "image": "../a.png"}]}],
        ),
        row(prompt="<video>?", images=[], videos=["photos"]),
    )
    examples = load(source)
    assert not len(examples) and [bad.row for bad in examples.bad] == [1, 2, 3, 4, 5, 6]
    for bad in examples.bad:
        assert (
            bad.file == source
            and f"outside of the folder of the data ({folder}/data)" in bad.reason
        )
        assert "name its folder in data.outside_images" in bad.reason
    real = f"file.png is {outside}/far.png, outside of"
    assert real in examples.bad[2].reason
    allowed = load(source, outside=(str(outside), str(folder)))
    assert len(allowed) == 6 and not allowed.bad
    assert [bad.row for bad in load(source, outside=(str(outside),)).bad] == [1, 5]
    assert len(load(source, outside=("/",))) == 6


def test_rows_of_the_hub_read_no_file_of_this_machine(folder, monkeypatch):
    """Neither by an absolute path nor from the working folder."""
    monkeypatch.chdir(folder)
    rows = [row(images=[path]) for path in (str(folder / "a.png"), "a.png")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    examples = load("org/name")
    reasons = [bad.reason for bad in examples.bad]
    assert "outside of the folder of the data" in reasons[0] and "no such file" in reasons[1]


def test_addresses_are_not_fetched(folder):
    assert (
        "addresses are not fetched; download the file"
        in only_bad(load(write(folder, row(images=["https://x.org/a.png"])))).reason
    )


@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_decompression_bombs_are_refused_before_decoding(folder, warned):
    """The check does not depend on Pillow's warning, whose filters any thread may change."""
    warnings.simplefilter(warned, Image.DecompressionBombWarning)
    side = int(MAX_FILE_PIXELS**0.5) + 10
    for name, size in (("bomb.png", (side, side)), ("huge.png", (side * 2, side * 2))):
        chunk = lambda kind, data: (
            len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
        )
        header = size[0].to_bytes(4) + size[1].to_bytes(4) + bytes([8, 2, 0, 0, 0])
        (folder / name).write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", b"")
            + chunk(b"IEND", b"")
        )
    bad = bad_rows(load(write(folder, row(images=["bomb.png"]), row(images=["huge.png"]))))
    assert [problem.row for problem in bad] == [1, 2] and all(
        "pixels allowed; shrink the image" in problem.reason for problem in bad
    )


def test_bytes_arrays_pil_and_rotated_photos_open_alike(folder):
    photo = Image.new("RGB", (20, 10), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to be upright
    photo.save(folder / "photo.jpg", exif=exif)
    raw = (folder / "photo.jpg").read_bytes()
    for source in (
        raw,
        {"bytes": raw, "path": None},
        {"path": str(folder / "photo.jpg"), "bytes": None},
        Image.open(folder / "photo.jpg"),
    ):
        assert open_image(source).size == (10, 20)
    assert open_image(np.zeros((3, 4), np.uint8)).size == (4, 3)
    for nothing in (None, "", 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="image: expected a path, bytes or a PIL image, got"):
            open_image(nothing)
