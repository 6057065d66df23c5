"""A run's model opened to look at: its answers, their likelihood, and the gradient of each."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax import console, ewc, exams, logps, rollouts, session, settings, sharding, stage, train, workdir
from cptjax.batches import answers, pieces
from cptjax.batching import Encoded
from cptjax.classroom import prepare
from cptjax.lessons import Item
from cptjax.model import text
from cptjax.order import permutation
from cptjax.prompting import Course
from cptjax.rollouts import Graded
from cptjax.runtime import Runtime
from cptjax.session import Run
from cptjax.settings import Stage
from cptjax.types import Batch, Params

BATCH = 16  # answers that are scored at a time


@contextlib.contextmanager
def visited(folder: Path | str, dtype: str) -> Iterator[Run]:
    """The run of a workdir under its own config, its arithmetic in `dtype`; nothing of it is written."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected the --workdir of launch/train.py, or one run's folder in it")
    with session.visit(settings.merge(workdir.started(folder), {"model": {"compute_dtype": dtype}}), folder) as current:
        yield current


@dataclasses.dataclass(frozen=True)
class Probe:
    """The model that a stage starts from, and that stage's training data."""

    run: Run
    stage: Stage
    rt: Runtime  # of rows with their answers
    trained: Params
    frozen: Params

    @functools.cached_property
    def params(self) -> Params:
        return train.trainable.join(self.trained, self.frozen)

    @functools.cached_property
    def others(self) -> list[str]:
        """What the stage could harm: the tasks of earlier stages, and the general ones."""
        earlier = [t for s in self.run.stages[: self.stage.number - 1] for t in s.tasks]
        return [t for t in dict.fromkeys((*earlier, *exams.tasks_of(self.run)[1])) if t not in self.stage.tasks]

    @functools.cached_property
    def courses(self) -> dict[str, Course]:
        return {name: self.run.course(name, self.stage.config) for name in self.stage.tasks}

    def rows(self, count: int) -> list[tuple[str, int]]:
        """`count` of the stage's training rows, evenly from its tasks, chosen by the run's seed."""
        tasks = self.stage.tasks
        share = [count // len(tasks) + (k < count % len(tasks)) for k in range(len(tasks))]
        return [(name, i) for name, n in zip(tasks, share, strict=True) for i in self._chosen(len(self.source(name)), n)]

    def source(self, task: str) -> Sequence[Any]:
        return self.run.examples(task, "train", self.stage.config)

    def _chosen(self, size: int, count: int) -> list[int]:
        return permutation(size, (self.run.config.seed, self.stage.number, 30_000))[:count].tolist()

    def prompts(self, rows: Sequence[tuple[str, int]]) -> list[Item]:
        build = prepare(self.rt, self.courses, False, max(self.rt.ladder))
        return [dataclasses.replace(build(self.source(name)[i]), row=i) for name, i in rows]

    def gold(self, item: Item) -> Encoded:
        """A prompt with its gold answer."""
        return self.answered(item, self.courses[item.example.task].gold(item.example))

    def known(self, task: str, count: int) -> list[Encoded]:
        """Gold answers of another task's test rows, under the template that it is examined with."""
        c = self.run.config
        template = exams.templates_of(self.run, task)[0]
        course, examples = self.run.course(task, c, template), self.run.examples(task, "test", c, template)
        build = prepare(self.rt, {task: course}, True, max(self.rt.ladder))
        return [build(examples[i]).encoded for i in self._chosen(len(examples), count)]

    def drawn(self, items: Sequence[Item], samples: int) -> list[Graded]:
        """Answers of the model to these prompts and their rewards, as the stage would draw them; in parts."""
        config = settings.merge(self.stage.config, {"method": {"advantage": "dr_grpo"}, "rollout": {"group": samples}})
        tutor = stage.tutor(self.run.rt, self.courses, config)
        size = max(self.rt.shards, config.train.batch // self.rt.shards * self.rt.shards)
        key, out = jax.random.fold_in(jax.random.key(self.run.config.seed), 30_000 + self.stage.number), []
        with console.progress("draw answers", len(items)) as bar:
            for p in pieces(len(items), size):
                here = [*items[p], *[items[p.stop - 1]] * (size - (p.stop - p.start))]  # a full batch has the compiled shape
                out.append(_first(rollouts.roll(tutor, self.params, here, key, p.start), p.stop - p.start))
                bar.advance(p.stop - p.start)
        return out

    def answered(self, item: Item, response: str) -> Encoded:
        return self.rt.processor.answered(item.encoded, response, limit=max(self.rt.ladder))

    @functools.cached_property
    def slope(self) -> Callable[[Encoded], Params]:
        """The gradient of one conversation's negative log-likelihood with respect to the trained weights."""
        slopes = ewc.slopes(self.rt, self.stage.config)

        def run(encoded: Encoded) -> Params:
            with jax.set_mesh(self.rt.mesh):
                return slopes(self.trained, self.frozen, encoded)

        return run

    def scored(self, encoded: Sequence[Encoded], trained: Params | None = None) -> list[np.ndarray]:
        """Log-probabilities of each conversation's answer tokens, by these weights."""
        params = self.params if trained is None else train.trainable.join(trained, self.frozen)
        return self._told(stage.scorer(self.rt.cfg, self.rt.dtype, self.stage.config.train.chunk, 1.0), params, encoded)

    def steepness(self, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        """For each answer token, the squared length of its log-probability's gradient with respect to the logits."""
        return self._told(_steepness(self.rt.cfg, self.rt.dtype, self.stage.config.train.chunk), self.params, encoded)

    def _told(self, program: Callable[[Params, Batch], jax.Array], params: Params, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        rows, out = -(-BATCH // self.rt.shards) * self.rt.shards, []
        with jax.set_mesh(self.rt.mesh):
            for p in pieces(len(encoded), rows):
                batch = answers(self.rt, encoded[p], rows=rows)
                found, mask = (sharding.local_rows(x) for x in (program(params, batch), batch.mask))
                out += [row[keep] for row, keep in zip(found, mask.astype(bool), strict=True)][: p.stop - p.start]
        return out


@contextlib.contextmanager
def opened(folder: Path | str, number: int, others: str, dtype: str) -> Iterator[tuple[Probe, list[str]]]:
    """The probe before a stage of a run, and the other tasks that are looked at: `others`, a list with commas, or all there are."""
    with visited(folder, dtype) as current:
        if not 1 <= number <= len(current.stages):
            raise ValueError(f"--stage={number}; the run has stages 1 to {len(current.stages)}")
        current.params = current.at_stage(number - 1)
        which = current.stages[number - 1]
        found = Probe(current, which, current.rt.longer(which.config.rollout.max_new_tokens + 1), *current.split())
        asked = [t for t in others.split(",") if t]
        names = exams.named(current, asked, "--others") if asked else found.others
        if not names:
            raise ValueError(f"stage {number} has no stage before it and eval.general names no task: give --others=task,task")
        yield found, names


def _first(graded: Graded, count: int) -> Graded:
    """The first prompts of a batch that was filled up."""
    keep = [np.arange(len(graded.items)) < count]
    return rollouts.joined([graded], keep, count)


@functools.lru_cache(maxsize=8)
def _steepness(cfg: Any, dtype: Any, chunk: int) -> Callable[[Params, Batch], jax.Array]:
    def run(params: Params, batch: Batch) -> jax.Array:
        params = train.cast(params, dtype)
        hidden = train.predicting_states(params, batch, cfg, dtype)
        flat, unembed = hidden.reshape(-1, hidden.shape[-1]), text.unembedding(params["text"])
        found = logps.steepness(flat, unembed, batch.targets.reshape(-1), chunk=chunk)
        return found.reshape(batch.targets.shape)

    return jax.jit(run)
