"""A run that is killed again and again, with damage to its files between two starts."""

import collections
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import run_helpers
from PIL import Image
from run_workers import Outcome, Workers

WORDS = "red green blue one two six ten old".split()
REWARD = """
def reward(completion, answer):
    return float(len(completion) % 2)
"""
RECORDED = ("evals.csv", "metrics.jsonl")
# Files that a run does without, see `run_log.check_records`.
SPARE = ("rollouts/", "predictions/", "corpus/", "filters/")


def job(folder: Path, name: str) -> dict[str, Any]:
    """Three stages each: SFT, EWC and GRPO; or a filter with GRPO, self-SFT and SDFT.

    The user's reward gives half of all responses 1, so that the filter and self-SFT keep some. In
    "mixed", which is "ewc" for several processes, half of the rows of the second task have images:
    in an evaluation one process has all of them, and longer rows.
    """
    rows = [{"prompt": f"say {word}", "answer": word} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    mine = {key: str(folder / "rows.jsonl") for key in ("train", "test")}
    mine |= {"template": "none", "reward": f"{folder}/reward.py:reward"}
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    ask = [{"prompt": "<image>what is it", "images": ["a.png"]}, {"prompt": "red", "images": []}]
    (folder / "mixed.jsonl").write_text(
        "".join(json.dumps(ask[i > 2] | {"answer": "red"}) + "\n" for i in range(6))
    )
    mixed = {key: str(folder / "mixed.jsonl") for key in ("train", "test")}
    mixed |= {"template": "none", "scorer": "exact"}
    tasks = {t: {"task": "synthetic", "family": t, "side": 32} for t in ("facts", "colour")}
    made = run_helpers.METHOD
    ewc = made["sft"] | {"penalty": {"name": "ewc", "coef": 1.0, "samples": 4}}
    window = {"name": "window", "samples": 2, "lo": 1, "hi": 2}
    stages = {
        "ewc": [("facts", 2, made["sft"]), ("colour", 3, ewc), ("colour", 4, made["grpo"])],
        # All rewards are 0, and without KL the gradient is exactly 0; with KL it would be rounding
        # noise, which Adam amplifies.
        "mixed": [
            ("facts", 2, made["sft"]),
            ("mixed", 0, ewc),  # an epoch of six rows, in batches of four
            ("facts", 3, made["grpo"]),
            ("mixed", 2, made["grpo"] | {"kl_coef": 0.0}),
        ],
        "filter": [
            ("mine", 3, made["grpo"] | {"filter": window}),
            ("mine", 4, made["iterative"]),
            ("mine", 3, made["sdft"]),
        ],
    }
    measured = {"forced_prefix": True, "gold_probability": True, "drift": 4}
    sections: dict[str, Any] = {
        "stages": [
            {"task": t, "method": m} | ({"steps": n} if n else {"epochs": 1})
            for t, n, m in stages[name]
        ],
        "tasks": tasks | {"mine": mine, "mixed": mixed},
        "eval": {"limit": 4, "batch": 4, "every": 2, "mini": 4} | measured,
        "log": {"every": 3},
        "rewards": {"processes": 1},
    }
    if name == "ewc":
        sections["train"] = {"reset_optimizer": False}
    elif name == "mixed":
        sections["eval"] |= {"limit": 6, "every": 1}
        sections["data"] = {"buckets": [16, 32]}
        sections["stages"][3]["train"] = {"micro_batch": 2}
    else:
        sections["eval"] |= {"general": ["facts"]}
        sections["model"] = run_helpers.TEXT
    return {"method": "sft", "sections": sections}


class KilledRun:
    """A run that is killed at random changes of its files, and started again from what is left."""

    def __init__(
        self, workers: Workers, job: dict[str, Any], whole: Path, events: tuple[int, ...], seed: int
    ):
        self.workers, self.job, self.whole, self.events = workers, job, whole, events
        self.wanted = run_helpers.run_state(whole)
        self.rng = random.Random(seed)
        self.folders = (whole.with_name(f"killed{seed}.{n}") for n in range(10_000))
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.log: list[str] = []
        self.begin()

    def begin(self) -> None:
        self.folder = next(self.folders)
        self.damaged: dict[str, bytes] = {}  # what was in the files that the run did not refuse yet
        self.recorded = dict.fromkeys(RECORDED, b"")  # the lines of finished stages

    def kill(self, count: int, damage: float = 0.5) -> None:
        """Kill the run so many times, then let it end; a run that ended begins anew."""
        while self.outcomes["killed"] < count:
            process = self.rng.randrange(self.workers.count) if self.rng.random() < 0.3 else 0
            stop = self.rng.randint(1, max(1, self.events[process] // 3))
            outcome = self.start(stop=stop, process=process)
            if outcome.killed and self.rng.random() < damage:
                self.damage()
            if not outcome.killed and not outcome.refused:
                self.begin()
        while self.start().refused:
            pass

    def start(self, **more: Any) -> Outcome:
        copy = next(self.folders)
        outcome = self.workers.run(self.job | {"workdir": str(self.folder)} | more, copy)
        kind = "killed" if outcome.killed else "refused" if outcome.refused else "ended"
        self.outcomes[kind] += 1
        self.log.append(f"{kind} {more} {outcome.said}")
        if outcome.killed:
            shutil.rmtree(self.folder)
            self.folder = copy
        self.check_recorded()
        if outcome.refused:
            self.bring_back(outcome.said)
        elif not outcome.killed:
            self.check_end()
            shutil.rmtree(self.folder)
        return outcome

    def damage(self) -> None:
        """Delete, cut or change one file, if the run has written one."""
        groups: dict[str, list[Path]] = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            groups.setdefault(path.relative_to(self.folder).parts[0], []).append(path)
        names = [name for name in groups if not name.endswith((".lock", ".log", ".html"))]
        if not names:
            return
        weights = [4 if name == "checkpoints" else 1 for name in names]
        path = self.rng.choice(groups[self.rng.choices(names, weights)[0]])
        content = path.read_bytes()
        how = self.rng.choice(["deleted", "cut", "changed"]) if content else "deleted"
        if how == "deleted":
            path.unlink()
        elif how == "cut":
            os.truncate(path, self.rng.randrange(len(content)))
        else:
            place = self.rng.randrange(len(content))
            bit = 1 << self.rng.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        self.damaged.setdefault(str(path.relative_to(self.folder)), content)
        self.outcomes[how] += 1
        self.log.append(f"{how} {path.relative_to(self.folder)}")

    def bring_back(self, line: str) -> None:
        """Restore the file that a refusal names; it must be one that was damaged."""
        assert "\n" not in line, line
        named = [name for name in self.damaged if is_named(name, line)]
        assert named, (line, list(self.damaged), self.log[-8:])
        for name in named:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(self.damaged.pop(name))

    def check_recorded(self) -> None:
        """No recorded line of a finished stage is changed or lost, but by our damage."""
        for name in set(RECORDED) - self.damaged.keys():
            path = self.folder / name
            now = path.read_bytes() if path.exists() else b""
            assert now.startswith(self.recorded[name]), (name, self.log[-8:])
        if "progress.json" in self.damaged or not (self.folder / "progress.json").exists():
            return
        evaluation = json.loads((self.folder / "progress.json").read_text()).get("evaluation")
        if evaluation and len(evaluation["done"]) > 1:
            for name in set(RECORDED) - self.damaged.keys():
                size = evaluation["positions"][name]["bytes"]
                self.recorded[name] = (self.folder / name).read_bytes()[:size]

    def check_end(self) -> None:
        """The run ended in the state of one that was not disturbed, but for lost copies."""
        found = run_helpers.read_records(self.folder)
        found["metrics.jsonl"] = [x for x in found["metrics.jsonl"] if x.get("event") != "lost"]
        spare = {name for name in self.damaged if name.startswith(SPARE)}
        for number in run_helpers.saved_stages(self.folder):
            prefix = f"checkpoints/stages/{number}/"
            arrays = [name for name in self.wanted if name.startswith(f"stage {number}: ")]
            if any(name.startswith(prefix) for name in self.damaged):
                spare |= set(arrays)  # the run did not need it again
            else:
                found |= {
                    f"stage {number}: {path}": x
                    for path, x in run_helpers.stage_arrays(self.folder, number).items()
                }
        names = (found.keys() | self.wanted.keys()) - spare
        different = [n for n in sorted(names) if found.get(n) != self.wanted.get(n)]
        assert not different, (different[:8], self.folder, self.log[-12:])


def is_named(name: str, line: str) -> bool:
    """Return whether a line names a file, or the checkpoint that it belongs to."""
    folders = [str(p) for p in Path(name).parents if len(p.parts) >= 3]
    return any(part in line for part in (name, *folders))
