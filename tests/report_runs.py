"""Workdirs as runs would write them, for the tests of the report."""

from pathlib import Path

import numpy as np
from PIL import Image

from cptjax.common import files, run_log
from cptjax.evaluation import report

TASKS = ["colour", "shape", "digit", "count"]
GENERAL = ["arith", "facts", "jigsaw"]
STEPS = 60
ARMS = {  # name -> (loss of an old task per stage, loss of general tasks per stage, stages)
    "sft_bare": (0.13, 0.22, TASKS),
    "sft_style": (0.02, 0.01, TASKS),
    "grpo": (0.01, -0.005, TASKS),
    "joint": (0.0, 0.95, [TASKS]),
}


def eval_row(stage, name, task, value, metric="accuracy", step=STEPS, n=192):
    p = value if metric == "kl_base" else min(max(value, 0.0), 1.0)
    values = (
        stage,
        name,
        step,
        task,
        metric,
        p,
        n,
        abs(p * (1 - p) / n) ** 0.5,
        "exact",
        "answer",
        "1024-1024",
        "T=0 max=8",
    )
    return dict(zip(run_log.EVAL_COLUMNS, values, strict=True))


def log_evaluation(log, stage, stages, lost, lost_general, rng, step=STEPS, metric="accuracy"):
    name = "+".join(np.atleast_1d(stages[stage - 1])) if stage else "base"
    for k, task in enumerate(TASKS):
        learned = next((i for i, s in enumerate(stages, 1) if task in np.atleast_1d(s)), 0)
        value = 0.55 + 0.04 * k if stage < learned or not stage else 0.95 - lost * (stage - learned)
        log.evals([eval_row(stage, name, task, value + rng.normal(0, 0.012), metric, step)])
        if metric == "accuracy":
            forced = value + 0.8 * lost * max(stage - learned, 0)
            log.evals([eval_row(stage, name, task, forced, "accuracy_forced")])
            base_kl = 0.02 + stage * (lost + 0.02) * (1 + 0.1 * k)
            log.evals([eval_row(stage, name, task, base_kl, "kl_base")])
    for k, task in enumerate(GENERAL if metric == "accuracy" else []):
        value = 0.97 - 0.05 * k
        log.evals([eval_row(stage, name, task, value - lost_general * stage)])
        forced = value - 0.1 * lost_general * stage
        log.evals([eval_row(stage, name, task, forced, "accuracy_forced")])


def make_run(workdir, arm="grpo", upto=None, seed=0, crash=False, expect=()):
    """Write a workdir as a run of `arm` would, up to a stage.

    A crashed run ends within a stage and within a line.
    """
    lost, lost_general, stages = ARMS[arm]
    rng, log = np.random.default_rng(seed), run_log.RunLog(workdir)
    method = {
        "name": arm.split("_")[0],
        "objective": "sft" if "sft" in arm else "policy",
        "kl_coef": 0.0,
    }
    config = {
        "name": arm,
        "seed": seed,
        "method": method,
        "stages": [{"task": s, "steps": STEPS} for s in stages],
        "expect": expect,
    }
    config["eval"] = {"tasks": "all", "general": GENERAL, "groups": {"text": ["arith", "facts"]}}
    files.write_json(Path(workdir) / "config.json", config)
    files.write_json(Path(workdir) / "versions.json", {"jax": "0.10.2", "devices": "cpu x 1"})
    log_evaluation(log, 0, stages, lost, lost_general, rng)
    upto = len(stages) if upto is None else upto
    for stage in range(1, upto + 1 + crash):
        log_training(log, workdir, stage, stages, arm, rng, STEPS if stage <= upto else STEPS // 3)
        if stage <= upto:
            log_evaluation(log, stage, stages, lost, lost_general, rng, STEPS // 2, "accuracy_mini")
            log_evaluation(log, stage, stages, lost, lost_general, rng)
            log.step(stage, STEPS, {"event": "evaluate", "seconds": 2.0})
    for stage in range(upto + 1):
        right = rng.random((4, 40)) < 0.9 - lost * stage
        log.predictions(
            stage,
            [
                {"task": t, "id": i, "score": float(right[k, i])}
                for k, t in enumerate(TASKS)
                for i in range(40)
            ],
        )
    log.close()
    if crash:
        with (Path(workdir) / "metrics.jsonl").open("a") as file:
            file.write('{"stage": 3, "st')
    return workdir


def log_training(log, workdir, stage, stages, arm, rng, steps):
    for step in range(1, steps + 1):
        reward = 0.95 - 0.4 * np.exp(-step / 15)
        values = {
            "loss": 0.4 * np.exp(-step / 20) + rng.normal(0, 0.01),
            "grad_norm": 1 + rng.normal(0, 0.1),
        }
        values |= {"seconds": 0.1, "tokens": 2000, "trained": 3000}
        if "sft" not in arm and arm != "joint":
            values |= {
                "reward": reward + rng.normal(0, 0.03),
                "response_length/mean": 4 + rng.normal(0, 0.1),
                "rollouts": 128,
                "frac_reward_zero_std": 1 - reward,
            }
        log.step(stage, step, values)
    if "sft" in arm or arm == "joint":
        return
    folder = Path(workdir) / "rollouts" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for step in (1, steps // 2, steps):
        pixels = np.full((32, 32, 3), 235, np.uint8)
        pixels[6:26, 6:26] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{stage}_{step}.png")
        sampled = [
            ("it is red", 1.0),
            ("answer : red", 1.0),
            ("i think blue", 0.0),
            ("it is <b>green</b>", 0.0),
            ("red", 1.0),
        ]
        shared = {
            "stage": stage,
            "step": step,
            "task": str(stages[stage - 1]),
            "id": f"{step}",
            "prompt": "What colour is the shape?",
            "answer": "red",
            "image": f"rollouts/images/{stage}_{step}.png",
        }
        rewards = [
            {"reward": r, "rewards": {"accuracy": r, "format": 1.0}, "advantage": r - 0.6}
            for _, r in sampled
        ]
        log.rollouts(
            stage,
            [
                {**shared, "response": text, **parts}
                for (text, _), parts in zip(sampled, rewards, strict=True)
            ],
        )


def write_page(*folders, out=None):
    return report.write_report(folders, out).read_text(encoding="utf-8")
