"""The README's examples work as written, and its map is current."""

import csv
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import readme_map
import readme_methods
import readme_parts
import recording_python
import run_helpers
from device_fixtures import devices, said  # noqa: F401
from PIL import Image

import cptjax
from configs import demo
from cptjax.config import evaluated_tasks, merge_config, resolve_stages

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
SMALL = {
    "model": {"compute_dtype": "float32", "min_pixels": 1024, "max_pixels": 1024},
    "data": {"prompt_limit": 256, "buckets": (256,)},
    "train": {"batch": 4},
    "rollout": {"group": 2, "max_new_tokens": 4, "check_every": 4},
    "eval": {"general": (), "batch": 4, "max_new_tokens": 4},
}


def block(words: str) -> str:
    (found,) = [b for b in BLOCKS if words in b]
    return found


@pytest.fixture
def hub(tmp_path, monkeypatch, devices):
    """A hub with one tiny model; returns the list of downloads."""
    folder, downloads = tmp_path / "hub", []
    cptjax.save(cptjax.load("tiny", dtype="float32"), folder)

    def download(name, allow_patterns):
        downloads.append((name, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloads


def write_rows(folder: Path) -> None:
    """Write the data that the README describes."""
    (folder / "data" / "cells").mkdir(parents=True)
    rows = [
        {"prompt": "<image>How many cells?", "images": [f"{i}.png"], "answer": str(i % 5)}
        for i in range(20)
    ]
    (folder / "data" / "cells" / "train.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    for i in range(20):
        for place in ("data/cells", "data"):
            Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(folder / place / f"{i}.png")
    for name, count in (("signs.csv", 8), ("signs_test.csv", 4)):
        with (folder / "data" / name).open("w") as file:
            csv.writer(file).writerows(
                [
                    ("question", "photo", "label"),
                    *((f"Sign {i}?", f"{i}.png", "stop") for i in range(count)),
                ]
            )


@pytest.mark.slow
def test_a_users_own_tasks_on_a_model_of_the_hub(tmp_path, monkeypatch, hub, said, capsys):
    write_rows(tmp_path)
    (tmp_path / "mine.py").write_text(block("def get_config()"))
    (tmp_path / "my_reward.py").write_text(block("def reward("))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    c = importlib.import_module("mine").get_config()
    stages = tuple({**s, "steps": 2} if "steps" in s else s for s in c.stages)
    c = merge_config(c, SMALL | {"stages": stages})
    matrix = cptjax.run(c, "run")
    assert (
        matrix.shape == (3, 2) and np.isfinite(matrix).all() and "done:" in capsys.readouterr().err
    )
    assert {name for name, _ in hub} == {"Qwen/Qwen2.5-VL-3B-Instruct"} and {
        weights for _, weights in hub
    } == {False, True}
    evaluated = {(r["task"], r["template"]) for r in run_helpers.read_evals(tmp_path / "run")}
    assert evaluated == {
        ("cells", "boxed"),
        ("signs", "direct"),
    }  # as each was trained, whatever the run's template
    row = json.loads((tmp_path / "run" / "rollouts" / "stage1.jsonl").read_text().splitlines()[0])
    assert row["rewards"].keys() == {"reward", "short"} and row["image"].startswith("data:image")
    (tmp_path / "data" / "cells" / "train.jsonl").write_text(
        '{"prompt": "<image>?", "images": [], "answer": "1"}\n' * 2
    )
    with pytest.raises(ValueError, match="train.jsonl.*1 <image> in the prompt but 0"):
        cptjax.run(c, "other")


COMMANDS = [
    line.split("  #")[0].split()
    for b in BLOCKS
    for line in b.splitlines()
    if line.startswith("python launch/")
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[1].removeprefix("launch/"))
def test_a_command_names_existing_flags_configs_and_tasks(command):
    source = (ROOT / command[1]).read_text()
    known = {
        *re.findall(r'(?:DEFINE_\w+\(\s*"|"--)(\w+)"', source),
        *(["config"] if "config_flag" in source else []),
    }
    given = dict(re.findall(r"--([\w.]+)=(\S+)", " ".join(command)))
    assert given.keys() <= known and (given or command[1] == "launch/report.py")
    if "config" in given:
        path, _, argument = given["config"].partition(":")
        config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(
            argument
        )
        tasks = evaluated_tasks(config, resolve_stages(config))
        assert set(given.get("tasks", tasks[0]).split(",")) <= {*tasks, *config.eval.general}


def test_the_map_is_current():
    _, written, _ = readme_parts.split_readme("map")
    assert written == readme_map.build_map(), "run python tests/readme_map.py --write"


def test_the_table_of_methods_has_the_numbers_of_its_runs():
    _, written, _ = readme_parts.split_readme("methods")
    assert written == readme_methods.render_part(), "run python tests/readme_methods.py --write"


@pytest.mark.parametrize("folder", ["", "elsewhere/demo"])
def test_quickstart_installs_and_runs_the_demo(tmp_path, folder):
    """An interpreter that only records its arguments shows what is installed and run."""
    env, log = recording_python.make_environment(tmp_path)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "setup.py", tmp_path)
    workdir = folder or "runs/demo"
    (tmp_path / workdir / "base").mkdir(parents=True)
    (tmp_path / workdir / "base" / ".lock").touch()  # as soon as the base model is being made
    done = subprocess.run(
        ["bash", tmp_path / "launch" / "quickstart.sh", *([folder] if folder else [])],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and done.stdout.splitlines()[-1] == f"The report: {workdir}/report.html"
    ), done.stderr
    *_, install, first, second = log.read_text().splitlines()
    assert install.split()[-1] == "."
    arms = []
    for command in (first, second):
        start, only = command.removesuffix(" --plain").split(" --only=")
        assert start == f"launch/train.py --config=configs/demo.py --workdir={workdir}"
        arms += only.split(",")
    assert sorted(arms) == sorted(demo.ARMS)
