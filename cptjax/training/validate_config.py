"""What a stage's settings may be: everything that can be refused before anything is loaded, in one line each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.config import Stage
from cptjax.generation.sampling_config import rollout_sampling
from cptjax.models import layers, lora
from cptjax.training import corpus
from cptjax.training.algorithms import advantages, distillation, prompt_filters, regularizers
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.optimizers import OptimizerConfig, ScheduleConfig

METHOD_SOURCES = ("gold", "rollouts", "self", "corpus")


def validate_stage(stage: Stage) -> None:
    """Refuse a stage whose settings have no meaning, or of which one would be ignored."""
    model, m, t, r = (
        stage.config.model,
        stage.config.method,
        stage.config.train,
        stage.config.rollout,
    )
    layers.check_remat(model.remat)
    lora.check_lora(model.freeze, model.lora.rank, model.lora.vision)
    _check_source(m)
    LossConfig.from_config(stage.config).validate()
    OptimizerConfig.from_config(t).validate()
    ScheduleConfig.from_config(t).validate()
    regularizers.check_penalty(m.penalty.name, m.penalty.coef, m.penalty.samples, m.average)
    if m.kl_reference not in ("base", "stage") and not Path(m.kl_reference).is_dir():
        raise ValueError(
            f"method.kl_reference={m.kl_reference!r}: expected base, stage or an existing folder with a model"
        )
    if m.objective == "policy":
        advantages.check_advantage(
            m.advantage,
            r.group,
            truncated=m.truncated,
            overlong=m.overlong,
            max_new_tokens=r.max_new_tokens,
        )
    _check_ignored_settings(m, stage.config.data)
    rollout_sampling(stage.config)  # refuses settings that are out of range
    _check_own_samples(m, r)
    _check_batch_split(m, t)


def _check_source(m: Any) -> None:
    if m.source not in METHOD_SOURCES:
        raise ValueError(f"method.source={m.source!r}: choose one of {', '.join(METHOD_SOURCES)}")
    if (m.objective in ("policy", "distill")) != (m.source == "rollouts"):
        raise ValueError(
            f"method.objective={m.objective!r} does not learn from source={m.source!r}: policy and distill need rollouts"
        )
    if m.source == "corpus" and not m.corpus:
        raise ValueError(
            "method.source='corpus' needs method.corpus, the rollouts/*.jsonl of another run"
        )
    if m.corpus_answer not in corpus.CORPUS_ANSWERS:
        raise ValueError(
            f"method.corpus_answer={m.corpus_answer!r}: choose one of {', '.join(corpus.CORPUS_ANSWERS)}"
        )
    if m.source != "corpus" and (m.corpus or m.corpus_answer != "own"):
        given = f"method.corpus={m.corpus!r}, corpus_answer={m.corpus_answer!r}"
        raise ValueError(
            f"{given} belong to source='corpus'; with source={m.source!r} leave them at '' and 'own'"
        )
    if m.refresh not in ("never", "epoch") and not (str(m.refresh).isdigit() and int(m.refresh)):
        raise ValueError(
            f"method.refresh={m.refresh!r}: expected never, epoch or a number of steps"
        )
    if not 0 <= m.replay.fraction < 1:
        raise ValueError(
            f"method.replay.fraction={m.replay.fraction}: expected the share of rows from earlier stages, 0 <= fraction < 1"
        )
    if m.replay.fraction and m.source == "corpus":
        raise ValueError(
            "method.replay does not mix with source='corpus': put the earlier stages' answers into the file"
        )
    kind = "gold" if m.source == "gold" else "prompts"
    if m.replay.fraction and m.replay.kind != kind:
        raise ValueError(
            f"method.replay.kind={m.replay.kind!r} with source={m.source!r}: expected {kind!r}"
        )


def _check_ignored_settings(m: Any, data: Any) -> None:
    """Settings that the objective would not look at."""
    if m.objective != "policy" and m.entropy_coef:
        raise ValueError(
            f"method.entropy_coef={m.entropy_coef} belongs to objective='policy', not {m.objective!r}"
        )
    if m.objective != "policy" and m.tis_cap is not None:
        raise ValueError(
            f"method.tis_cap={m.tis_cap} belongs to objective='policy', not {m.objective!r}: leave it None"
        )
    if m.advantage == "reinforce01" and m.kl_coef and m.kl_place == "reward":
        raise ValueError(
            "method.advantage='reinforce01' looks at the accuracy, where no KL can stand: set method.kl_place='loss'"
        )
    if m.objective != "policy" and m.kl_coef and m.kl_place == "reward":
        raise ValueError(
            f"method.kl_place='reward' needs a reward; objective={m.objective!r} has none: use 'loss'"
        )
    if m.objective == "distill" and m.kl_coef:
        raise ValueError(
            f"method.kl_coef={m.kl_coef} with objective='distill', which is itself a divergence: set it to 0"
        )
    if m.objective == "distill" and m.penalty.name == "lwf":
        raise ValueError(
            "method.penalty.name='lwf' and objective='distill' both need the teacher's place; choose one"
        )
    if data.pack and m.objective not in ("sft", "eaft"):
        raise ValueError(
            f"data.pack=True with objective={m.objective!r}: only conversations with given answers are packed"
        )
    d = m.distill
    if d.teacher not in distillation.TEACHERS or not 0 < d.ema <= 1:
        known = ", ".join(distillation.TEACHERS)
        raise ValueError(
            f"method.distill teacher={d.teacher!r}, ema={d.ema}: expected one of {known} and 0 < ema <= 1"
        )


def _check_own_samples(m: Any, r: Any) -> None:
    """Answers that are drawn for learning, and filters on them."""
    if m.source in ("rollouts", "self") and r.temperature <= 0:
        raise ValueError(
            f"rollout.temperature={r.temperature}: learning from own answers needs a temperature above 0"
        )
    if m.source == "self" and m.self_samples < 1:
        raise ValueError(
            f"method.self_samples={m.self_samples}: expected at least 1 answer per prompt"
        )
    if m.filter is not None:
        prompt_filters.check_prompt_filter(
            **_check_keys_of("filter", m.filter, {"name"}, {"samples", "lo", "hi", "like"})
        )
    if m.online_filter is not None:
        prompt_filters.check_online_filter(
            **_check_keys_of("online_filter", m.online_filter, {"lo", "hi", "max_refills"})
        )
        if m.source != "rollouts":
            raise ValueError(
                f"method.online_filter looks at rollouts; source={m.source!r} has none"
            )


def _check_keys_of(
    name: str, given: Any, needed: set[str], more: set[str] = frozenset()
) -> dict[str, Any]:
    """A small dict of settings with the keys that it must and may have."""
    found = dict(given) if isinstance(given, Mapping | ConfigDict) else given
    if found is given or not needed <= set(found) <= needed | more:
        may = f", and maybe {', '.join(sorted(more))}" if more else ""
        raise ValueError(
            f"method.{name}={found!r}: expected None or a dict with {', '.join(sorted(needed))}{may}"
        )
    return found


def _check_batch_split(m: Any, t: Any) -> None:
    """How a batch falls into updates and device passes."""
    if (
        m.updates_per_batch < 1
        or m.passes < 1
        or t.batch < 1
        or t.batch % max(m.updates_per_batch, 1)
    ):
        given = f"method.updates_per_batch={m.updates_per_batch}, passes={m.passes}"
        raise ValueError(f"{given}: both >= 1, the first dividing train.batch={t.batch}")
    if m.source != "rollouts" and m.updates_per_batch * m.passes > 1:
        raise ValueError(
            f"method.updates_per_batch and passes reuse rollouts; with source={m.source!r} leave both at 1"
        )
    several = m.updates_per_batch * m.passes
    if m.objective == "policy" and several > 1 and m.ratio == "none" and m.tis_cap is None:
        raise ValueError(
            f"method.ratio='none' with {several} updates on one batch: from the second on its answers are another policy's; "
            "choose ratio token, sequence or cispo, or weigh them with method.tis_cap=2.0"
        )
    rows = t.batch // m.updates_per_batch
    if t.micro_batch and (t.micro_batch < 0 or rows % t.micro_batch):
        raise ValueError(
            f"train.micro_batch={t.micro_batch} must divide the {rows} rows of an update"
        )
