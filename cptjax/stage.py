"""One stage: its data, its programs, and the one training loop."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import advantages, console, filters, lessons, losses, metrics, multihost, optim, penalties, settings, train
from cptjax.batches import pieces
from cptjax.data import Stream
from cptjax.lessons import Item, Lesson, Tutor
from cptjax.model import text
from cptjax.objectives import Objective, token_logps
from cptjax.order import Order
from cptjax.prompting import Course
from cptjax.runtime import DTYPES, Runtime, Sampling
from cptjax.teaching import Teacher
from cptjax.types import Batch, Example, Params, TrainState

SOURCES = ("gold", "rollouts", "self", "corpus")


def check(stage: settings.Stage) -> None:
    """Everything about a stage's settings that can be refused before anything is loaded."""
    m, t, r = stage.config.method, stage.config.train, stage.config.rollout
    if m.source not in SOURCES:
        raise ValueError(f"method.source={m.source!r}: choose one of {', '.join(SOURCES)}")
    losses.check(
        objective=m.objective, ratio=m.ratio, clip_low=m.clip_low, clip_high=m.clip_high, clip_dual=m.clip_dual, normalise=m.normalise,
        kl_coef=m.kl_coef, kl_estimator=m.kl_estimator, kl_place=m.kl_place, tis_cap=m.tis_cap, entropy_coef=m.entropy_coef,
        skip_tokens=m.distill.skip_tokens,
    )  # fmt: skip
    penalties.check(m.penalty.name, m.penalty.coef, max(m.penalty.samples, 1), m.average)
    optim.check(
        optimizer=t.optimizer, lr=t.lr, schedule=t.schedule, warmup=t.warmup, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay,
        clip=t.clip, moments_dtype=t.moments_dtype,
    )  # fmt: skip
    if (m.objective in ("policy", "distill")) != (m.source == "rollouts"):
        raise ValueError(f"method.objective={m.objective!r} does not learn from source={m.source!r}; policy and distill learn from rollouts")
    if m.objective == "policy":
        advantages.check(m.advantage, r.group, truncated=m.truncated, overlong=m.overlong, max_new_tokens=r.max_new_tokens)
    if m.filter:
        filters.check(m.filter["name"], m.filter["samples"], m.filter.get("lo", 1), m.filter.get("hi", m.filter["samples"]))
    if m.online_filter:
        filters.check_online(m.online_filter["lo"], m.online_filter["hi"], m.online_filter["max_refills"])
    if m.updates_per_batch < 1 or m.passes < 1 or t.batch % m.updates_per_batch:
        raise ValueError(f"method.updates_per_batch={m.updates_per_batch}, passes={m.passes}: both >= 1, the first dividing train.batch={t.batch}")
    if m.source == "corpus" and not m.corpus:
        raise ValueError("method.source='corpus' needs method.corpus, the rollouts/*.jsonl of another run")
    if m.refresh not in ("never", "epoch") and not str(m.refresh).isdigit():
        raise ValueError(f"method.refresh={m.refresh!r}: expected never, epoch or a number of steps")
    kinds = {"gold": "prompts" if m.source == "rollouts" else "gold"}
    if m.replay.fraction and m.replay.kind != kinds["gold"]:
        raise ValueError(f"method.replay.kind={m.replay.kind!r} with source={m.source!r}: expected {kinds['gold']!r}")


def objective(config: Any) -> Objective:
    """The loss of a stage."""
    m, d = config.method, config.method.distill
    policy = m.objective == "policy"
    return Objective(
        kind=m.objective, chunk=config.train.chunk, ratio=m.ratio, clip_low=m.clip_low, clip_high=m.clip_high, clip_dual=m.clip_dual,
        normalise=m.normalise, fixed_length=config.rollout.max_new_tokens, kl_coef=m.kl_coef if m.kl_place == "loss" else 0.0,
        kl_estimator=m.kl_estimator, tis_cap=m.tis_cap, entropy_coef=m.entropy_coef,
        temperature=config.rollout.temperature if policy else 1.0, direction=d.direction, top_k=d.top_k, skip_tokens=d.skip_tokens,
        lwf=m.penalty.coef if m.penalty.name == "lwf" else 0.0,
    )  # fmt: skip


def sampling(config: Any) -> Sampling:
    r = config.rollout
    return Sampling(r.group, r.temperature, r.top_p, r.top_k, r.min_p, r.max_new_tokens, r.slots, r.check_every, r.gather, r.dtype == "int8")


def optimizer(config: Any, declared: Params) -> optim.Optimizer:
    t = config.train
    return optim.make(
        optimizer=t.optimizer, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay, clip=t.clip, moments_dtype=t.moments_dtype,
        declared=declared,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def scorer(cfg: Any, dtype: Any, chunk: int, temperature: float) -> Callable[[Params, Batch], jax.Array]:
    """A program for the log-probabilities [B A] of a batch's targets."""

    def run(params: Params, batch: Batch) -> jax.Array:
        params = train.cast(params, dtype)
        hidden = train.predicting_states(params, batch, cfg, dtype)
        return token_logps(hidden, text.unembedding(params["text"]), batch, chunk, temperature)

    return jax.jit(run)


def tutor(rt: Runtime, courses: dict[str, Course], config: Any) -> Tutor:
    temperature = config.rollout.temperature if config.method.objective == "policy" else 1.0
    logps = scorer(rt.cfg, rt.dtype, config.train.chunk, temperature)
    pack = config.data.pack and config.method.objective in ("sft", "eaft")
    return Tutor(rt, courses, sampling(config), config.method, config.train.batch, config.train.micro_batch, pack, logps)


def prepare(rt: Runtime, courses: dict[str, Course], answered: bool, limit: int) -> Callable[[Example], Item]:
    """What turns a training example into a row: its prompt, or its prompt and gold answer; safe to send to worker processes."""
    forms = {name: dataclasses.replace(course, pool=None) for name, course in courses.items()}
    processor = rt.processor

    def run(example: Example) -> Item:
        form = forms[example.task]
        messages = form.messages(example)
        if answered:
            messages = [*messages, {"role": "assistant", "content": form.gold(example)}]
        return Item(example, processor.encode(messages, limit=limit))

    return run


@dataclasses.dataclass
class Progress:
    """How far a stage has come: what a checkpoint stores beside the arrays."""

    step: int = 0  # steps taken
    drawn: int = 0  # batches taken from the stream (an online filter takes several a step)
    updates: int = 0  # optimiser updates


@dataclasses.dataclass
class Classroom:
    """A stage ready to run."""

    stage: settings.Stage
    tutor: Tutor
    order: Order
    sources: list[Sequence[Example]]
    steps: int
    seed: int
    workdir: Path
    reference: Params | None  # of the KL term
    teacher: Teacher | None

    @property
    def config(self) -> Any:
        return self.stage.config

    def key(self, step: int) -> jax.Array:
        """Randomness is a function of (seed, stage, step)."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), self.stage.number), step)

    def stream(self, drawn: int) -> Stream:
        d, rt = self.config.data, self.tutor.rt
        answered = self.config.method.source == "gold"
        shard = (jax.process_index(), jax.process_count())
        build = prepare(rt, self.tutor.courses, answered, max(rt.ladder))
        more = dict(shard=shard, step=drawn, workers=d.workers, prefetch=d.prefetch)
        return Stream(self.order, self.sources, build, collate=lessons.unwrap, **more)


def lesson(room: Classroom, params: Params, stream: Stream | None, progress: Progress) -> Lesson:
    """What the next step learns from; takes its batches from the stream."""
    t, step = room.tutor, progress.step
    if room.config.method.source != "rollouts":
        items = next(stream) if stream is not None else own_items(room, params, step)
        progress.drawn += 1
        found = lessons.gold(t, items)
    else:
        first = step * t.batch
        if room.config.method.online_filter:
            graded, info, turns = lessons.filtered(t, params, stream, room.key(step), first)
        else:
            graded, info, turns = lessons.roll(t, params, next(stream), room.key(step), first), {}, 1
        progress.drawn += turns
        with_teacher = room.teacher.attach if room.teacher and room.config.method.objective == "distill" else None
        found = lessons.rollouts(t, params, graded, room.reference, step, room.stage.number, with_teacher)
        found.info |= info
    if room.teacher is not None and room.config.method.objective != "distill":
        found.updates = ([room.teacher.previous(b) for b in update] for update in found.updates)
    elif room.reference is not None and room.config.method.source != "rollouts":
        found.updates = ([_referenced(t, room.reference, b) for b in update] for update in found.updates)
    return found


def _referenced(t: Tutor, reference: Params, batch: Batch) -> Batch:
    return batch.replace(extra=batch.extra | {"ref_logps": t.logps(reference, batch)})


def own_items(room: Classroom, params: Params, step: int) -> list[Item]:
    """Rows of a window's corpus for this step, in an order of the seed; the corpus is drawn when its window begins."""
    m, t = room.config.method, room.tutor
    window = {"never": room.steps, "epoch": room.order.steps(1)}.get(m.refresh) or int(m.refresh)
    start = step // window * window if m.source == "self" else 0
    pairs = _corpus_of(room, params, start, min(window, room.steps - start))
    at = np.arange((step - start) * t.batch, (step - start + 1) * t.batch)
    laps, places = np.divmod(at, len(pairs))
    order = {lap: np.random.default_rng([room.seed, room.stage.number, start, lap]).permutation(len(pairs)) for lap in set(laps.tolist())}
    pick = [pairs[order[lap][p]] for lap, p in zip(laps.tolist(), places.tolist(), strict=True)]
    mine = pick[pieces(len(pick), t.batch // jax.process_count())[jax.process_index()]]
    return [_answered(room, source, row, response) for source, row, response in mine]


def _answered(room: Classroom, source: int, row: int, response: str) -> Item:
    example = room.sources[source][row]
    messages = [*room.tutor.courses[example.task].messages(example), {"role": "assistant", "content": response}]
    return Item(example, room.tutor.rt.processor.encode(messages), row)


@functools.lru_cache(maxsize=2)
def _read_corpus(path: Path) -> list[tuple[int, int, str]]:
    return [(r["source"], r["row"], r["response"]) for r in metrics.read_lines(path)]


def _corpus_of(room: Classroom, params: Params, start: int, steps: int) -> list[tuple[int, int, str]]:
    """(source, row, response) of a window; written once, so that a resumed run reads what it wrote before."""
    path = room.workdir / "corpus" / f"stage{room.stage.number}_step{start}.jsonl"
    if not multihost.gather(path.exists())[0]:
        draw = _foreign if room.config.method.source == "corpus" else _own
        pairs = draw(room, params, start, steps)
        if multihost.first():
            lines = [{"source": s, "row": r, "response": text} for s, r, text in pairs]
            metrics.write_text(path, "".join(metrics.json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        multihost.gather(True)  # nobody reads before it is written
    return _read_corpus(path)


def _own(room: Classroom, params: Params, start: int, steps: int) -> list[tuple[int, int, str]]:
    t, count = room.tutor, jax.process_count()
    places = dict.fromkeys((p.source, p.index) for step in range(start, start + steps) for p in room.order.rows(step))
    mine = list(places)[jax.process_index() :: count]
    mine += mine[-1:] * (-(-len(places) // count) - len(mine))
    build = prepare(t.rt, t.courses, False, max(t.rt.ladder))
    with console.progress(f"own answers, stage {room.stage.number}", total=len(mine)) as bar:
        items = [build(room.sources[s][i]) for s, i in mine]
        right = lessons.own_answers(t, params, items, room.config.method.self_samples, room.key(start), bar)
    pairs = sorted({(*mine[i], text) for part in multihost.gather([(i, x) for i, x in right]) for i, x in part})
    if not pairs:
        raise ValueError(f"none of the policy's own answers to {len(places)} prompts is correct; there is nothing to learn from")
    console.say(f"stage {room.stage.number}: {len(pairs)} correct own answers to {len(places)} prompts")
    return pairs


def _foreign(room: Classroom, params: Params, start: int, steps: int) -> list[tuple[int, int, str]]:
    path = Path(room.config.method.corpus)
    if not path.is_file():
        raise ValueError(f"method.corpus={str(path)!r} does not exist; expected the rollouts/*.jsonl of another run")
    found = lessons.corpus(metrics.read_lines(path), str(path))
    with console.progress("match the corpus to its rows", total=sum(map(len, room.sources))) as bar:
        ids = {}
        for s, source in enumerate(room.sources):
            for row in range(len(source)):
                ids[source[row].id] = (s, row)
                bar.advance()
    lost = [i for i, _ in found if i not in ids]
    if lost:
        raise ValueError(f"method.corpus={str(path)!r}: {len(lost)} of its ids are not in the stage's data, the first {lost[0]!r}")
    return [(*ids[i], response) for i, response in found]


def teach(
    room: Classroom, state: TrainState, frozen: Params, steps: train.Steps, progress: Progress, extra: Any, on_step: Callable[..., bool]
) -> TrainState:  # fmt: skip
    """The one training loop; `on_step` logs, saves, and says whether to go on."""
    t, c = room.config.train, room.config
    total = room.steps * c.method.updates_per_batch * c.method.passes
    stream = None if c.method.source in ("self", "corpus") else room.stream(progress.drawn)
    try:
        while progress.step < room.steps:
            began = time.perf_counter()
            params = train.trainable.join(state.params, frozen)
            found = lesson(room, params, stream, progress)
            learning = time.perf_counter()
            told: list[dict] = []
            for update in found.updates:
                lr = optim.learning_rate(progress.updates, lr=t.lr, steps=total, schedule=t.schedule, warmup=t.warmup)
                state, numbers = steps.run(state, frozen, update, lr, extra)
                told.append(numbers)
                progress.updates += 1
            if room.teacher is not None:
                room.teacher.follow(state.params)
            progress.step += 1
            numbers = [lessons.spread(n) for n in jax.device_get(told)]
            guard(state, c.train.max_skipped)
            seconds = {"seconds/lesson": learning - began, "seconds/update": time.perf_counter() - learning}
            seconds |= {"seconds/data": stream.waited if stream else 0.0}
            info = found.info | {k: float(np.mean([n[k] for n in numbers])) for k in numbers[0]} | seconds
            info |= {"seconds": time.perf_counter() - began, "tokens": found.tokens, "rollouts": found.rollouts}
            if not on_step(state, progress, info, found.rows):
                break
    finally:
        if stream is not None:
            stream.close()
    return state


def guard(state: TrainState, most: int) -> None:
    """Stop when the updates were not finite too often in a row."""
    skipped = int(state.skipped)
    if skipped >= most:
        raise ValueError(
            f"{skipped} steps in a row had a gradient or loss that is not finite (train.max_skipped={most}); nothing was learned from "
            "them. Lower train.lr, set train.clip, keep a KL term, or look at the last rows of rollouts/"
        )


def start_state(rt: Runtime, opt: optim.Optimizer, trained: Params) -> TrainState:
    """A fresh state; the trained leaves are copied, since the loop donates its state."""
    return train.init_state(opt, jax.tree.map(jnp.copy, trained), rt.mesh)


def frozen_copy(params: Params, dtype: str) -> Params:
    """Parameters to compare with, in the type of the arithmetic; they outlive the state that they were copied from."""
    return jax.tree.map(lambda x: jnp.array(x, DTYPES[dtype], copy=True), params)

