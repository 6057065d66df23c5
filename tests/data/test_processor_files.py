"""A saved processor loads in transformers and here; wrong files are refused with one line each."""

import dataclasses
import json

from conversation_helpers import QWEN, TEMPLATE, TINY, fails, make_image, says, user

from cptjax.data import processor
from cptjax.models.families import PRESETS


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


def test_the_small_processor_is_saved_and_read_again(tiny, tmp_path):
    tiny.save(tmp_path)
    again = processor.load_processor(tmp_path, TINY)
    messages = [user(make_image(40, 24), "what colour is the shape?"), says("it is red")]
    assert (
        again.pixels == tiny.pixels
        and again.encode(messages).tokens.tolist() == tiny.encode(messages).tokens.tolist()
    )


def test_the_tower_gets_the_pixel_values_of_its_checkpoint(tiny, tmp_path):
    tiny.save(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    assert processor.load_processor(tmp_path, TINY).cfg.vision == TINY.vision
    other = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "rescale_factor": 1.0}
    path.write_text(json.dumps(saved | other))
    v = processor.load_processor(tmp_path, TINY).cfg.vision
    assert (v.pixel_mean, v.pixel_std, v.pixel_scale) == ((0.1, 0.2, 0.3), (1, 2, 3), 1.0)
    path.write_text(json.dumps(saved | {"image_std": [0.5]}))
    fails(lambda: processor.load_processor(tmp_path, TINY), "image_std=[0.5]", "3 channels")


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
    fails(lambda: processor.load_processor(tmp_path, TINY), "expected JSON")
