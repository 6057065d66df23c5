"""What a stage's settings may be: everything that can be refused before anything is loaded, in one line each."""

from typing import Any

from cptjax import advantages, corpus, filters, logps, losses, optim, penalties, settings, teaching
from cptjax.model import remat, trainable

SOURCES = ("gold", "rollouts", "self", "corpus")


def check(stage: settings.Stage) -> None:
    """Refuse a stage whose settings have no meaning, or of which one would be ignored."""
    model, m, t, r = stage.config.model, stage.config.method, stage.config.train, stage.config.rollout
    remat.check(model.remat)
    trainable.check(model.freeze, model.lora.rank, model.lora.vision)
    _source(m)
    losses.check(
        objective=m.objective, ratio=m.ratio, clip_low=m.clip_low, clip_high=m.clip_high, clip_dual=m.clip_dual, normalise=m.normalise,
        kl_coef=m.kl_coef, kl_estimator=m.kl_estimator, kl_place=m.kl_place, tis_cap=m.tis_cap, entropy_coef=m.entropy_coef,
        skip_tokens=m.distill.skip_tokens,
    )  # fmt: skip
    logps.check(chunk=t.chunk, direction=m.distill.direction, top_k=m.distill.top_k)
    penalties.check(m.penalty.name, m.penalty.coef, m.penalty.samples, m.average)
    optim.check(
        optimizer=t.optimizer, lr=t.lr, schedule=t.schedule, warmup=t.warmup, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay,
        clip=t.clip, moments_dtype=t.moments_dtype,
    )  # fmt: skip
    if m.kl_limit is not None and m.kl_limit <= 0:
        raise ValueError(f"method.kl_limit={m.kl_limit}: expected a number of nats above 0, or None for no limit")
    if m.objective == "policy":
        advantages.check(m.advantage, r.group, truncated=m.truncated, overlong=m.overlong, max_new_tokens=r.max_new_tokens)
    _ignored(m, stage.config.data)
    _drawn(m, r)
    _cut(m, t)


def _source(m: Any) -> None:
    if m.source not in SOURCES:
        raise ValueError(f"method.source={m.source!r}: choose one of {', '.join(SOURCES)}")
    if (m.objective in ("policy", "distill")) != (m.source == "rollouts"):
        raise ValueError(f"method.objective={m.objective!r} does not learn from source={m.source!r}: policy and distill need rollouts")
    if m.source == "corpus" and not m.corpus:
        raise ValueError("method.source='corpus' needs method.corpus, the rollouts/*.jsonl of another run")
    if m.corpus_answer not in corpus.ANSWERS:
        raise ValueError(f"method.corpus_answer={m.corpus_answer!r}: choose one of {', '.join(corpus.ANSWERS)}")
    if m.refresh not in ("never", "epoch") and not (str(m.refresh).isdigit() and int(m.refresh)):
        raise ValueError(f"method.refresh={m.refresh!r}: expected never, epoch or a number of steps")
    if m.replay.fraction and m.source == "corpus":
        raise ValueError("method.replay does not mix with source='corpus': put the earlier stages' answers into the file")
    kind = "gold" if m.source == "gold" else "prompts"
    if m.replay.fraction and m.replay.kind != kind:
        raise ValueError(f"method.replay.kind={m.replay.kind!r} with source={m.source!r}: expected {kind!r}")


def _ignored(m: Any, data: Any) -> None:
    """Settings that the objective would not look at."""
    if m.objective != "policy" and m.entropy_coef:
        raise ValueError(f"method.entropy_coef={m.entropy_coef} belongs to objective='policy', not {m.objective!r}")
    if m.objective != "policy" and m.kl_coef and m.kl_place == "reward":
        raise ValueError(f"method.kl_place='reward' needs a reward; objective={m.objective!r} has none: use 'loss'")
    if m.objective == "distill" and m.kl_coef:
        raise ValueError(f"method.kl_coef={m.kl_coef} with objective='distill', which is itself a divergence: set it to 0")
    if m.objective == "distill" and m.penalty.name == "lwf":
        raise ValueError("method.penalty.name='lwf' and objective='distill' both need the teacher's place; choose one")
    if data.pack and m.objective not in ("sft", "eaft"):
        raise ValueError(f"data.pack=True with objective={m.objective!r}: only conversations with given answers are packed")
    d = m.distill
    if d.teacher not in teaching.TEACHERS or not 0 < d.ema <= 1:
        known = ", ".join(teaching.TEACHERS)
        raise ValueError(f"method.distill teacher={d.teacher!r}, ema={d.ema}: expected one of {known} and 0 < ema <= 1")


def _drawn(m: Any, r: Any) -> None:
    """Answers that are drawn for learning, and filters on them."""
    if m.source in ("rollouts", "self") and r.temperature <= 0:
        raise ValueError(f"rollout.temperature={r.temperature}: learning from own answers needs a temperature above 0")
    if m.source == "self" and m.self_samples < 1:
        raise ValueError(f"method.self_samples={m.self_samples}: expected at least 1 answer per prompt")
    if m.filter:
        known = {"name", "samples", "lo", "hi"}
        if not {"name", "samples"} <= set(m.filter) <= known:
            raise ValueError(f"method.filter={dict(m.filter)}: expected name and samples, and lo and hi where the name does not set them")
        filters.check(m.filter["name"], m.filter["samples"], m.filter.get("lo", 1), m.filter.get("hi", m.filter["samples"]))
    if m.online_filter:
        if set(m.online_filter) != {"lo", "hi", "max_refills"}:
            raise ValueError(f"method.online_filter={dict(m.online_filter)}: expected lo, hi and max_refills")
        filters.check_online(m.online_filter["lo"], m.online_filter["hi"], m.online_filter["max_refills"])
        if m.source != "rollouts":
            raise ValueError(f"method.online_filter looks at rollouts; source={m.source!r} has none")


def _cut(m: Any, t: Any) -> None:
    """How a batch falls into updates and device passes."""
    if m.updates_per_batch < 1 or m.passes < 1 or t.batch < 1 or t.batch % max(m.updates_per_batch, 1):
        given = f"method.updates_per_batch={m.updates_per_batch}, passes={m.passes}"
        raise ValueError(f"{given}: both >= 1, the first dividing train.batch={t.batch}")
    if m.source != "rollouts" and m.updates_per_batch * m.passes > 1:
        raise ValueError(f"method.updates_per_batch and passes reuse rollouts; with source={m.source!r} leave both at 1")
    rows = t.batch // m.updates_per_batch
    if t.micro_batch and (t.micro_batch < 0 or rows % t.micro_batch):
        raise ValueError(f"train.micro_batch={t.micro_batch} must divide the {rows} rows of an update")
