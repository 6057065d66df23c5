"""Run steps of GRPO through the trainer, as a user's run does, on images and rows from the disk.

The model is random. Its responses end at random: so many of the vocabulary's tokens are end tokens
that a response has `mean` tokens on average and, apart from the limit, a geometric distribution of
lengths. The tokenizer is the package's own small one; a token that it does not have is no text.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cptjax.benchmark.phase_times import CompilationCounter
from cptjax.benchmark.workload import find_size
from cptjax.common import console, files
from cptjax.config import merge_config
from cptjax.continual import driver, open_run, reference_models, train_stage
from cptjax.continual.model_state import ModelState, restore_stage_params
from cptjax.continual.open_run import Run
from cptjax.continual.stage_callbacks import StageCallbacks
from cptjax.continual.workdir import software_versions
from cptjax.models.config import ModelConfig
from cptjax.models.families import PRESETS
from cptjax.training import train_loop
from cptjax.training.stage_context import StageProgress
from cptjax.types import TrainState

PRESET = "bench"
LENGTHS = "geometric: a random share of the vocabulary ends a response"
REWARD = '''"""A reward of a user's own, which a random model earns half of the time."""

import zlib


def reward(completion, answer, **columns):
    coin = zlib.crc32(completion.encode()) % 2
    return {"reward": float(coin), "right": float(answer in completion)}
'''


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The shapes of a step on one device, and how its model is trained."""

    model: str  # a name of workload.BENCH_SIZES
    side: int  # pixels of a side of an image
    words: int  # of a question, on average
    prompts: int
    group: int
    new: int  # the most tokens of a response
    mean: int  # tokens of a response on average
    updates: int  # of the optimizer
    micro: int = 0  # prompts of a device pass; 0 = all
    model_settings: tuple[tuple[str, Any], ...] = ()
    train_settings: tuple[tuple[str, Any], ...] = ()

    def on_devices(self, devices: int) -> "StepSize":
        """Return the size with so many times the prompts."""
        return dataclasses.replace(self, prompts=self.prompts * devices, micro=self.micro * devices)

    def find_model(self) -> ModelConfig:
        """Return the model with the token ids of the package's tokenizer and more end tokens."""
        cfg, own = find_size(self.model), PRESETS["tiny"]
        names = ("image_token", "video_token", "vision_start", "vision_end", "pad")
        ids = {name: getattr(own, name) for name in names}
        count = round(cfg.text.vocab * end_probability(self.mean, self.new))
        first = max(*own.eos, *ids.values()) + 1
        ends = np.random.default_rng(0).choice(np.arange(first, cfg.text.vocab), count, False)
        return dataclasses.replace(cfg, **ids, eos=(*own.eos, *map(int, sorted(ends))))


STEP_SIZES = {
    "cpu-s": StepSize(
        *("cpu-s", 112, 24, 8, 8, 64, 15, 2),
        model_settings=(("compute_dtype", "float32"),),
    ),
    # The weights are float32, the arithmetic is bfloat16.
    "3b": StepSize("3b", 1008, 60, 16, 8, 1024, 246, 4, micro=2),
    # On one GPU, only weights and Adam's moments in bfloat16 leave space for a step.
    "7b": StepSize(
        *("7b", 1008, 60, 16, 8, 1024, 246, 4),
        micro=1,
        model_settings=(("param_dtype", "bfloat16"),),
        train_settings=(("moments_dtype", "bfloat16"),),
    ),
}


def end_probability(mean: float, most: int) -> float:
    """Return the probability to end at each token for which responses have `mean` tokens.

    `most` is the limit. The mean of a geometric distribution that is cut there is
    (1 - (1 - p)^most) / p.
    """
    p = 1 / mean
    for _ in range(100):
        p = (1 - (1 - p) ** most) / mean
    return p


def write_task(size: StepSize, count: int, folder: Path) -> dict[str, Any]:
    """Write a task in the form of a user's data, with a reward; return its settings."""
    rng = np.random.default_rng(1)
    words = ("it", "is", "red", "blue", "shape", "what", "which", "digit", "how", "there")
    lines = []
    for i in range(count):
        # Smooth images, so that they cost as much to read as photos and not as noise.
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        image = Image.fromarray(pixels).resize((size.side, size.side), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=90)
        question = rng.choice(words, rng.integers(size.words // 2, size.words * 3 // 2 + 1))
        row = {"prompt": f"<image>{' '.join(question)}", "images": [f"{i}.jpg"], "answer": "red"}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)
    rows = str(folder / "rows.jsonl")
    reward = f"{folder / 'reward.py'}:reward"
    return dict(train=rows, test=rows, template="none", reward=reward)


def make_config(
    base: ConfigDict, size: StepSize, steps: int, task: dict[str, Any], changes: Mapping[str, Any]
) -> ConfigDict:
    """Return the config of a run: GRPO with a KL term to the model at its start, top_p=0.99.

    base: `get_config()` of configs/base.py, whose method is GRPO
    changes: of this run, by section
    """
    image_tokens = (size.side // find_size(size.model).vision.patch) ** 2
    image_tokens //= find_size(size.model).vision.merge ** 2
    config = merge_config(
        base,
        dict(
            name="bench",
            model=dict(size.model_settings)
            | dict(path="", preset=PRESET, min_pixels=size.side**2, max_pixels=size.side**2),
            tasks=dict(images=task),
            stages=(dict(task="images", steps=steps),),
            data=dict(prompt_limit=image_tokens + 4 * size.words + 64),
            method=dict(ratio="token", updates_per_batch=size.updates),
            rollout=dict(group=size.group, max_new_tokens=size.new, top_p=0.99),
            train=dict(size.train_settings) | dict(batch=size.prompts, micro_batch=size.micro),
            checkpoint=dict(every=0, minutes=0.0),
            log=dict(report_minutes=0.0),
        ),
    )
    return merge_config(config, changes)


@contextlib.contextmanager
def preset(cfg: ModelConfig) -> Iterator[None]:
    """Let configs name this model as a preset."""
    PRESETS[PRESET] = cfg
    try:
        yield
    finally:
        del PRESETS[PRESET]


@dataclasses.dataclass
class StepWatch:
    """Follows the steps of a run, and ends it when enough of them compiled nothing."""

    repeat: int
    compilations: CompilationCounter
    compiled: list[int] = dataclasses.field(default_factory=list)  # by step
    ended: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = self.compilations.count

    def end_step(self) -> bool:
        """Record the end of a step; return whether another one is needed."""
        self.compiled.append(self.compilations.count - self._before)
        self._before = self.compilations.count
        self.ended.append(time.perf_counter())
        return len(self.measured) < self.repeat

    @property
    def measured(self) -> list[int]:
        """The indices of the steps after the first that compiled nothing; the others warm up."""
        return [i for i, count in enumerate(self.compiled) if i and not count]


def measure_steps(
    config: ConfigDict,
    workdir: Path,
    repeat: int,
    compilations: CompilationCounter,
    other_layers: bool = False,
) -> dict[str, Any]:
    """Train until `repeat` steps compiled nothing.

    Return their lines of metrics.jsonl, with `wall`, the seconds between the ends of two steps, and
    facts of the run.

    other_layers: sample with the layers in a loop if they are unrolled, or the reverse
    """
    driver.check_all_runs(config)
    watch = StepWatch(repeat, compilations)
    with open_run.open_run(config, workdir) as run:
        train(run, watch, other_layers)
        versions = software_versions(run.model_ctx)
        cfg = run.model_ctx.cfg
    if len(watch.measured) < repeat:
        raise ValueError(
            f"of {len(watch.compiled)} steps only {len(watch.measured)} compiled nothing; expected "
            f"{repeat}: give --repeat a smaller number"
        )
    lines = [line for line in files.read_jsonl(workdir / "metrics.jsonl") if "event" not in line]
    measured = [lines[i] | {"wall": watch.ended[i] - watch.ended[i - 1]} for i in watch.measured]
    return dict(
        steps=measured,
        warmup=len(watch.compiled) - repeat,
        compilations=sum(watch.compiled[i] for i in watch.measured),
        versions=versions,
        cfg=cfg,
    )


def with_other_layers(cfg: ModelConfig) -> ModelConfig:
    """Return the config that samples with layers in a loop if this one unrolls them, or reverse."""
    unroll = not cfg.compute.samples_unrolled
    return cfg.with_compute(unroll=unroll, unroll_sampling=unroll)


def train(run: Run, watch: StepWatch, other_layers: bool) -> None:
    """Train the only stage of a run until `watch` has enough steps; nothing is saved."""
    stage, model_ctx = run.stages[0], run.model_ctx
    model_state = ModelState(restore_stage_params(run.config, model_ctx, None, 0))
    start = reference_models.load_stage_start(run, stage, model_state.params, False)
    prepared = train_stage.prepare_stage(run, stage, model_state, start)
    ctx = prepared.ctx
    if other_layers:
        # The programs of scores and updates have the config from before.
        sampling_ctx = dataclasses.replace(model_ctx, cfg=with_other_layers(model_ctx.cfg))
        ctx.builder = dataclasses.replace(ctx.builder, model_ctx=sampling_ctx)
    with jax.set_mesh(model_ctx.mesh), console.progress_bar("steps", total=ctx.steps) as bar:
        callbacks = StageCallbacks(run, stage, ctx, prepared.frozen, {}, bar)

        def end_step(
            state: TrainState, progress: StageProgress, info: dict, rows: list[dict]
        ) -> bool:
            callbacks.after_step(state, progress, info, rows)
            return watch.end_step()

        train_loop.train_loop(
            ctx,
            prepared.state,
            prepared.frozen,
            prepared.programs,
            prepared.progress,
            prepared.arrays,
            end_step,
        )
