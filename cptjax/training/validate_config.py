"""Refuse settings of a stage that make no sense, before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.common import files
from cptjax.config import Stage, evaluated_tasks
from cptjax.data.data_config import DataConfig
from cptjax.generation.sampling_config import eval_sampling, rollout_sampling
from cptjax.models import attention, layers, load, lora
from cptjax.tasks import prompt_templates, registry, rewards
from cptjax.training import corpus
from cptjax.training.algorithms import advantages, distillation, prompt_filters
from cptjax.training.algorithms.continual_learning.table import check_methods
from cptjax.training.algorithms.losses import TOKEN_OBJECTIVES, LossConfig
from cptjax.training.algorithms.optimizers import OptimizerConfig, ScheduleConfig

METHOD_SOURCES = ("gold", "rollouts", "self", "corpus", "gold+corpus")
FILTER_KEYS = {"samples", "lo", "hi", *prompt_filters.FILTER_OPTIONS}
EPOCH_UNITS = ("prompts", "responses")


def validate_stage(stage: Stage) -> None:
    """Refuse a stage with a setting that makes no sense or would be ignored.

    The settings of one part are checked in its own module; rules between several parts are in this
    file.
    """
    config = stage.config
    model, m, t, r = config.model, config.method, config.train, config.rollout
    layers.check_remat(model.remat)
    attention.check_backend_name(model.attention)
    for name in ("param_dtype", "compute_dtype"):
        if model[name] not in load.MODEL_DTYPES:
            known = " or ".join(load.MODEL_DTYPES)
            raise ValueError(f"model.{name}={model[name]!r}: expected {known}")
    if not model.path:
        load.find_preset(model.preset)
    lora.check_targets(model.lora.targets)
    lora.check_lora(model.freeze, model.lora.rank, model.lora.vision)
    _check_source(m)
    LossConfig.from_config(config).validate()
    OptimizerConfig.from_config(t).validate()
    ScheduleConfig.from_config(t).validate()
    check_methods(config)
    if m.kl_reference not in ("base", "stage") and not _is_model(m.kl_reference):
        raise ValueError(
            f"method.kl_reference={m.kl_reference!r}: "
            "expected base, stage or an existing folder with a model"
        )
    advantages.check_names(m.advantage, m.truncated)
    if m.objective == "policy":
        advantages.check_advantage(
            m.advantage,
            r.group,
            truncated=m.truncated,
            overlong=m.overlong,
            max_new_tokens=r.max_new_tokens,
        )
    _check_ignored_settings(m, config.data)
    rollout_sampling(config)  # this and the next two refuse settings that are out of range
    eval_sampling(config)
    DataConfig.from_config(config.data)
    for setting, folders in (
        ("root", (config.data.root,)),
        ("outside_images", config.data.outside_images),
    ):
        if missing := [folder for folder in folders if folder and not Path(folder).is_dir()]:
            raise ValueError(f"data.{setting}={missing[0]!r}: no such folder")
    rewards.check_weights(**{k: config.rewards[k] for k in ("accuracy", "format", "on_error")})
    for template in (config.data.template, *config.eval.templates):
        prompt_templates.load_template(template)
    _check_own_samples(m, r)
    _check_batch_split(m, t)
    _check_ahead(m, r)


def validate_tasks(config: ConfigDict, stages: Sequence[Stage]) -> None:
    """Refuse a task of `config.tasks` that makes no sense, and names of tasks that do not exist."""
    own = config.tasks.to_dict()
    trained = [task for stage in stages for task in stage.tasks]
    outside = tuple(config.data.outside_images)
    for name in dict.fromkeys((*own, *trained, *evaluated_tasks(config, stages))):
        with files.explain_errors(f"tasks.{name}"):
            registry.resolve_task(name, own, None, outside)
    for name in config.eval.general:
        registry.resolve_task(name, own, None, outside)
    if both := [name for name in config.eval.general if name in trained]:
        raise ValueError(
            f"config.eval.general names {both[0]!r}, which a stage trains; remove it there"
        )


def _is_model(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()


def _check_source(m: ConfigDict) -> None:
    """Check the source of the responses."""
    if m.source not in METHOD_SOURCES:
        raise ValueError(f"method.source={m.source!r}: choose one of {', '.join(METHOD_SOURCES)}")
    if (m.objective in ("policy", "distill")) != (m.source == "rollouts"):
        raise ValueError(
            f"method.objective={m.objective!r} does not train on source={m.source!r}: "
            "policy and distill need rollouts, the others do not use them"
        )
    has_corpus = m.source in corpus.CORPUS_SOURCES
    if has_corpus and not m.corpus:
        raise ValueError(
            f"method.source={m.source!r} needs method.corpus, the rollouts/*.jsonl of another run "
            "or a file of launch/generate.py"
        )
    if m.corpus_answer not in corpus.CORPUS_ANSWERS:
        raise ValueError(
            f"method.corpus_answer={m.corpus_answer!r}: choose one of "
            f"{', '.join(corpus.CORPUS_ANSWERS)}"
        )
    if not has_corpus and (m.corpus or m.corpus_answer != "own"):
        given = f"method.corpus={m.corpus!r}, corpus_answer={m.corpus_answer!r}"
        raise ValueError(
            f"{given} belong to source='corpus'; "
            f"with source={m.source!r} leave them at '' and 'own'"
        )
    if m.corpus_template and m.source != "gold+corpus":
        raise ValueError(
            f"method.corpus_template={m.corpus_template!r} belongs to source='gold+corpus'; "
            f"with source={m.source!r} leave it '' and set data.template"
        )
    _check_epoch_unit(m)
    if m.refresh not in ("never", "epoch") and not (str(m.refresh).isdecimal() and int(m.refresh)):
        raise ValueError(
            f"method.refresh={m.refresh!r}: expected never, epoch or a number of steps"
        )
    if m.source != "self" and m.refresh != "never":
        raise ValueError(
            f"method.refresh={m.refresh!r} belongs to source='self'; "
            f"with source={m.source!r} leave it 'never'"
        )


def _check_epoch_unit(m: ConfigDict) -> None:
    """Check that the responses of a stage are known at its start, if its epochs count them."""
    if m.epoch_unit not in EPOCH_UNITS:
        raise ValueError(
            f"method.epoch_unit={m.epoch_unit!r}: choose one of {', '.join(EPOCH_UNITS)}"
        )
    known = m.source in corpus.CORPUS_SOURCES or (m.source == "self" and m.refresh == "never")
    if m.epoch_unit == "responses" and not known:
        raise ValueError(
            "method.epoch_unit='responses' needs source='corpus', 'gold+corpus' or 'self' with "
            f"refresh='never'; got source={m.source!r}, refresh={m.refresh!r}"
        )


def _check_ignored_settings(m: ConfigDict, data: ConfigDict) -> None:
    """Refuse settings that the objective would ignore."""
    if m.objective != "policy" and m.entropy_coef:
        raise ValueError(
            f"method.entropy_coef={m.entropy_coef} belongs to objective='policy', "
            f"not {m.objective!r}"
        )
    if m.objective != "policy" and m.tis_cap is not None:
        raise ValueError(
            f"method.tis_cap={m.tis_cap} belongs to objective='policy', "
            f"not {m.objective!r}: leave it None"
        )
    if m.objective != "policy" and not m.tempered:
        raise ValueError(
            f"method.tempered=False belongs to objective='policy', not {m.objective!r}: leave it "
            "True"
        )
    if m.objective != "policy" and (m.truncated == "zero" or m.overlong):
        raise ValueError(
            f"method.truncated={m.truncated!r}, overlong={m.overlong} change rewards, which "
            f"objective={m.objective!r} does not use: leave them at 'score' (or 'mask') and 0"
        )
    if m.advantage == "reinforce01" and m.kl_coef and m.kl_place == "reward":
        raise ValueError(
            "method.advantage='reinforce01' uses the accuracy, which has no KL term: "
            "set method.kl_place='loss'"
        )
    if m.objective != "policy" and m.kl_coef and m.kl_place == "reward":
        raise ValueError(
            f"method.kl_place='reward' needs a reward; "
            f"objective={m.objective!r} has none: use 'loss'"
        )
    if m.objective == "distill" and m.kl_coef:
        raise ValueError(
            f"method.kl_coef={m.kl_coef} with objective='distill', "
            "which is itself a divergence: set it to 0"
        )
    if data.pack and m.objective not in TOKEN_OBJECTIVES:
        raise ValueError(
            f"data.pack=True with objective={m.objective!r}: "
            "only conversations with given responses are packed"
        )
    d = m.distill
    is_model = d.teacher in distillation.TEACHERS or _is_model(d.teacher)
    if not is_model or not 0 < d.ema <= 1:
        known = ", ".join(distillation.TEACHERS)
        raise ValueError(
            f"method.distill teacher={d.teacher!r}, ema={d.ema}: "
            f"expected one of {known} or an existing folder with a model, and 0 < ema <= 1"
        )


def _check_own_samples(m: ConfigDict, r: ConfigDict) -> None:
    """Check how the policy samples its own responses, and the filters on them."""
    if m.source in ("rollouts", "self") and r.temperature <= 0:
        raise ValueError(
            f"rollout.temperature={r.temperature}: "
            "training on own responses needs a temperature above 0"
        )
    if m.source == "self" and m.self_samples < 1:
        raise ValueError(
            f"method.self_samples={m.self_samples}: expected at least 1 response per prompt"
        )
    if m.filter is not None:
        prompt_filters.check_prompt_filter(
            **_check_keys_of("filter", m.filter, {"name"}, FILTER_KEYS)
        )
    if m.online_filter is not None:
        prompt_filters.check_online_filter(
            **_check_keys_of("online_filter", m.online_filter, {"lo", "hi", "max_refills"})
        )
        if m.source != "rollouts":
            raise ValueError(f"method.online_filter needs rollouts; source={m.source!r} has none")


def _check_keys_of(
    name: str, given: Any, needed: set[str], more: set[str] = frozenset()
) -> dict[str, Any]:
    """Return a setting as a dict; refuse missing or unknown keys."""
    is_dict = isinstance(given, Mapping | ConfigDict)
    settings = dict(given) if is_dict else given
    if not is_dict or not needed <= set(settings) <= needed | more:
        may = f", and maybe {', '.join(sorted(more))}" if more else ""
        raise ValueError(
            f"method.{name}={settings!r}: expected None or a dict with "
            f"{', '.join(sorted(needed))}{may}"
        )
    return settings


def _check_ahead(m: ConfigDict, r: ConfigDict) -> None:
    """Check that a method can train on responses of the weights before the last update."""
    if not r.ahead or m.source != "rollouts":
        return
    if m.objective != "policy" or m.online_filter or m.advantage == "remax":
        raise ValueError(
            "rollout.ahead=1 trains on responses of the weights before the last update: expected "
            "method.objective='policy' without method.online_filter and advantage='remax'"
        )
    if m.ratio == "none" and m.tis_cap is None:
        raise ValueError(
            "rollout.ahead=1 with method.ratio='none': the responses are those of older weights; "
            "choose ratio token, sequence or cispo, or weight them with method.tis_cap=2.0"
        )


def _check_batch_split(m: ConfigDict, t: ConfigDict) -> None:
    """Check that a batch divides into updates and micro-batches."""
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
            "method.updates_per_batch and passes reuse rollouts; "
            f"with source={m.source!r} leave both at 1"
        )
    several = m.updates_per_batch * m.passes
    if m.objective == "policy" and several > 1 and m.ratio == "none" and m.tis_cap is None:
        raise ValueError(
            f"method.ratio='none' with {several} updates on one batch: from the second update on, "
            "its responses are those of an older policy; choose ratio token, sequence or cispo, "
            "or weight them with method.tis_cap=2.0"
        )
    rows = t.batch // m.updates_per_batch
    if t.micro_batch and (t.micro_batch < 0 or rows % t.micro_batch):
        raise ValueError(
            f"train.micro_batch={t.micro_batch} must divide the {rows} rows of an update"
        )
