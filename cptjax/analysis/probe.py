"""Open the model of a run read-only, to sample, score and differentiate responses."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from cptjax import sharding
from cptjax.common import buckets, console
from cptjax.common.shuffle import permutation
from cptjax.config import Stage, merge_config
from cptjax.continual import open_run, resume, stage_end, stage_evaluation, workdir
from cptjax.continual.model_state import restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data.collate import EncodedConversation
from cptjax.data.device_batches import batch_slices, conversation_batch, cut_to_shards
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample, make_example_encoder
from cptjax.models import decoder, logprobs, trainable
from cptjax.models.config import ModelConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training import build, rollouts
from cptjax.training.rollouts import GradedRollouts
from cptjax.types import Batch, Example, Params

SCORE_BATCH = 16  # number of responses that are scored at a time


@contextlib.contextmanager
def open_run_of_folder(folder: Path | str, dtype: str) -> Iterator[Run]:
    """Open the run of a workdir read-only with its own config, but arithmetic in `dtype`."""
    folder = buckets.fetch(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; expected the --workdir of launch/train.py, or the "
            "folder of one run in it"
        )
    config = merge_config(workdir.read_run_config(folder), {"model": {"compute_dtype": dtype}})
    with open_run.open_run_readonly(config, folder) as run:
        yield run


@dataclasses.dataclass(frozen=True)
class Probe:
    """The model that a stage starts from, and the training data of the stage."""

    run: Run
    stage: Stage
    model_ctx: ModelContext  # with room for prompts and their responses
    trained: Params
    frozen: Params

    @functools.cached_property
    def params(self) -> Params:
        return trainable.join_params(self.trained, self.frozen)

    @functools.cached_property
    def other_tasks(self) -> list[str]:
        """The tasks that the stage can harm: those of earlier stages and the general tasks."""
        earlier = [task for s in self.run.stages[: self.stage.number - 1] for task in s.tasks]
        general = stage_evaluation.tasks_to_evaluate(self.run.config, self.run.stages)[1]
        return [t for t in dict.fromkeys((*earlier, *general)) if t not in self.stage.tasks]

    def saved_steps(self) -> list[int]:
        """Return the steps of the stage whose weights are known: 0, the saved ones, the end."""
        checkpoints, number = self.run.files.checkpoints, self.stage.number
        found = checkpoints.found() if checkpoints else []  # none with checkpoint.keep_stages=False
        return sorted({0, *(step for stage, step, _ in found if stage == number)})

    def at_step(self, step: int) -> "Probe":
        """Return this probe with the weights after a step of the stage."""
        if step not in (steps := self.saved_steps()):
            raise ValueError(
                f"step {step} of stage {self.stage.number} is not saved; there are "
                f"{', '.join(map(str, steps))} (checkpoint.every and checkpoint.keep decide)"
            )
        if step == 0:
            return self
        checkpoints, number = self.run.files.checkpoints, self.stage.number
        kind = "steps" if (number, step, "steps") in checkpoints.found() else "stages"
        structure = resume.checkpoint_structure(self.run, kind, self.stage, self.trained)
        name = "state" if kind == "steps" else "params"
        tree = checkpoints.restore(kind, number, step, {name: structure[name]})[name]
        return dataclasses.replace(self, trained=tree.params if kind == "steps" else tree)

    @functools.cached_property
    def prompted_tasks(self) -> dict[str, PromptedTask]:
        return {
            name: self.run.datasets.prompted_task(name, self.stage.config)
            for name in self.stage.tasks
        }

    def train_examples(self, task: str) -> Sequence[Example]:
        return self.run.datasets.examples(task, "train", self.stage.config)

    def training_rows(self, count: int) -> list[tuple[str, int]]:
        """Choose `count` training rows by the run's seed, evenly from the stage's tasks."""
        tasks, rows = self.stage.tasks, []
        for k, task in enumerate(tasks):
            share = count // len(tasks) + (k < count % len(tasks))
            rows += [(task, i) for i in self._choose(len(self.train_examples(task)), share)]
        return rows

    def _choose(self, size: int, count: int) -> list[int]:
        return permutation(size, (self.run.config.seed, self.stage.number, 30_000))[:count].tolist()

    def encode_prompts(self, rows: Sequence[tuple[str, int]]) -> list[EncodedExample]:
        encode = make_example_encoder(
            self.model_ctx, self.prompted_tasks, False, max(self.model_ctx.buckets)
        )
        return [
            dataclasses.replace(encode(self.train_examples(task)[i]), row=i) for task, i in rows
        ]

    def with_gold_response(self, item: EncodedExample) -> EncodedConversation:
        """Return a prompt with its gold response."""
        prompted = self.prompted_tasks[item.example.task]
        return self.with_response(item, prompted.gold_response(item.example))

    def with_response(self, item: EncodedExample, response: str) -> EncodedConversation:
        return self.model_ctx.processor.append_response(
            item.encoded, response, limit=max(self.model_ctx.buckets)
        )

    def gold_test_responses(self, task: str, count: int) -> list[EncodedConversation]:
        """Return gold responses of another task's test rows, with the template of evaluation."""
        config = self.run.config
        template = stage_evaluation.templates_of_task(self.run, task)[0]
        prompted = self.run.datasets.prompted_task(task, config, template)
        examples = self.run.datasets.examples(task, "test", config, template)
        encode = make_example_encoder(
            self.model_ctx, {task: prompted}, True, max(self.model_ctx.buckets)
        )
        return [encode(examples[i]).encoded for i in self._choose(len(examples), count)]

    def sample_graded(self, items: Sequence[EncodedExample], samples: int) -> list[GradedRollouts]:
        """Sample responses to prompts and grade them as the stage does, in batches of prompts."""
        size = cut_to_shards(self.stage.config.train.batch, self.model_ctx.shards)
        changes = {
            "method": {"advantage": "dr_grpo", "updates_per_batch": 1},
            "rollout": {"group": samples},
            "train": {"batch": size * jax.process_count(), "micro_batch": 0},  # one device pass
        }
        config = merge_config(self.stage.config, changes)
        builder = build.batch_builder_from_config(
            self.run.model_ctx, self.prompted_tasks, config, self.params
        )
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), 30_000 + self.stage.number)
        batches = []
        with console.progress_bar("sample responses", len(items)) as bar:
            for part in batch_slices(len(items), size):
                count = part.stop - part.start
                # Fill the batch to the compiled shape.
                batch = [*items[part], *[items[part.stop - 1]] * (size - count)]
                graded = rollouts.sample_rollouts(builder, self.params, batch, key, part.start)
                keep = [np.arange(len(graded.items)) < count]
                batches.append(rollouts.join_groups([graded], keep, count))
                bar.advance(count)
        return batches

    @functools.cached_property
    def gradient(self) -> Callable[[EncodedConversation], Params]:
        """f(conversation) -> gradient of its negative log-likelihood in the trained weights."""
        gradient = stage_end.make_example_gradient(self.model_ctx, self.stage.config)

        def gradient_on_mesh(encoded: EncodedConversation) -> Params:
            with jax.set_mesh(self.model_ctx.mesh):
                return gradient(self.trained, self.frozen, encoded)

        return gradient_on_mesh

    def token_logprobs(
        self, encoded: Sequence[EncodedConversation], trained: Params | None = None
    ) -> list[np.ndarray]:
        """Compute the log-probabilities of each conversation's response tokens.

        `trained` replaces the trained weights of the probe.
        """
        params = self.params if trained is None else trainable.join_params(trained, self.frozen)
        program = logprobs.make_scoring_program(
            self.model_ctx.cfg, self.model_ctx.dtype, self.stage.config.train.chunk, 1.0
        )
        return self._by_token(program, params, encoded)

    def logit_gradient_norms(self, encoded: Sequence[EncodedConversation]) -> list[np.ndarray]:
        """Compute |d log p / d logits|^2 for each response token."""
        chunk = self.stage.config.train.chunk
        program = _logit_gradient_program(self.model_ctx.cfg, self.model_ctx.dtype, chunk)
        return self._by_token(program, self.params, encoded)

    def _by_token(
        self,
        program: Callable[[Params, Batch], jax.Array],
        params: Params,
        encoded: Sequence[EncodedConversation],
    ) -> list[np.ndarray]:
        """Run a program on batches of conversations; return its values at the response tokens."""
        rows = -(-SCORE_BATCH // self.model_ctx.shards) * self.model_ctx.shards
        values = []
        with jax.set_mesh(self.model_ctx.mesh):
            for part in batch_slices(len(encoded), rows):
                batch = conversation_batch(self.model_ctx, encoded[part], rows=rows)
                by_token = sharding.local_rows(program(params, batch))
                mask = sharding.local_rows(batch.mask).astype(bool)
                for i in range(part.stop - part.start):
                    values.append(by_token[i][mask[i]])
        return values


@contextlib.contextmanager
def open_probe(
    folder: Path | str, number: int, others: str, dtype: str
) -> Iterator[tuple[Probe, list[str]]]:
    """Open the probe at the start of a stage, and yield it with the names of the other tasks.

    `others` are their names, separated by commas, or "" for all.
    """
    with open_run_of_folder(folder, dtype) as run:
        if not 1 <= number <= len(run.stages):
            raise ValueError(f"--stage={number}; the run has stages 1 to {len(run.stages)}")
        stage = run.stages[number - 1]
        params = restore_stage_params(run.config, run.model_ctx, run.files.checkpoints, number - 1)
        model_ctx = run.model_ctx.with_longer_rows(stage.config.rollout.max_new_tokens + 1)
        probe = Probe(run, stage, model_ctx, *split_trained(run.config, params))
        names = [task for task in others.split(",") if task]
        if names:
            names = stage_evaluation.select_tasks(run, names, "--others")
        else:
            names = probe.other_tasks
        if not names:
            raise ValueError(
                f"stage {number} has no stage before it, and eval.general names no task: "
                "give --others=task,task"
            )
        yield probe, names


@functools.lru_cache(maxsize=8)
def _logit_gradient_program(
    cfg: ModelConfig, dtype: DTypeLike, chunk: int
) -> Callable[[Params, Batch], jax.Array]:
    def norms(params: Params, batch: Batch) -> jax.Array:
        params = trainable.cast_params(params, dtype)
        hidden = logprobs.predicting_states(params, batch, cfg, dtype)
        flat, unembed = hidden.reshape(-1, hidden.shape[-1]), decoder.unembedding(params["text"])
        by_token = logprobs.logit_gradient_norm(
            flat, unembed, batch.targets.reshape(-1), chunk=chunk
        )
        return by_token.reshape(batch.targets.shape)

    return jax.jit(norms)
