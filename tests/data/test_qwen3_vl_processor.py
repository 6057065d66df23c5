"""Qwen3-VL's conversations, patches and videos equal those of transformers' processor."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conversation_helpers import CONVERSATIONS, TEMPLATE, fails, make_image, says, user

from cptjax.common.images import ImageSettings
from cptjax.data import processor
from cptjax.models.families import PRESETS
from cptjax.models.families.qwen3_vl import choose_frames_to_the_end
from cptjax.models.vision_qwen2_5 import normalise_patches

CFG = PRESETS["qwen3-vl-8b"]
LIMITS = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
VIDEO_LIMITS = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}


@pytest.fixture(scope="module")
def folder(qwen_folder):
    """The tokenizer of `qwen_folder` with the pixel limits of a released checkpoint."""
    limits = LIMITS | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    target = qwen_folder.with_name("qwen3_vl")
    target.mkdir()
    for file in qwen_folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "preprocessor_config.json").write_text(json.dumps(limits))
    (target / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_LIMITS))
    return target


@pytest.fixture(scope="module")
def ours(folder):
    return processor.load_processor(folder, CFG, max_pixels=512 * 512)


@pytest.fixture(scope="module")
def theirs(ours):
    pytest.importorskip("torch")
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            """transformers' video processor needs torchvision."""

    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 512 * 512},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    made = WithoutVideo(image_processor=images, tokenizer=ours.tokenizer, chat_template=TEMPLATE)
    made.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    return made


def _render(ours, messages):
    return ours.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", ["text", "three images", "several turns"])
def test_tokens_patches_and_grids_equal_transformers(ours, theirs, name):
    messages = CONVERSATIONS[name]
    mine = ours.encode(messages, generation=True)
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    images = [p["image"] for p in parts if p["type"] == "image"]
    wanted = theirs(text=[_render(ours, messages)], images=images or None, return_tensors="np")
    assert mine.tokens.tolist() == wanted["input_ids"][0].tolist()
    assert mine.types.tolist() == wanted["mm_token_type_ids"][0].tolist()
    if images:
        assert [list(m.grid) for m in mine.media] == wanted["image_grid_thw"].tolist()
        pixels = [normalise_patches(m.patches, ours.cfg.vision) for m in mine.media]
        assert np.array_equal(np.concatenate(pixels), wanted["pixel_values"])


def _video(frames: int, fps: float) -> dict:
    images = [make_image(150, 110, i) for i in range(frames)]
    return {"type": "video", "video": images, "fps": fps}


@pytest.mark.parametrize("frames,fps", [(6, 2.0), (5, 3.0), (2, 0.7)])
def test_a_video_is_written_as_transformers_writes_it(ours, theirs, frames, fps):
    """Each frame pair has its time and a placeholder; an image before it keeps its own."""
    from transformers.video_utils import VideoMetadata

    image = make_image(99, 64)
    messages = [user("Look:", image, "\nand (", _video(frames, fps), ") now?")]
    mine = ours.encode(messages)
    (t, h, w) = mine.media[1].grid
    assert t == -(-frames // 2)
    metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=[*range(frames)])
    inputs = {"video_grid_thw": np.array([[t, h, w]]), "video_metadata": [metadata]}
    _, image_texts = theirs._process_images([image], return_tensors="np")
    texts, _ = theirs.get_text_with_replacements(
        [_render(ours, messages)], image_texts, [theirs.replace_video_token(inputs, 0)]
    )
    assert mine.tokens.tolist() == ours.ids(texts[0])
    assert (mine.types == 2).sum() == t * h * w // 4
    assert ours.measure(messages) == (len(mine), [m.grid for m in mine.media])


def test_positions_of_a_video_equal_transformers(ours):
    import tiny_qwen3_vl

    torch = pytest.importorskip("torch")
    messages = [user(_video(6, 2.0), "and", make_image(300, 200), "?"), says("yes")]
    mine = ours.encode(messages)
    clip, still = (torch.tensor([m.grid]) for m in mine.media)
    theirs, _ = tiny_qwen3_vl.torch_model().model.get_rope_index(
        input_ids=torch.tensor(mine.tokens[None]).long(),
        mm_token_type_ids=torch.tensor(mine.types[None].astype(int)),
        image_grid_thw=still,
        video_grid_thw=clip,
    )
    np.testing.assert_array_equal(mine.positions, theirs[:, 0].numpy())


def test_a_response_appended_to_a_video_is_the_whole_conversation(ours):
    prompt = [user(_video(4, 2.0), "What?")]
    appended = ours.append_response(ours.encode(prompt), "It is red.")
    whole = ours.encode([*prompt, says("It is red.")])
    for name in ("tokens", "types", "positions", "loss_mask"):
        assert np.array_equal(getattr(appended, name), getattr(whole, name)), name


def test_frames_of_a_video_share_their_pixels_as_in_transformers():
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rng = random.Random(0)
    for low, high in ((4096, 25165824), (131072, 786432)):
        pixels = ImageSettings(65536, 16777216, video_pixels=(low, high), patch=16)
        for _ in range(300):
            n, h, w = rng.randint(2, 800), rng.randint(8, 1200), rng.randint(8, 1200)
            wanted = smart_resize(n, h, w, 2, 32, low, high)
            assert pixels.size(w, h, n) == wanted, (n, h, w)
    one = ImageSettings(1024, 4096, video_pixels=(4096, 25165824), patch=16)
    assert one.size(640, 640, 8) == (64, 64), "model.max_pixels also limits each frame"


def test_frames_are_chosen_as_in_transformers():
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    settings = SimpleNamespace(fps=2, min_frames=4, max_frames=768, num_frames=None)
    for total, fps in [(300, 30.0), (47, 23.976), (5, 10.0), (2, 1.0), (1, 30.0), (100_000, 60.0)]:
        metadata = VideoMetadata(total_num_frames=total, fps=fps)
        wanted = Qwen3VLVideoProcessor.sample_frames(settings, metadata)
        assert choose_frames_to_the_end(total, fps, 2.0, 2) == tuple(wanted.tolist())


def test_pixel_limits_are_read_and_saved(ours, folder, tmp_path):
    assert (ours.pixels.min_pixels, ours.pixels.max_pixels) == (65536, 512 * 512)
    assert ours.pixels.video_pixels == (4096, 25165824) and ours.cfg.vision.pixel_mean == (
        0.5,
        0.5,
        0.5,
    )
    ours.save(tmp_path)
    assert processor.load_processor(tmp_path, CFG).pixels == ours.pixels
    small = processor.load_processor(None, PRESETS["tiny_qwen3_vl"], 1024, 1024)
    (tmp_path / "small").mkdir()
    small.save(tmp_path / "small")
    again = processor.load_processor(tmp_path / "small", PRESETS["tiny_qwen3_vl"])
    assert again.pixels == small.pixels
    written = json.loads((tmp_path / "small" / "video_preprocessor_config.json").read_text())
    assert written["video_processor_type"] == "Qwen3VLVideoProcessor" and written["patch_size"] == 8
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    fails(lambda: processor.load_processor(tmp_path, CFG), "patch_size=14", "expected 16")
