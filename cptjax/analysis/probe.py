"""A run's model opened to look at: its answers, their likelihood, and the gradient of each."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax import sharding
from cptjax.common import console
from cptjax.common.shuffle import permutation
from cptjax.config import Stage, merge_config
from cptjax.continual import fisher, open_run, stage_evaluation, workdir
from cptjax.continual.model_state import restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data.collate import EncodedConversation
from cptjax.data.device_batches import batch_slices, conversation_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample, make_example_encoder
from cptjax.models import decoder, logprobs, trainable
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training import build, rollouts
from cptjax.training.rollouts import GradedRollouts
from cptjax.types import Batch, Params

SCORE_BATCH = 16  # answers that are scored at a time


@contextlib.contextmanager
def visit_run(folder: Path | str, dtype: str) -> Iterator[Run]:
    """The run of a workdir under its own config, its arithmetic in `dtype`; nothing of it is written."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; expected the --workdir of launch/train.py, or one run's folder in it"
        )
    with open_run.open_run_readonly(
        merge_config(workdir.read_run_config(folder), {"model": {"compute_dtype": dtype}}), folder
    ) as current:
        yield current


@dataclasses.dataclass(frozen=True)
class Probe:
    """The model that a stage starts from, and that stage's training data."""

    run: Run
    stage: Stage
    model_ctx: ModelContext  # of rows with their answers
    trained: Params
    frozen: Params

    @functools.cached_property
    def params(self) -> Params:
        return trainable.join_params(self.trained, self.frozen)

    @functools.cached_property
    def others(self) -> list[str]:
        """What the stage could harm: the tasks of earlier stages, and the general ones."""
        earlier = [t for s in self.run.stages[: self.stage.number - 1] for t in s.tasks]
        return [
            t
            for t in dict.fromkeys((*earlier, *stage_evaluation.tasks_to_evaluate(self.run)[1]))
            if t not in self.stage.tasks
        ]

    @functools.cached_property
    def prompted_tasks(self) -> dict[str, PromptedTask]:
        return {
            name: self.run.datasets.prompted_task(name, self.stage.config)
            for name in self.stage.tasks
        }

    def rows(self, count: int) -> list[tuple[str, int]]:
        """`count` of the stage's training rows, evenly from its tasks, chosen by the run's seed."""
        tasks = self.stage.tasks
        share = [count // len(tasks) + (k < count % len(tasks)) for k in range(len(tasks))]
        return [
            (name, i)
            for name, n in zip(tasks, share, strict=True)
            for i in self._chosen(len(self.source(name)), n)
        ]

    def source(self, task: str) -> Sequence[Any]:
        return self.run.datasets.examples(task, "train", self.stage.config)

    def _chosen(self, size: int, count: int) -> list[int]:
        return permutation(size, (self.run.config.seed, self.stage.number, 30_000))[:count].tolist()

    def prompts(self, rows: Sequence[tuple[str, int]]) -> list[EncodedExample]:
        build = make_example_encoder(
            self.model_ctx, self.prompted_tasks, False, max(self.model_ctx.buckets)
        )
        return [dataclasses.replace(build(self.source(name)[i]), row=i) for name, i in rows]

    def gold(self, item: EncodedExample) -> EncodedConversation:
        """A prompt with its gold answer."""
        return self.answered(
            item, self.prompted_tasks[item.example.task].gold_response(item.example)
        )

    def known(self, task: str, count: int) -> list[EncodedConversation]:
        """Gold answers of another task's test rows, under the template that it is examined with."""
        c = self.run.config
        template = stage_evaluation.templates_of_task(self.run, task)[0]
        prompted, examples = (
            self.run.datasets.prompted_task(task, c, template),
            self.run.datasets.examples(task, "test", c, template),
        )
        build = make_example_encoder(
            self.model_ctx, {task: prompted}, True, max(self.model_ctx.buckets)
        )
        return [build(examples[i]).encoded for i in self._chosen(len(examples), count)]

    def drawn(self, items: Sequence[EncodedExample], samples: int) -> list[GradedRollouts]:
        """Answers of the model to these prompts and their rewards, as the stage would draw them; in parts."""
        config = merge_config(
            self.stage.config, {"method": {"advantage": "dr_grpo"}, "rollout": {"group": samples}}
        )
        builder = build.batch_builder_from_config(self.run.model_ctx, self.prompted_tasks, config)
        size = max(
            self.model_ctx.shards,
            config.train.batch // self.model_ctx.shards * self.model_ctx.shards,
        )
        key, out = (
            jax.random.fold_in(jax.random.key(self.run.config.seed), 30_000 + self.stage.number),
            [],
        )
        with console.progress_bar("draw answers", len(items)) as bar:
            for p in batch_slices(len(items), size):
                here = [
                    *items[p],
                    *[items[p.stop - 1]] * (size - (p.stop - p.start)),
                ]  # a full batch has the compiled shape
                out.append(
                    _first(
                        rollouts.sample_rollouts(builder, self.params, here, key, p.start),
                        p.stop - p.start,
                    )
                )
                bar.advance(p.stop - p.start)
        return out

    def answered(self, item: EncodedExample, response: str) -> EncodedConversation:
        return self.model_ctx.processor.append_response(
            item.encoded, response, limit=max(self.model_ctx.buckets)
        )

    @functools.cached_property
    def slope(self) -> Callable[[EncodedConversation], Params]:
        """The gradient of one conversation's negative log-likelihood with respect to the trained weights."""
        slopes = fisher.make_example_gradient(self.model_ctx, self.stage.config)

        def run(encoded: EncodedConversation) -> Params:
            with jax.set_mesh(self.model_ctx.mesh):
                return slopes(self.trained, self.frozen, encoded)

        return run

    def scored(
        self, encoded: Sequence[EncodedConversation], trained: Params | None = None
    ) -> list[np.ndarray]:
        """Log-probabilities of each conversation's answer tokens, by these weights."""
        params = self.params if trained is None else trainable.join_params(trained, self.frozen)
        return self._told(
            logprobs.make_scoring_program(
                self.model_ctx.cfg, self.model_ctx.dtype, self.stage.config.train.chunk, 1.0
            ),
            params,
            encoded,
        )

    def steepness(self, encoded: Sequence[EncodedConversation]) -> list[np.ndarray]:
        """For each answer token, the squared length of its log-probability's gradient with respect to the logits."""
        return self._told(
            _steepness(self.model_ctx.cfg, self.model_ctx.dtype, self.stage.config.train.chunk),
            self.params,
            encoded,
        )

    def _told(
        self,
        program: Callable[[Params, Batch], jax.Array],
        params: Params,
        encoded: Sequence[EncodedConversation],
    ) -> list[np.ndarray]:
        rows, out = -(-SCORE_BATCH // self.model_ctx.shards) * self.model_ctx.shards, []
        with jax.set_mesh(self.model_ctx.mesh):
            for p in batch_slices(len(encoded), rows):
                batch = conversation_batch(self.model_ctx, encoded[p], rows=rows)
                found, mask = (sharding.local_rows(x) for x in (program(params, batch), batch.mask))
                out += [row[keep] for row, keep in zip(found, mask.astype(bool), strict=True)][
                    : p.stop - p.start
                ]
        return out


@contextlib.contextmanager
def open_probe(
    folder: Path | str, number: int, others: str, dtype: str
) -> Iterator[tuple[Probe, list[str]]]:
    """The probe before a stage of a run, and the other tasks that are looked at: `others`, a list with commas, or all there are."""
    with visit_run(folder, dtype) as current:
        if not 1 <= number <= len(current.stages):
            raise ValueError(f"--stage={number}; the run has stages 1 to {len(current.stages)}")
        params = restore_stage_params(
            current.config, current.model_ctx, current.files.checkpoints, number - 1
        )
        which = current.stages[number - 1]
        found = Probe(
            current,
            which,
            current.model_ctx.longer(which.config.rollout.max_new_tokens + 1),
            *split_trained(current.config, params),
        )
        asked = [t for t in others.split(",") if t]
        names = stage_evaluation.select_tasks(current, asked, "--others") if asked else found.others
        if not names:
            raise ValueError(
                f"stage {number} has no stage before it and eval.general names no task: give --others=task,task"
            )
        yield found, names


def _first(graded: GradedRollouts, count: int) -> GradedRollouts:
    """The first prompts of a batch that was filled up."""
    keep = [np.arange(len(graded.items)) < count]
    return rollouts.join_groups([graded], keep, count)


@functools.lru_cache(maxsize=8)
def _steepness(cfg: Any, dtype: Any, chunk: int) -> Callable[[Params, Batch], jax.Array]:
    def run(params: Params, batch: Batch) -> jax.Array:
        params = trainable.cast_params(params, dtype)
        hidden = logprobs.predicting_states(params, batch, cfg, dtype)
        flat, unembed = hidden.reshape(-1, hidden.shape[-1]), decoder.unembedding(params["text"])
        found = logprobs.logit_gradient_norm(flat, unembed, batch.targets.reshape(-1), chunk=chunk)
        return found.reshape(batch.targets.shape)

    return jax.jit(run)
