"""Conversations, images and model configs that tests of the data pipeline share."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from cptjax.models.families import PRESETS

TINY = PRESETS["tiny"]
TINY = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab=384))
QWEN = PRESETS["7b"]
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


def make_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
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
    """A user's turn of texts and images."""
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


CONVERSATIONS = {
    "text": [user("What is 17 times 23?")],
    "plain string": [{"role": "user", "content": "Hello there, Größe 漢字 🙂"}],
    "system": [{"role": "system", "content": "Be brief."}, user("Hi")],
    "image": [user(make_image(120, 90), "What is this?")],
    "three images": [
        user(
            "Compare",
            make_image(300, 100, 1),
            "with",
            make_image(57, 233, 2),
            "and\n",
            make_image(448, 448, 3),
            ".",
        )
    ],
    "several turns": [
        user(make_image(99, 64), "Colour?"),
        says("It is red."),
        user("Sure?", make_image(200, 40, 5)),
        says("Yes, quite.\n\nVery."),
    ],
}
