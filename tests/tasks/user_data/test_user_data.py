"""A user's own data: every container, every way a row can be wrong, and what is then said."""

import csv
import io
import json
import logging
import unicodedata
import warnings
import zlib

import cloudpickle
import datasets
import numpy as np
import pytest
from PIL import Image
from row_helpers import bad_rows

from cptjax.common.images import MAX_FILE_PIXELS, open_image
from cptjax.tasks.bad_rows import BadRow, drop_bad_rows
from cptjax.tasks.registry import resolve_task
from cptjax.tasks.task import example_text

RED = (200, 30, 30)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (12, 8), RED).save(tmp_path / "a.png")
    Image.new("RGB", (8, 12), "blue").save(tmp_path / "b.jpg")
    return tmp_path


def row(**changes):
    return {"prompt": "<image>What colour?", "images": ["a.png"], "answer": "red"} | changes


def write(folder, *rows, name="train.jsonl"):
    lines = [
        each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows
    ]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def load(source, split="train", seed=0, limit=None, **settings):
    return resolve_task("mine", {"mine": {"train": source, **settings}}).load(
        split, seed=seed, limit=limit
    )


def only_bad(examples):
    (bad,) = bad_rows(examples)
    return bad


def pixel(example, part=0):
    return open_image(example.messages[0]["content"][part]["image"]).getpixel((0, 0))


def image_size(example, turn=0, part=0):
    return open_image(example.messages[turn]["content"][part]["image"]).size


# --- containers


def as_json(folder):
    (folder / "d.json").write_text(
        json.dumps({"data": [row(), row(images="b.jpg", answer="blue")]})
    )
    return "d.json"


def as_csv(folder):
    with open(folder / "d.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ["prompt", "images", "answer"],
                ["<image>What colour?", "a.png", "red"],
                ["<image>What colour?", '["b.jpg"]', "blue"],
            ]
        )
    return "d.csv"


def as_parquet(folder):
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("string"),
        }
    )
    rows = [row(images=[str(folder / "a.png")]), row(images=[str(folder / "b.jpg")], answer="blue")]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "d.parquet")
    return "d.parquet"


def as_folder(folder):
    write(
        folder,
        {"file_name": "a.png", "prompt": "<image>What colour?", "answer": "red"},
        {"file_name": "b.jpg", "prompt": "<image>What colour?", "answer": "blue"},
        name="metadata.jsonl",
    )
    return "."


def as_saved_dataset(folder):
    datasets.Dataset.from_list(
        [row(images=[str(folder / "a.png")]), row(images=[str(folder / "b.jpg")], answer="blue")]
    ).save_to_disk(folder / "saved")
    return "saved"


def as_json_lines_named_json(folder):
    return write(folder, row(), row(images=["b.jpg"], answer="blue"), name="d.json").rpartition(
        "/"
    )[2]


@pytest.mark.parametrize(
    "container",
    [as_json, as_csv, as_parquet, as_folder, as_saved_dataset, as_json_lines_named_json],
)
def test_every_container_gives_the_same_examples(folder, container):
    examples = load(str(folder / container(folder)))
    assert bad_rows(examples) == []
    assert [(example_text(e), e.answer, e.target) for e in examples] == [
        ("<image>What colour?", "red", "red"),
        ("<image>What colour?", "blue", "blue"),
    ]
    assert pixel(examples[0]) == RED and image_size(examples[1]) == (8, 12)


def test_a_folder_of_classes_needs_only_a_question(folder):
    (folder / "pets" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "pets" / "cat" / "1.png")
    (example,) = load(str(folder / "pets"), prompt="<image>Which animal?")
    assert (example_text(example), example.answer) == ("<image>Which animal?", "cat")


def test_a_hub_dataset_by_id_config_and_split(folder, monkeypatch):
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "Why?", "image": None, "label": 3}])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    (example,) = load("org/name:small@dev", columns={"answer": "label"})
    assert asked == [("org/name", "small", "dev")] and (example_text(example), example.answer) == (
        "Why?",
        "3",
    )


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


def test_answers_of_a_reward_of_ones_own_may_be_missing_or_objects(folder):
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


# --- the fifteen ways in which a row can be wrong


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


def test_one_pixel_is_an_image_and_a_strip_too_long_for_the_processor_is_not(folder):
    Image.new("RGB", (1, 1), RED).save(folder / "dot.png")
    Image.new("RGB", (500, 1)).save(folder / "strip.png")
    examples = load(write(folder, row(images=["dot.png"]), row(images=["strip.png"])))
    assert pixel(examples[0]) == RED
    assert str(only_bad(examples)).endswith(
        "train.jsonl:2: an image of 500 x 1 pixels is too narrow; the sides may differ 200 times at most"
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


def test_answers_that_are_no_text_become_text(folder):
    examples = load(
        write(folder, *(row(answer=answer) for answer in (3, 2.5, True, ["red", 7], 0)))
    )
    assert [e.answer for e in examples] == ["3", "2.5", "True", ["red", "7"], "0"]
    assert [e.target for e in examples] == ["3", "2.5", "True", "red", "0"]


def test_bad_json_lines(folder):
    examples = load(write(folder, row(), '{"prompt": "cut', "", "[1, 2]", row()))
    assert len(examples) == 2
    assert [(bad.row, bad.reason.partition(" (")[0]) for bad in examples.bad] == [
        (2, "not JSON in UTF-8"),
        (4, "expected an object {...}, got list"),
    ]
    (folder / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert only_bad(load(str(folder / "latin.jsonl"))).row == 2


def test_bad_csv_rows(folder):
    (folder / "d.csv").write_text('prompt,answer\n"one\nline",1\na,b,c\nonly\n')
    examples = load(str(folder / "d.csv"))
    assert example_text(examples[0]) == "one\nline"
    assert [(bad.row, bad.reason.split(";")[0]) for bad in examples.bad] == [
        (4, "more fields than the header's 2"),
        (5, "fewer fields than the header's 2"),
    ]


def test_unknown_columns_and_settings_name_the_nearest(folder):
    source = write(folder, {"questions": "a", "label": "b"})
    with pytest.raises(
        ValueError,
        match="no column 'question'; did you mean 'questions'.; it has questions, label; set columns.prompt",
    ):
        load(source, columns={"prompt": "question"})
    with pytest.raises(ValueError, match="no column 'prompt'; it has questions, label"):
        load(source)
    with pytest.raises(ValueError, match="no column 'labels'; did you mean 'label'"):
        load(source, prompt="{questions} {labels}")
    with pytest.raises(ValueError, match="unknown role 'prompts'; did you mean 'prompt'"):
        load(source, columns={"prompts": "questions"})
    with pytest.raises(ValueError, match="unknown setting 'scorrer'; did you mean 'scorer'"):
        load(source, scorrer="exact")
    (example,) = load(write(folder, row(extra=1)))
    assert example.meta == {"extra": 1}


def test_a_column_missing_from_one_row_is_that_rows_fault(folder):
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


def test_paths_are_relative_to_the_data_file_or_absolute_anywhere(
    folder, tmp_path_factory, monkeypatch
):
    outside = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (5, 5), RED).save(outside / "far.png")
    (folder / "data").mkdir()
    source = write(
        folder / "data",
        row(images=["../a.png"]),
        row(images=[str(outside / "far.png")]),
        row(images=["/no/such.png"]),
    )
    monkeypatch.chdir(outside)
    examples = load(source)
    assert [pixel(example) for example in examples] == [RED, RED]
    assert [bad.row for bad in examples.bad] == [
        3
    ] and "/no/such.png: no such file" in examples.bad[0].reason
    (example,) = load(write(folder / "data", row(images=["far.png"])), image_root=str(outside))
    assert pixel(example) == RED


def test_addresses_are_not_fetched(folder):
    assert (
        "addresses are not fetched; download the file"
        in only_bad(load(write(folder, row(images=["https://x.org/a.png"])))).reason
    )


def test_duplicate_ids(folder):
    examples = load(write(folder, row(id="x"), row(id="y"), row(id="x"), row(id=7), row(id=7)))
    assert [(bad.row, bad.reason) for bad in examples.bad] == [
        (3, "the id 'x' is already in use by an earlier row"),
        (5, "the id '7' is already in use by an earlier row"),
    ]
    assert [e.id for e in load(write(folder, row(), row()))] == ["train.jsonl:1", "train.jsonl:2"]


# --- around the rows


@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_decompression_bombs_are_refused_before_decoding(folder, warned):
    """Whatever becomes of Pillow's warning: filters belong to the process, and any thread may change them."""
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


def test_a_share_held_out_is_the_same_tenth_whatever_the_seed_and_the_bad_rows(folder):
    rows = [{"id": f"r{n}", "prompt": "q", "answer": str(n)} for n in range(100)]
    ids = lambda split, source, **options: [e.id for e in load(source, split, test=0.1, **options)]
    train, test = (ids(split, write(folder, *rows)) for split in ("train", "test"))
    assert len(test) == 10 and sorted(train + test) == sorted(r["id"] for r in rows)
    assert ids("test", write(folder, *rows), seed=5) == test
    shuffled = write(folder, *reversed(rows))
    assert sorted(ids("test", shuffled)) == sorted(test)
    worse = [r | {"answer": ""} if r["id"] == test[0] else r for r in rows]
    assert (
        ids("test", write(folder, *worse)) == test[1:]
        and ids("train", write(folder, *worse)) == train
    )
    limited = ids("train", write(folder, *rows), limit=20)
    assert len(limited) == 20 and set(limited) < set(train)


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


def test_sources_that_make_no_sense_are_one_line(folder):
    with pytest.raises(
        ValueError, match="no/such/file.jsonl: no such file or folder, nor a hub dataset"
    ):
        load("no/such/file.jsonl")
    with pytest.raises(
        ValueError,
        match="train.txt: expected a data file that ends in .jsonl, .json, .csv, .parquet",
    ):
        load(write(folder, row(), name="train.txt"))
    with pytest.raises(
        ValueError,
        match="tasks.mine.test: expected a file, folder or hub id, or a share of train between 0 and 1; got 1.5",
    ):
        load(write(folder, row()), test=1.5)
    with pytest.raises(ValueError, match="tasks.mine: give train, test or both"):
        resolve_task("mine", {"mine": {"scorer": "exact"}})
    with pytest.raises(ValueError, match="task mine: no test data; it has train"):
        load(write(folder, row()), "test")
    with pytest.raises(ValueError, match="no rows for train"):
        load(write(folder))
    (folder / "broken.json").write_text('[{"prompt": ')
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        load(str(folder / "broken.json"))


def test_settings_pass_through_to_the_task_and_examples_to_workers(folder):
    task = resolve_task(
        "mine",
        {
            "mine": {
                "test": write(folder, row()),
                "reward": "my.py:reward",
                "scorer": "my.py:score",
                "template": "t.jinja",
            }
        },
    )
    assert (task.name, task.reward, task.scorer, task.template) == (
        "mine",
        "my.py:reward",
        "my.py:score",
        "t.jinja",
    )
    assert cloudpickle.loads(cloudpickle.dumps(task.load("test")))[0].answer == "red"
