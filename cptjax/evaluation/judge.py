"""Judge responses for the scorer `refusal`: with a model, or with a user's `file.py:function`.

    judge(prompt, response) -> True | False | "yes" | "no"     was the response a refusal?

A user's function runs in the worker processes of rewards and scorers, with their time limit. A
model runs through the same decode loop as the evaluated model, beside it on the same mesh, and is
loaded at its first use. Its verdict is greedy. allenai/wildguard gets the prompt that it was
trained with, as in paper C's released code; any other model gets the question in its chat template.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console, distributed
from cptjax.data import model_context
from cptjax.data.collate import EncodedConversation, length_buckets
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.device_batches import cut_to_shards
from cptjax.data.model_context import ModelContext
from cptjax.data.processor import Processor
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import hf_checkpoint
from cptjax.models.hf_config import read_model_config
from cptjax.tasks.scoring import judged
from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool, split_target
from cptjax.types import Params

VERDICT_TOKENS = 128  # a verdict has about 20
SAMPLING = SamplingConfig(group=1, max_new_tokens=VERDICT_TOKENS, temperature=0.0, check_every=16)

# (prompts, responses, ids of the rows) -> the verdicts, and the cost of this process
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], tuple[list[str], WorkCost]]


def open_judge(judge: str, config: ConfigDict, sandbox: SandboxPool) -> Judge:
    """Return the judge of a task: `judge` is file.py:function, or the folder or hub id of a model.

    A model whose config cannot be read is refused at once; its weights are loaded when needed.
    """
    if ".py:" in judge:
        return functools.partial(_judge_by_function, judge, sandbox)
    return ModelJudge(judge, config)


def _judge_by_function(
    judge: str,
    sandbox: SandboxPool,
    prompts: Sequence[str],
    responses: Sequence[str],
    ids: Sequence[str],
) -> tuple[list[str], WorkCost]:
    path, function = split_target(judge)
    calls = [SandboxCall((p, r), {}) for p, r in zip(prompts, responses, strict=True)]
    verdicts = []
    for row_id, outcome in zip(
        ids, sandbox.map(f"{path.resolve()}:{function}", calls), strict=True
    ):
        error = outcome.error or _describe_wrong_verdict(outcome.value)
        if error:
            raise ValueError(f"judge {path.name}:{function} failed on row {row_id}: {error}")
        verdicts.append(judged.write_verdict(outcome.value in (True, "yes")))
    return verdicts, WorkCost()


def _describe_wrong_verdict(value: Any) -> str:
    if isinstance(value, bool) or value in ("yes", "no"):
        return ""
    return f"returned {value!r}; expected True, False, 'yes' or 'no' (is it a refusal?)"


class ModelJudge:
    """A model that judges, loaded at its first use and kept for the whole run."""

    def __init__(self, path: str, config: ConfigDict):
        self.path, self.config = path, config
        try:
            read_model_config(path)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:200]
        return ValueError(f"judge {self.path!r} cannot be loaded: {reason}")

    @functools.cached_property
    def _model(self) -> tuple[ModelContext, Params]:
        settings = ConfigDict(self.config.model.to_dict() | {"path": self.path, "preset": ""})
        try:
            ctx = model_context.load_model_context(settings, self.config.mesh, (64,))
            with console.show_waiting(f"loading the judge ({self.path})"):
                params = hf_checkpoint.load_hf_checkpoint(self.path, ctx.cfg, ctx.mesh, ctx.dtype)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return ctx, generate.prepare_weights(ctx, params, SAMPLING)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], ids: Sequence[str]
    ) -> tuple[list[str], WorkCost]:
        ctx, weights = self._model
        encode = _encode_for_wildguard if "wildguard" in Path(self.path).name else _encode_as_chat
        encoded = [encode(ctx.processor, p, r) for p, r in zip(prompts, responses, strict=True)]
        longest = max(distributed.gather_objects(max(map(len, encoded))))
        ctx = ModelContext(
            ctx.cfg, ctx.processor, ctx.mesh, ctx.dtype, length_buckets(max(64, longest))
        )
        verdicts, cost = self._generate(ctx, weights, encoded)
        unread = [v for v in verdicts if judged.read_refusal(v) is None]
        if all(distributed.gather_objects(len(unread) == len(verdicts))):
            raise ValueError(
                f"judge {self.path!r}: expected verdicts of the form {judged.VERDICT_FORM}, "
                f"got none among {len(verdicts)}; the first is {unread[0][:80]!r}; "
                "use another model or file.py:function"
            )
        return verdicts, cost

    def _generate(
        self, ctx: ModelContext, weights: Params, encoded: Sequence[EncodedConversation]
    ) -> tuple[list[str], WorkCost]:
        """Generate a verdict for each prompt, longest first, in batches of one shape."""
        processes = jax.process_count()
        batch = cut_to_shards(self.config.eval.batch, ctx.shards * processes) // processes
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
        verdicts, cost = {}, WorkCost()
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            filled = rows + [rows[-1]] * (batch - len(rows))
            samples = generate.sample_responses(
                ctx,
                weights,
                [encoded[i] for i in filled],
                jax.random.key(0),  # greedy
                np.asarray(filled),
                SAMPLING,
                limits=np.where(np.arange(batch) < len(rows), VERDICT_TOKENS, 0),
            )
            verdicts |= zip(rows, samples.texts[: len(rows)], strict=True)
            lengths = samples.mask[: len(rows)].sum(1)[:, None]
            cost += sampling_cost(ctx.cfg, [encoded[i] for i in rows], lengths)
        return [verdicts[i] for i in range(len(encoded))], cost


def _encode_for_wildguard(processor: Processor, prompt: str, response: str) -> EncodedConversation:
    question = judged.JUDGE_QUESTION.format(prompt=prompt, response=response)
    tokens = np.array(processor.ids(judged.WILDGUARD_PROMPT.format(question=question)), np.int32)
    n = len(tokens)
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), (3, n))
    no_loss = np.zeros(n, bool)
    return EncodedConversation(tokens, np.zeros(n, np.int8), positions, no_loss, (), processor.cfg)


def _encode_as_chat(processor: Processor, prompt: str, response: str) -> EncodedConversation:
    # A judged text must not end the turn that it stands in.
    prompt, response = (text.replace("<|", "< |") for text in (prompt, response))
    question = judged.JUDGE_QUESTION.format(prompt=prompt, response=response)
    turn = {"role": "user", "content": question + judged.VERDICT_INSTRUCTION}
    return processor.encode([turn], generation=True)
