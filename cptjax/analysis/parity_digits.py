"""Simulate RL's Razor on handwritten digits: does KL(base || current) explain forgetting?

A small network with ten outputs learns two labelings of the same 8 x 8 digits (scikit-learn's),
told apart by one input:

    other     a fixed permutation of the ten digits
    parity    any digit of the right parity is correct; trained with a random one

That is the base model. Then it trains on parity alone, at many learning rates, and forgets the
other labeling. Every method reaches nearly the same accuracy, but with another distribution over
the five correct answers:

    RL        policy gradient on sampled answers, reward 1 if the parity is right, no KL term
    SFT-1     even -> 0, odd -> 1
    SFT-2     even -> 0 or 4, odd -> 1 or 5
    oracle    the base model's own distribution over the correct answers: of all distributions that
              are always right, the one with the smallest KL to the base model

As in arXiv 2509.04259, except for the data (there: MNIST and FashionMNIST) and sizes.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cptjax.analysis.drift import StageDrift, drift_chart, fit_quadratic
from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.analysis.pareto import ArmPoint, pareto_finding
from cptjax.evaluation.summary import mean_and_sd
from cptjax.types import Array, Params

METHODS = ("RL", "SFT-1", "SFT-2", "oracle")
WIDTHS = (65, 256, 128, 10)  # 64 pixels and the input that tells the labelings apart
PRETRAINING_ROWS, TEST_ROWS = 500, 497
PRETRAINING_STEPS, PRETRAINING_RATE = 400, 1e-3
BATCH = 32
SAMPLES = 8  # of RL, per digit
RATES = np.geomspace(3e-6, 1e-3, 15)
EPOCHS = (1, 2)
SCHEDULES = ("constant", "cosine")
DISTANCES = {  # measures of how far a model is from the base model
    "KL(base || current)": lambda base, now: (base * (jnp.log(base) - jnp.log(now))).sum(-1),
    "KL(current || base)": lambda base, now: (now * (jnp.log(now) - jnp.log(base))).sum(-1),
    "total variation": lambda base, now: jnp.abs(base - now).sum(-1) / 2,
    "L2 of the distributions": lambda base, now: jnp.sqrt(jnp.square(base - now).sum(-1)),
}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images [N 64] in [0, 1] and digits [N]: of pre-training, of training on parity, of tests."""

    pretraining: tuple[Array, Array]
    training: tuple[Array, Array]
    test: tuple[Array, Array]


def load_split_digits(seed: int) -> Digits:
    """Load scikit-learn's 1,797 digits, split by seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install -e '.[toy]'"
        ) from None
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(digits))
    images, digits = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(digits[order])
    cuts = (0, PRETRAINING_ROWS, len(digits) - TEST_ROWS, len(digits))
    parts = [(images[a:b], digits[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return Digits(*parts)


# ---- network -------------------------------------------------------------------------------------


def init_network(key: jax.Array) -> Params:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    sizes = zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    return [
        {"w": jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)} for k, i, o in sizes
    ]


def answer_logits(params: Params, images: Array, parity: bool | Array) -> Array:
    """Return the logits [N 10] of the answers to images under one of the labelings."""
    task = jnp.broadcast_to(jnp.asarray(parity, jnp.float32), images.shape[:-1])
    x = jnp.concatenate([images, task[..., None]], -1)
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def right_answers(digits: Array) -> Array:
    """Return a mask [N 10] of the answers with a digit's parity."""
    return jnp.arange(10) % 2 == digits[:, None] % 2


def other_labels(digits: Array) -> Array:
    """Return the answers [N] under the other labeling, a permutation of the digits."""
    return (3 * digits + 1) % 10


# ---- losses --------------------------------------------------------------------------------------


def pretraining_loss(params: Params, images: Array, digits: Array, key: jax.Array) -> Array:
    """Cross-entropy on both labelings; for parity, on a random correct answer."""
    answers = jax.random.categorical(key, jnp.where(right_answers(digits), 0.0, -jnp.inf))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(answer_logits(params, images, p), y)
        for p, y in ((False, other_labels(digits)), (True, answers))
    ]
    return sum(losses).mean()


def policy_gradient_loss(params: Params, base: Params, images: Array, digits: Array, key: Any):
    """REINFORCE with the mean reward of an image's answers as the baseline (Dr. GRPO)."""
    logits = answer_logits(params, images, True)
    answers = jax.random.categorical(key, logits, shape=(SAMPLES, len(digits)))
    rewards = (answers % 2 == digits % 2).astype(jnp.float32)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), answers.T, -1).T
    return -((rewards - rewards.mean(0)) * logps).mean()


def target_loss(name: str, params: Params, base: Params, images: Array, digits: Array, key: Any):
    """Cross-entropy with the target distribution of an SFT arm."""
    odd = digits % 2
    if name == "SFT-1":
        targets = jax.nn.one_hot(odd, 10)
    elif name == "SFT-2":
        targets = jax.nn.one_hot(odd + 4 * jax.random.bernoulli(key, shape=odd.shape), 10)
    else:
        logits = answer_logits(base, images, True)
        targets = jax.nn.softmax(jnp.where(right_answers(digits), logits, -jnp.inf))
    return optax.softmax_cross_entropy(answer_logits(params, images, True), targets).mean()


# ---- runs ----------------------------------------------------------------------------------------


def train_base(digits: Digits, seed: int) -> Params:
    """Train the base model on both labelings."""
    optimizer = optax.adam(PRETRAINING_RATE)
    params = init_network(jax.random.key(seed))

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, PRETRAINING_ROWS, (BATCH,), replace=False)
        images, labels = (x[rows] for x in digits.pretraining)
        gradient = jax.grad(pretraining_loss)(params, images, labels, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed + 1), PRETRAINING_STEPS)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params


@functools.partial(jax.jit, static_argnames=("method", "steps"))
def train_at_rates(
    base: Params, images: Array, digits: Array, factors: Array, key: jax.Array, method: str,
    steps: int,
) -> Params:  # fmt: skip
    """Train on parity with each schedule [runs, steps] of learning rates; return all models."""
    optimizer = optax.scale_by_adam()
    loss = policy_gradient_loss
    if method != "RL":
        loss = functools.partial(target_loss, method)
    order_key, *keys = jax.random.split(key, steps + 1)
    per_epoch = len(digits) // BATCH
    epochs = jax.random.split(order_key, -(-steps // per_epoch))
    rows = jnp.concatenate(
        [jax.random.permutation(k, len(digits))[: per_epoch * BATCH] for k in epochs]
    ).reshape(-1, BATCH)[:steps]

    def train(rates: Array) -> Params:
        def step(carry, now):
            params, state = carry
            chosen, key, rate = now
            gradient = jax.grad(loss)(params, base, images[chosen], digits[chosen], key)
            updates, state = optimizer.update(gradient, state)
            return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), None

        begin = (base, optimizer.init(base))
        (params, _), _ = jax.lax.scan(step, begin, (rows, jnp.stack(keys), rates))
        return params

    return jax.vmap(train)(factors)


def learning_rates(steps: int) -> tuple[list[str], np.ndarray]:
    """Return the names of the runs and their learning rates [runs, steps]."""
    shapes = {
        "constant": np.ones(steps),
        "cosine": (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2,
    }
    names = [f"{name}, {rate:.0e}" for name in SCHEDULES for rate in RATES]
    return names, np.array([rate * shapes[name] for name in SCHEDULES for rate in RATES])


@jax.jit
def accuracies(params: Params, images: Array, digits: Array) -> tuple[Array, Array]:
    """Return the accuracy on parity and on the other labeling."""
    parity = answer_logits(params, images, True).argmax(-1) % 2 == digits % 2
    other = answer_logits(params, images, False).argmax(-1) == other_labels(digits)
    return parity.mean(), other.mean()


@jax.jit
def distances(base: Params, params: Params, images: Array) -> dict[str, Array]:
    """Measure the distance from the base model on the inputs of parity, and of the weights."""
    tiny = jnp.finfo(jnp.float32).tiny
    before, now = (
        jnp.maximum(jax.nn.softmax(answer_logits(p, images, True)), tiny) for p in (base, params)
    )
    squares = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), base, params)
    return {name: measure(before, now).mean() for name, measure in DISTANCES.items()} | {
        "L2 of the weights": jnp.sqrt(sum(jax.tree.leaves(squares)))
    }


def simulate(seed: int) -> tuple[list[StageDrift], list[ArmPoint], tuple[float, float]]:
    """Train all methods from one base model; return distances, points and the base accuracies."""
    data = load_split_digits(seed)
    base = train_base(data, seed)
    images, digits = data.test
    base_parity, base_other = map(float, accuracies(base, images, digits))
    drifts, points = [], []
    for method in METHODS:
        for epochs in EPOCHS:
            steps = epochs * (len(data.training[1]) // BATCH)
            names, rates = learning_rates(steps)
            key = jax.random.key(1000 + seed)
            models = train_at_rates(base, *data.training, jnp.asarray(rates), key, method, steps)
            parity, other = jax.vmap(accuracies, (0, None, None))(models, images, digits)
            far = jax.vmap(distances, (None, 0, None))(base, models, images)
            for i, name in enumerate(names):
                measured = {key: float(values[i]) for key, values in far.items()}
                if not np.isfinite(list(measured.values())).all():
                    continue
                loss, label = base_other - float(other[i]), f"{name}, {epochs} epochs"
                drifts.append(StageDrift(method, label, 1, loss, measured))
                points.append(ArmPoint(method, label, float(parity[i]), loss))
    return drifts, points, (base_parity, base_other)


def analyze(seeds: int = 3) -> Finding:
    """Simulate with several seeds, and fit forgetting to each distance over all methods."""
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: expected at least one seed")
    began, fits, matched = time.perf_counter(), [], []
    for seed in range(seeds):
        drifts, points, base = simulate(seed)
        fits.append({m: fit_quadratic(m, drifts) for m in drifts[0].far})
        matched.append(pareto_finding(points, base[0]))
    return parity_finding(drifts, base, fits, matched, time.perf_counter() - began)


def parity_finding(
    drifts: list[StageDrift],
    base: tuple[float, float],
    fits: list[dict[str, Any]],
    matched: list[Finding],
    seconds: float,
) -> Finding:
    r2 = {name: [fit[name] and fit[name].r2 for fit in fits] for name in fits[0]}
    first = next(iter(r2))
    explained, _ = mean_sd(r2[first])
    losses = {
        name: mean_sd(
            None if loss is None else 100 * loss
            for loss in (f.numbers["loss_at_matched_accuracy"][name] for f in matched)
        )
        for name in METHODS
    }
    compared = [f"{name} {mean:.1f}" for name, (mean, _) in losses.items() if mean is not None]
    sentences = [
        f"{first} on the inputs of the new task explains "
        f"{100 * explained:.0f} % of the variance of forgetting over "
        f"{len(drifts)} runs of {len(METHODS)} methods (quadratic fit, mean R² of {len(fits)} "
        "seeds)."
        if explained is not None
        else f"{first} on the inputs of the new task has too few different values for a fit.",
        "At matched accuracy on parity the loss on the other labeling is "
        f"{', '.join(compared)} points.",
        f"The base model of the last seed has {100 * base[0]:.1f} % on parity and "
        f"{100 * base[1]:.1f} % on the other labeling; all runs took {seconds:.0f} s.",
    ]
    tables = [
        FindingTable(
            "Share of forgetting that each distance explains",
            ("distance", "R², quadratic, mean over seeds", "sd"),
            [(m, *_cells(mean_sd(v), 3)) for m, v in r2.items()],
        ),
        FindingTable(
            "Loss on the other labeling at matched accuracy on parity, in points",
            ("method", "mean over seeds", "sd"),
            [(name, *_cells(values, 1)) for name, values in losses.items()],
        ),
    ]
    note = "One dot per run of the last seed; the line is the fit over all methods."
    charts = [FindingChart(m, note, drift_chart(fit, drifts)) for m, fit in fits[-1].items() if fit]
    numbers = {
        "seeds": len(fits),
        "runs": len(drifts),
        "seconds": seconds,
        "r2": r2,
        "loss_at_matched_accuracy": losses,
        "stages": [dataclasses.asdict(drift) for drift in drifts],
    }
    charts = [*charts[:1], *matched[-1].charts, *charts[1:]]
    return Finding("RL's Razor on digits", sentences, tables, charts, numbers)


def mean_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    # A seed has no number if a method does not reach the matched accuracy, or nothing was fitted.
    spread = mean_and_sd(values) or {"mean": None, "sd": None}
    return spread["mean"], spread["sd"]


def _cells(values: Iterable[float | None], decimals: int) -> list[str]:
    return ["" if value is None else f"{value:.{decimals}f}" for value in values]
