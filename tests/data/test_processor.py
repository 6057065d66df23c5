"""Encoded conversations equal those of transformers' processor; loss masks cover the responses."""

import dataclasses

import numpy as np
import pytest
from conversation_helpers import CONVERSATIONS, TEMPLATE, encoded, fails, make_image, says, user
from PIL import Image

from cptjax.data import processor
from cptjax.models.families import PRESETS
from cptjax.models.vision_qwen2_5 import normalise_patches


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
        pixels = np.concatenate([normalise_patches(m.patches, ours.cfg.vision) for m in ours.media])
        assert pixels.dtype == np.float32 and np.array_equal(pixels, wanted["pixel_values"])


def test_a_cached_layout_equals_a_new_one(qwen):
    """A row is encoded as by a new processor, whatever was encoded before.

    Equal rows share arrays.
    """
    clip = lambda fps: {
        "role": "user",
        "content": [
            {"type": "video", "video": [make_image(60, 60, i) for i in range(8)], "fps": fps}
        ],
    }
    asked = [
        [user(make_image(*size), word)]
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
        qwen.encode([user(make_image(120, 90, 3), "One?")]),
        qwen.encode([user(make_image(120, 90, 4), "One?")]),
    )
    assert again.tokens is other.tokens and not np.array_equal(
        again.media[0].patches, other.media[0].patches
    )
    with pytest.raises(ValueError, match="read-only"):
        again.tokens[0] = 1


def test_the_small_template(tiny):
    text = tiny.render(
        [user("a", {"type": "image"}, "b"), says("c"), {"role": "user", "content": "d"}]
    )
    assert text == (
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
def test_the_loss_mask_covers_the_responses_and_their_ends(stage, request):
    p = request.getfixturevalue(stage)
    messages = [
        user(make_image(40, 30), "one"),
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
    """The prompt that is sampled from has the tokens of the prompt that is trained on."""
    p = request.getfixturevalue(stage)
    for answer in ("it is red", "\n\nred", " red", ""):
        prompt, whole = (
            p.encode([user(make_image(40, 30), "x")]),
            p.encode([user(make_image(40, 30), "x"), says(answer)]),
        )
        n = len(prompt)
        assert (
            whole.tokens[:n].tolist() == prompt.tokens.tolist()
            and not whole.loss_mask[:n].any()
            and whole.loss_mask[n]
        )
        assert np.array_equal(whole.positions[:, :n], prompt.positions)


@pytest.mark.parametrize("stage", ["tiny", "qwen"])
def test_a_response_appended_to_its_prompt_is_the_whole_conversation(stage, request):
    p = request.getfixturevalue(stage)
    clip = {"type": "video", "video": [make_image(56, 56, s) for s in range(4)]}
    # The time ids of this clip exceed the sides of its frames, which have 2 x 2 tokens.
    long_clip = {"type": "video", "video": [make_image(56, 56, s) for s in range(16)], "fps": 1.0}
    e = p.encode([user(long_clip, "x")])
    assert np.ptp(e.positions[0][e.types == 2]) > 2
    several = [user(make_image(40, 30), "x"), says("red"), user("and", make_image(60, 90, 1), "?")]
    prompts = [[user("x")], [user(make_image(40, 30), "x")], [user(clip, "x")], several]
    for prompt in (*prompts, [user(long_clip, "x")], [user("see", long_clip)]):
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
def test_a_prefix_is_the_start_of_a_response(stage, prefix, request):
    p = request.getfixturevalue(stage)
    answer = f"{prefix} red" if prefix[-1].isalpha() else f"{prefix}red"
    whole, prompt = p.encode([user("x"), says(answer)]), p.encode([user("x")])
    forced = prompt.tokens.tolist() + p.prefix_ids(prefix)
    n = len(forced)
    assert whole.tokens[:n].tolist() == forced and not prompt.loss_mask.any()
    assert p.tokenizer.decode(whole.tokens[n:].tolist()).strip().startswith("red<|im_end|>")


def test_an_image_is_the_same_from_file_bytes_or_memory(tiny, tmp_path):
    image = make_image(70, 50)
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
    (tmp_path / "turned.jpg").write_bytes(encoded(make_image(200, 60), "JPEG", exif=turned))
    (tmp_path / "cut.png").write_bytes(
        encoded(make_image(200, 160))[:200]
    )  # the header is whole, the rest is not
    clip = {"type": "video", "video": [make_image(60, 40)] * 3}
    for p in (tiny, qwen):
        messages = [
            user("a", tmp_path / "turned.jpg", clip, encoded(make_image(90, 30)), "b"),
            says("c"),
        ]
        e = p.encode(messages)
        assert p.measure(messages) == (len(e), [m.grid for m in e.media])
        assert p.measure([user(tmp_path / "cut.png")])[0] > 4
        fails(lambda: p.encode([user(tmp_path / "cut.png")]), "cut.png", "corrupt")


def test_templates_that_lose_something_are_refused(tiny):
    deaf = dataclasses.replace(
        tiny, template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    )
    fails(lambda: deaf.encode([user("a", make_image(20, 20))]), "0 images")
    fails(
        lambda: deaf.encode(
            [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
        ),
        "an end token",
    )
    broken = dataclasses.replace(tiny, template="{{ raise_exception('no tools') }}")
    fails(lambda: broken.encode([user("a")]), "no tools")


LLAMA3_TEMPLATE = (  # the form of Llama 3.2's, without tools
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING_TEMPLATE = (  # as in Qwen3, the response to the last question alone has a thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _text_processor(template: str, *tokens: str) -> processor.Processor:
    """Return the processor of a tiny llama with more special tokens."""
    made = processor.load_processor(None, PRESETS["tiny_llama"])
    made.tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if tokens:
        made.tokenizer.bos_token = tokens[0]
    cfg = dataclasses.replace(made.cfg, eos=(0,))
    return processor.stop_at_turn_end(dataclasses.replace(made, template=template, cfg=cfg))


def _responses(p: processor.Processor, e) -> list[str]:
    spans = np.split(np.arange(len(e)), np.flatnonzero(np.diff(e.loss_mask)) + 1)
    return [p.tokenizer.decode(e.tokens[s].tolist()) for s in spans if e.loss_mask[s[0]]]


def test_a_template_that_is_not_chatml():
    headers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    p = _text_processor(LLAMA3_TEMPLATE, *headers)
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "colour?"}]
    talk = [{"role": "user", "content": parts}, says("red"), user("and?"), says("blue")]
    e = p.encode(talk)
    assert _responses(p, e) == ["red<|eot_id|>", "blue<|eot_id|>"]
    assert p.tokenizer.convert_ids_to_tokens(e.tokens.tolist())[0] == headers[0]
    assert p.cfg.eos == (0, p.tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    assert "what colour?" in p.render_text(talk) and processor.TEMPLATE_DATE in p.render_text(talk)
    assert (e.positions == np.arange(len(e))).all() and e.positions.shape == (3, len(e))
    again = p.append_response(p.encode(talk[:3]), "blue")
    assert again.tokens.tolist() == e.tokens.tolist()
    assert again.loss_mask.sum() == len(p.ids("red<|eot_id|>")) + len(p.ids("blue<|eot_id|>"))
    fails(lambda: p.encode([user("a<|eot_id|>")]), "only the processor writes")


def test_a_template_that_adds_to_the_last_response():
    p = _text_processor(THINKING_TEMPLATE)
    talk = [user("a"), says("red"), user("b"), says("blue")]
    thought = "<think>\n\n</think>\n\n"
    assert _responses(p, p.encode(talk)) == ["red<|im_end|>", f"{thought}blue<|im_end|>"]
    again = p.append_response(p.encode(talk[:3]), "blue")
    assert again.tokens.tolist() == p.encode(talk).tokens.tolist()


def test_images_are_refused_by_a_text_model():
    p = _text_processor(THINKING_TEMPLATE)
    for call in (p.encode, p.measure):
        fails(lambda: call([user(make_image(20, 20), "a")]), "a llama model takes only text")
