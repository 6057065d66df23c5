"""Wrong and hostile input: exit code 2, one line that names what is wrong, in little time.

Every case is a command. All of them run in forks of one process (see launcher_forks); some
commands as their own processes are in tests/common/test_cli.py and tests/test_failures.py.
"""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import launcher_forks
import pytest
import run_helpers
from PIL import Image

CONFIG = '''
from configs.base import METHODS, get_config as base
from ml_collections import ConfigDict

def get_config(arg=""):
    c = base()
    c.model.update(preset="tiny", compute_dtype="float32", min_pixels=1024, max_pixels=1024)
    c.data.update(template="none", prompt_limit=32, buckets=(32,), limit=8)
    c.tasks.facts = dict(task="synthetic", family="facts")
    c.stages = (dict(task="facts", steps=1),)
    c.train.update(batch=4, lr=1e-2)
    c.eval.update(limit=4, batch=4, max_new_tokens=4, before=False)
    c.method.update(METHODS["sft"])
    {}
    return c
'''  # fmt: skip
SECONDS = 30.0  # of processor time of one command


class Case(NamedTuple):
    """A command in a folder of its own: what makes the folder, the flags, a part of the error."""

    name: str
    prepare: Callable[[Path], list[str]]
    error: str


# ---- configs: lines of get_config, and a part of the error ---------------------------------------

STAGE = "c.stages = (dict(task='facts', steps=1, {}),)"
CONFIGS = {
    "c.stages = ()": "config.stages: expected 1 to 1000 stages",
    "c.stages = (5,)": "config.stages: expected a tuple of dicts, got the item 5",
    "c.stages = ('facts',)": "config.stages: expected a tuple of dicts",
    "c.stages = (None,)": "config.stages: expected a tuple of dicts",
    "c.stages = 5": "stages",
    "c.stages = (dict(task='facts', steps=1),) * 20000": "1 to 1000 stages",
    "c.stages = (dict(task=5, steps=1),)": "config.stages[0]: expected task='name'",
    "c.stages = (dict(task=('facts', 5), steps=1),)": "config.stages[0]: expected task='name'",
    "c.stages = (dict(task=('facts', 'facts'), steps=1),)": "of different names",
    "c.stages = (dict(task={'a': 1}, steps=1),)": "config.stages[0]: expected task='name'",
    "c.stages = (dict(task='', steps=1),)": "got no task",
    "c.stages = (dict(task='fact', steps=1),)": "no task 'fact'; did you mean 'facts'",
    "c.stages = (dict(task='../x', steps=1),)": "no task '../x'",
    "c.stages = (dict(task='facts', steps='1'),)": "expected a whole number of steps above 0",
    "c.stages = (dict(task='facts', steps=True),)": "expected a whole number of steps above 0",
    "c.stages = (dict(task='facts', steps=10**30),)": "config.stages[0].steps: expected at most",
    "c.stages = (dict(task='facts', steps=2 * 10**9),)": "steps of at most 1000000000",
    "c.stages = (dict(task='facts', epochs=1e300),)": "config.stages[0].epochs",
    "c.stages = (dict(task='facts', epochs=float('inf')),)": "config.stages[0].epochs",
    "c.stages = (dict(task='facts', epochs=float('nan')),)": "config.stages[0].epochs",
    STAGE.format("train=5"): "config.stages[0].train: expected a section (dict), got 5",
    STAGE.format("train=dict(lr='x')"): "config.stages[0].train.lr: expected a number",
    STAGE.format("method='sft'"): "config.stages[0].method: expected a section",
    STAGE.format("data=dict(weights=(1, 2))"): "data.weights: expected 1 numbers",
    STAGE.format("data=dict(template='nope')"): "unknown template 'nope'",
    STAGE.format("**{'train.lr': 3}"): "config.stages[0].train.lr does not exist",
    STAGE.format("train=dict(batch=10**9)"): "config.train.batch: expected a whole number of at most",
    "c.orders = (0,)": "config.orders: expected a tuple of tuples of indices",
    "c.orders = (('a',),)": "config.orders: expected a tuple of tuples of indices",
    "c.orders = ((0,), (0,))": "config.orders: expected each item once",
    "c.orders = ((1,),)": "config.orders: expected each of 0..0 once",
    "c.seeds = (0, 0)": "config.seeds: expected each item once",
    "c.seeds = ('a',)": "config.seeds: expected a tuple of whole numbers",
    "c.seeds = (True,)": "config.seeds: expected a tuple of whole numbers",
    "c.seeds = (-1,)": "config.seeds: expected 0 to",
    "c.seed = 2**32": "config.seed: expected a whole number of at most 4294967295",
    "c.seed = -1": "config.seed: expected a whole number of at least 0",
    "c.arms = 5": "arms",
    "c.arms.a = 5": "config.arms.a: expected a dict of changes",
    "c.arms.a = dict(nope=1)": "config.arms.a.nope does not exist",
    "c.arms.a = dict(train=5)": "config.arms.a.train: expected a section",
    "c.arms.a = dict(train=dict(lr='x'))": "config.arms.a.train.lr: expected a number",
    "c.arms.a = ConfigDict(dict(stages=('x',)))": "stages",
    "c.arms.a = ConfigDict(dict(tasks=dict(facts=5)))": "tasks.facts: expected a dict of settings",
    "c.arms = ConfigDict({'checkpoints': {}})": "cannot be the name of a folder of runs",
    "c.arms = ConfigDict({'a b': {}})": "cannot be the name of a folder of runs",
    "c.arms = ConfigDict({'a/b': {}})": "cannot be the name of a folder of runs",
    "c.sweep = ConfigDict(dict(train=5))": "config.sweep.train: expected a tuple of values",
    "c.sweep = ConfigDict(dict(train=dict(lr=('x',))))": "config.sweep.train.lr: expected a number",
    "c.sweep = ConfigDict(dict(train=dict(batch=tuple(range(1, 9999)))))": "more than 2000 runs",
    "c.prestage = ConfigDict(dict(nope=1))": "config.prestage.nope does not exist",
    "c.prestage = ConfigDict(dict(stages=()))": "stages",
    "c.expect = (5,)": "config.expect: expected a tuple of dicts",
    "c.expect = (dict(arm='a', metric=5, at_least=0),)": "config.expect[0]: expected arm, metric",
    "c.expect = (dict(arm='a', metric='bwt', at_least=True),)": "config.expect[0]: expected arm",
    "c.expect = (dict(arm='a', metric='bwt', at_least=0, mean='x'),)": "config.expect[0]",
    "c.expect = (dict(arm=(1, 2), metric='bwt', within=0.1),)": "config.expect[0]",
    "c.eval.groups.a = 5": "config.eval.groups.a: expected a tuple of tasks",
    "c.eval.groups.a = (['x'],)": "config.eval.groups.a: expected a tuple of tasks",
    "c.eval.general = (5,)": "config.eval.general: expected a tuple of strings",
    "c.eval.general = ('facts',)": "config.eval.general names 'facts', which a stage trains",
    "c.eval.general = ('nope',)": "no task 'nope'; did you mean 'pope'",
    "c.eval.tasks = 'facts,,facts'": "config.eval.tasks='facts,,facts': expected all, or names",
    "c.eval.templates = ('nope',)": "unknown template 'nope'",
    "c.eval.samples = 10**9; c.eval.temperature = 1.0": "config.eval.samples",
    "c.eval.batch = 10**9": "config.eval.batch: expected a whole number of at most",
    "c.tasks.x = 5": "tasks.x: expected a dict of settings",
    "c.tasks.x = dict()": "tasks.x: give train, test or both",
    "c.tasks.x = dict(task='nope')": "tasks.x.task: no task 'nope'",
    "c.tasks.facts.family = 'nope'": "no family 'nope'",
    "c.tasks.facts.side = 'x'": "expected side=8 to 4096 pixels",
    "c.tasks.facts.side = 10**9": "expected side=8 to 4096 pixels",
    "c.tasks.facts = dict(task='synthetic', family='facts', also=5)": "tasks.facts.also",
    "c.tasks.facts = dict(task='synthetic', family='facts', scorer=5)": "tasks.facts.scorer",
    "c.tasks.facts = dict(task='synthetic', family='facts', reward=5)": "tasks.facts.reward",
    "c.tasks.facts = dict(task='synthetic', family='facts', pixels=5)": "tasks.facts",
    "c.tasks.facts = dict(task='synthetic', family='facts', extraction='x')": "extraction='x'",
    "c.tasks.facts = dict(task='synthetic', family='facts', forced_prefix=5)": "forced_prefix",
    "c.tasks.facts = dict(task='synthetic', family='facts', answer_instruction=5)": "a text",
    "c.method.filter = dict(name='window', samples=2**21, lo=1, hi=8)": "method.filter samples",
    "c.method.filter = 'x'": "method.filter='x': expected None or a dict",
    "c.method.online_filter = dict(lo='x', hi=1, max_refills=1)": "method.online_filter lo=x",
    "c.method.online_filter = dict(lo=0, hi=1, max_refills='x')": "max_refills=x",
    "c.method.refresh = '²'": "method.refresh='²': expected never, epoch",
    "c.method.plugin = 'x'": "method.plugin='x': expected an existing file",
    "c.method.plugin_settings = 5": "method.plugin_settings=5 without method.plugin",
    "c.method.replay.update(name='gold', fraction=float('nan'))": "config.method.replay.fraction",
    "c.method.penalty.update(name='ewc', coef=float('inf'))": "config.method.penalty.coef",
    "c.method.kl_reference = '/etc'": "method.kl_reference='/etc'",
    "c.method.distill.teacher = '/etc'": "method.distill teacher='/etc'",
    "c.method.advantage = 'nope'": "method.advantage='nope'",
    "c.method.truncated = 'nope'": "method.truncated='nope'",
    "c.model.path = '/nope'": "/nope is neither a folder nor a hub id",
    "c.model.preset = 'nope'": "model.preset='nope'",
    "c.model.freeze = ('vision', 'vision')": "config.model.freeze: expected each item once",
    "c.model.lora.rank = 10**9": "config.model.lora.rank: expected a whole number of at most",
    "c.model.lora.update(rank=4, alpha=0.0)": "config.model.lora.alpha",
    "c.model.lora.update(rank=4, alpha=float('nan'))": "config.model.lora.alpha",
    "c.model.lora.targets = ('nope',)": "model.lora.targets=('nope',)",
    "c.model.min_pixels = c.model.max_pixels = 10**9": "config.model.min_pixels",
    "c.model.param_dtype = 'float64'": "model.param_dtype='float64'",
    "c.model.attention = 'nope'": "model.attention='nope'",
    "c.mesh.model = 10**9": "config.mesh.model",
    "c.data.buckets = ('a',)": "config.data.buckets: expected a tuple of whole numbers",
    "c.data.buckets = (10**12,)": "config.data.buckets[0]: expected at most",
    "c.data.prompt_limit = 1": "the largest of them data.prompt_limit=1, got (32,)",
    "c.data.weights = ('a',)": "config.data.weights: expected a tuple of numbers",
    "c.data.root = '/nope'": "data.root='/nope': no such folder",
    "c.data.outside_images = (5,)": "config.data.outside_images: expected a tuple of strings",
    "c.data.outside_images = ('/nope',)": "data.outside_images='/nope': no such folder",
    "c.data.template = '/etc/passwd'": "unknown template '/etc/passwd'",
    "c.data.workers = 10**6": "config.data.workers: expected a whole number of at most 1024",
    "c.data.prefetch = 10**9": "config.data.prefetch: expected a whole number of at most 1024",
    "c.train.lr = float('nan')": "config.train.lr: expected a finite number",
    "c.train.clip = float('nan')": "config.train.clip: expected a finite number",
    "c.train.weight_decay = float('inf')": "config.train.weight_decay: expected a finite number",
    "c.train.batch = 10**9": "config.train.batch: expected a whole number of at most 1048576",
    "c.train.chunk = 10**12": "config.train.chunk: expected a whole number of at most",
    "c.rollout.temperature = float('inf')": "config.rollout.temperature",
    "c.rollout.group = 10**9": "config.rollout.group: expected a whole number of at most",
    "c.rollout.max_new_tokens = 10**9": "config.rollout.max_new_tokens",
    "c.checkpoint.minutes = float('nan')": "config.checkpoint.minutes",
    "c.stuck_minutes = float('nan')": "config.stuck_minutes",
    "c.name = ''": "config.name: expected 1 to 200 characters",
    "c.name = 'x' * 10**6": "config.name: expected 1 to 200 characters",
    "c.name = '\\x1b[31m'": "config.name: expected 1 to 200 characters",
    "c.name = '\\ud800'": "config.name: expected text that can be written",
    "c.rewards.accuracy = float('nan')": "config.rewards.accuracy",
    "c.rewards.timeout = float('inf')": "config.rewards.timeout",
    "c.rewards.processes = 10**6": "config.rewards.processes",
    "c.nope = 1": "config.nope does not exist",
    "c.train.bacth = 4": "config.train.bacth does not exist; did you mean 'batch'",
    "del c.train": "config.train: expected a section (dict), it does not exist",
    "c.unlock(); c.train = ConfigDict(dict(lr=1.0))": "config.train.batch does not exist",
    "c.ignore_type(); c.model = None": "model",
}  # fmt: skip
CONFIG_FILES = {
    "def get_config(:\n": "SyntaxError",
    "": "has no attribute 'get_config'",
    "get_config = 3\n": "not callable",
    "1 / 0\n": "ZeroDivisionError: division by zero (cfg.py, line 1)",
    "def get_config():\n    return get_config()\n": "RecursionError",
    "def get_config():\n    return None\n": "get_config() returns NoneType; expected a ConfigDict",
    "def get_config():\n    return {}\n": "get_config() returns dict; expected a ConfigDict",
    "def get_config(a, b):\n    return 1\n": "missing 2 required positional arguments",
    "import nope_module\n": "No module named 'nope_module'",
    "import sys\nsys.exit(3)\n": "SystemExit: 3 (cfg.py, line 2)",
    "raise KeyboardInterrupt\n": "KeyboardInterrupt (cfg.py, line 1)",
    "raise MemoryError\n": "MemoryError (cfg.py, line 1)",
    "class E(Exception): pass\nraise E('no luck')\n": "E: no luck (cfg.py, line 2)",
    "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n":
        "config.arms: expected a section (dict), it does not exist; start from get_config()",
    "\0\1": "SyntaxError",
}  # fmt: skip


def config_case(line: str, error: str, command: str = "train") -> Case:
    def prepare(folder: Path) -> list[str]:
        path = folder / "cfg.py"
        path.write_text(CONFIG.format(line), "utf-8", "surrogatepass")
        workdir = [f"--workdir={folder / 'run'}"] if command == "train" else []
        return [command, f"--config={path}", *workdir]

    return Case(line, prepare, error)


def config_file_case(text: str, error: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / "cfg.py").write_text(text)
        return ["train", f"--config={folder / 'cfg.py'}", f"--workdir={folder / 'run'}"]

    return Case(f"config file {text!r}", prepare, error)


# ---- rows ----------------------------------------------------------------------------------------

GOOD = '{"prompt": "say 1", "answer": "1"}\n{"prompt": "say 2", "answer": "2"}\n'
DEEP = "[" * 100_000 + "]" * 100_000
ROW_FILES = {  # (name, content): a part of the error
    ("rows.jsonl", b"\0\1\xff"): "not JSON in UTF-8",
    ("rows.jsonl", ""): "no rows for train",
    ("rows.jsonl", DEEP): "nested deeper than 100 levels",
    ("rows.json", DEEP): "nested deeper than 100 levels",
    ("rows.jsonl", '{"a":' * 100_000 + "1" + "}" * 100_000): "nested deeper than 100 levels",
    ("rows.jsonl", '{"prompt": "a", "answer": ' + "[" * 300 + "]" * 300 + "}"): "nested deeper",
    ("rows.csv", f'prompt,images,answer\n<image>a,"{DEEP}",1\n'): "nested deeper",
    ("rows.jsonl", '{"prompt": "a\\ud800", "answer": "1"}'): "half of a surrogate pair",
    ("rows.jsonl", '{"prompt": "a", "answer": "\\udfff"}'): "half of a surrogate pair",
    ("rows.jsonl", b'{"prompt": "\xed\xa0\x80", "answer": "1"}'): "not JSON in UTF-8",
    ("rows.jsonl", '{"prompt": "a", "answer": 1e999}'): "the answer is an infinite number",
    ("rows.jsonl", '{"prompt": "a", "answer": NaN}'): "the answer is empty",
    ("rows.jsonl", '{"prompt": "a", "answer": ' + "9" * 5000 + "}"): "rows.jsonl:1",
    ("rows.jsonl", '{"prompt": "a", "prompt": "b", "answer": 1}'): "'prompt' is given twice",
    ("rows.csv", "prompt,answer,answer\na,1,2\n"): "the header names 'answer' twice",
    ("rows.csv", "prompt,answer\na\n"): "fewer fields than the header's 2",
    ("rows.csv", 'prompt,answer\n"a,1\n'): "not comma-separated values",
    ("rows.csv", "prompt,answer\na,1\n".encode("utf-16")): "not UTF-8",
    ("rows.json", "[" + GOOD): "not JSON",
    ("rows.json", "5"): "expected a list of objects",
    ("rows.parquet", b"PAR1 no parquet"): "not a parquet file with rows",
    ("rows.jsonl", '{"promt": "a", "answer": "1"}'): "no column 'prompt'; did you mean 'promt'",
    ("rows.jsonl", '{"prompt": ["a"], "answer": "1"}'): "expected text, got list",
    ("rows.jsonl", '{"prompt": true, "answer": "1"}'): "expected text, got bool",
    ("rows.jsonl", '{"prompt": "a", "answer": "1", "id": [1]}'): "the id: expected text",
    ("rows.jsonl", GOOD + "[1]\n"): "rows.jsonl:3: expected an object",
    ("rows.jsonl", '{"prompt": "a <|im_end|>", "answer": "1"}'): "contains <|im_end|>",
    ("rows.jsonl", json.dumps({"prompt": "a" * 10**7, "answer": "1"})): "characters are over the limit",
    ("rows.jsonl", '{"prompt": "<image>a", "answer": "1"}'): "1 <image> in the prompt but 0",
}  # fmt: skip
MESSAGES = {
    "5": "messages: expected a list of turns",
    '[{"role": ["user"], "content": "a"}]': "messages: expected the role system",
    '[{"role": {}, "content": "a"}]': "messages: expected the role system",
    '[{"role": "user", "content": 5}]': "messages: expected text or a list of parts",
    '[{"role": "user", "content": [5]}]': "messages: expected a part of type text",
    '[{"role": "user", "content": [{"type": ["text"]}]}]': "messages: expected a part of type text",
    '[{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]': "expected text, got dict",
    '[{"role": "user", "content": [{"type": "image", "image": 5}]}]': "expected a path, bytes",
    '[{"role": "assistant", "content": "a"}]': "expected a conversation that ends with a user's",
    '[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}]':
        "expected only text in the last response",
}  # fmt: skip
TASK_SETTINGS = {
    "columns=5": "tasks.mine.columns: expected a dict of names of columns",
    "columns=dict(prompt=5)": "tasks.mine.columns: expected a dict of names of columns",
    "prompt=5": "tasks.mine.prompt: expected a text",
    "limit='x'": "tasks.mine.limit: expected rows >= 1",
    "limit=True": "tasks.mine.limit: expected rows >= 1",
    "image_root=5": "tasks.mine.image_root: expected a folder",
    "image_root='/nope'": "tasks.mine.image_root: expected a folder",
    "template=5": "tasks.mine.template: expected a text",
    "scorer='nope'": "unknown scorer 'nope'",
    "reward='/nope.py:f'": "no file /nope.py",
    "also=(5,)": "tasks.mine.also: expected scorers",
    "test=['a']": "tasks.mine.test: expected a file",
    "test=float('nan')": "config.tasks.mine.test: expected a finite number",
    "train='/dev/zero'": "/dev/zero: no such file or folder",
    "train='a\\0b.jsonl'": "expected text that can be written",
    "nope=1": "tasks.mine: unknown setting 'nope'",
}


def rows_case(name: str, content: str | bytes, error: str, settings: str = "") -> Case:
    """A check of a user's task with these rows, and further settings of the task."""

    def prepare(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        (folder / "good.jsonl").write_text(GOOD)
        files = f"train={str(folder / name)!r}, test={str(folder / 'good.jsonl')!r}"
        task = f"c.tasks.mine = dict({files}) | dict({settings.format(folder=folder)})"
        line = f"{task}; c.stages = (dict(task='mine', steps=1),)"
        return config_case(line, error, "check").prepare(folder)

    return Case(f"{name} {content[:60]!r} {settings}", prepare, error)


# ---- images --------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes."""
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


IMAGES = [  # how the row names it, content of a.png, a part of the error
    ("a.png", b"", "not an image that can be read"),
    ("a.png", png(32, 32)[:-20], "cut short or corrupt"),
    ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
    ("a.png", png_header(60_000, 60_000), "more than the 89478485 pixels allowed"),
    ("a.png", png_header(2**31 - 1, 2**31 - 1), "a.png"),
    ("a.png", png(1, 1000), "is too narrow"),
    ("../../../../../../etc/hostname", b"", "outside of the folder of the data"),
    ("/etc/passwd", b"", "outside of the folder of the data"),
    ("file:///etc/passwd", b"", "outside of the folder of the data"),
    ("http://127.0.0.1/a.png", b"", "addresses are not fetched"),
    ("/dev/zero", b"", "no such file"),
    (".", b"", "a folder, not a file"),
    ("data:image/png;base64,aGVsbG8=", b"", "not an image that can be read"),
    ("x" * 5000, b"", "File name too long"),
    (5, b"", "expected a path, bytes"),
    ({"bytes": "abc"}, b"", "an image: expected bytes"),
    ({"bytes": 5}, b"", "an image: expected bytes"),
    ({"path": [1]}, b"", "expected a path, bytes"),
    ("[" * 5000, b"", "nested deeper"),
]  # fmt: skip


def image_case(source: object, content: bytes, error: str) -> Case:
    row = json.dumps({"prompt": "<image>x", "images": source, "answer": "1"})
    case = rows_case("rows.jsonl", row, error)

    def prepare(folder: Path) -> list[str]:
        (folder / "a.png").write_bytes(content)
        return case.prepare(folder)

    return Case(f"image {str(source)[:40]} {content[:20]!r}", prepare, error)


# ---- templates -----------------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}"
TEMPLATES = {
    "{{": "line 1",
    "{{ nope }}": "'nope' is undefined; the row has content",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% include '/etc/passwd' %}": "template t.jinja",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
    "": "gives an empty prompt",
    "{{ content | nope }}": "No filter named 'nope'",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 9**(9**(9**9)) }}": "no result within",
    "{{ 'x' * 10**11 }}": "simplify",
    LOOP + "{{ 'x' * 9999 }}" + "{% endfor %}": "simplify",
    LOOP * 3 + "{% endfor %}" * 3: "no result within",
    "{% set n = namespace(x='ab') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}": "simplify",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deep",
    "{% set forced_prefix = 'x' * 10**11 %}{{ content }}": "expected a constant text",
    "{% set extract = 'nope' %}{{ content }}": "extract: expected",
    "{{ '\\ud800' }}": "half of a surrogate pair",
    "{{ content }}<|im_end|>": "contains <|im_end|>",
}


def template_case(text: str, error: str) -> Case:
    case = rows_case("rows.jsonl", GOOD, error, "template='{folder}/t.jinja'")

    def prepare(folder: Path) -> list[str]:
        (folder / "t.jinja").write_text(text)
        return case.prepare(folder)

    return Case(f"template {text[:80]}", prepare, error)


# ---- rewards, scorers and plugins ----------------------------------------------------------------

CODE = {  # (setting, content of r.py)
    ("reward", "x = 1"): "no function 'reward'",
    ("reward", "def reward(:"): "SyntaxError",
    ("reward", "import sys; sys.exit(0)"): "SystemExit",
    ("reward", "import os; os._exit(0)"): "its process died",
    ("reward", "1 / 0"): "ZeroDivisionError: division by zero (r.py, line 1)",
    ("scorer", "reward = 5"): "no function 'reward'",
    ("scorer", "import nope_module"): "No module named 'nope_module'",
}
PLUGINS = {
    "class X(:": "the file raises SyntaxError",
    "import sys; sys.exit(1)": "the file raises SystemExit",
    "X = 5": "expected a frozen dataclass",
    "@dataclasses.dataclass(frozen=True)\nclass X(cptjax.ContinualMethod):\n    name = 'x'\n"
    "    def __post_init__(self):\n        1 / 0\n": "ZeroDivisionError: division by zero (r.py",
    "@dataclasses.dataclass(frozen=True)\nclass X(cptjax.ContinualMethod):\n    name = 'x'\n"
    "    def check(self, config):\n        raise TypeError('no')\n": "TypeError: no (r.py",
}


def code_case(setting: str, code: str, error: str) -> Case:
    case = rows_case("rows.jsonl", GOOD, error, f"{setting}='{{folder}}/r.py:reward'")

    def prepare(folder: Path) -> list[str]:
        (folder / "r.py").write_text(code)
        return case.prepare(folder)

    return Case(f"{setting} {code}", prepare, error)


def plugin_case(code: str, error: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / "r.py").write_text(f"import dataclasses, cptjax\n{code}")
        line = f"c.method.plugin = {str(folder / 'r.py') + ':X'!r}"
        return config_case(line, error).prepare(folder)

    return Case(f"plugin {code[-60:]!r}", prepare, error)


# ---- model folders -------------------------------------------------------------------------------

WEIGHTS, INDEX, CHAT = "model.safetensors", "model.safetensors.index.json", "chat_template.jinja"
MODEL_FILES = {  # (file, content): a part of the error
    ("config.json", ""): "config.json: expected JSON",
    ("config.json", DEEP): "config.json: expected JSON (nested deeper",
    ("config.json", "[]"): "config.json: expected an object",
    ("config.json", "{}"): "config.json has model_type=None",
    ("config.json", b"\xff\xfe"): "config.json: expected JSON",
    ("config.json", '{"model_type": ["llama"]}'): "config.json has model_type=['llama']",
    ("config.json", '{"model_type": "gpt2", "auto_map": {"AutoConfig": "evil.C"}}'): "'gpt2'",
    ("generation_config.json", "5"): "generation_config.json: expected an object",
    ("tokenizer.json", "{}"): "tokenizer",
    ("tokenizer.json", DEEP): "tokenizer",
    ("tokenizer_config.json", "[]"): "tokenizer",
    ("preprocessor_config.json", "[]"): "preprocessor_config.json: expected an object",
    ("preprocessor_config.json", '{"size": 5}'): "preprocessor_config.json",
    (WEIGHTS, b""): "is truncated or not a safetensors file",
    (WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"): "is truncated or not a safetensors file",
    (WEIGHTS, (200_000).to_bytes(8, "little") + DEEP.encode()): "not a safetensors file",
    (INDEX, "[]"): "is not a safetensors index",
    (INDEX, DEEP): "is not a safetensors index",
    (INDEX, '{"weight_map": {"a": "../../etc/passwd"}}'): "names ../../etc/passwd",
    (INDEX, '{"weight_map": {"a": "/etc/passwd"}}'): "names /etc/passwd",
    (INDEX, '{"weight_map": {"a": [1]}}'): "is not a safetensors index",
    (CHAT, "{{"): "chat template",
    (CHAT, "{{ ''.__class__.__mro__[1].__subclasses__() }}"): "chat template",
    (CHAT, "{{ raise_exception('no') }}"): "chat template",
    (CHAT, "hello"): "chat template",
    (CHAT, LOOP * 3 + "{% endfor %}" * 3): "no result within",
    (CHAT, "{{ 'x' * 10**11 }}"): "simplify",
}  # fmt: skip
MODEL_KEYS = {  # a value of config.json
    ("num_hidden_layers", -1): "depth=-1",
    ("num_hidden_layers", "x"): "config.json",
    ("num_attention_heads", 0): "num_attention_heads=0",
    ("hidden_size", "64"): "hidden_size=",
    ("vocab_size", 10**12): "vocab=1000000000000",
    ("eos_token_id", 10**9): "names the token 1000000000",
    ("rope_scaling", 5): "config.json",
    ("text_config", 5): "config.json",
}


def model_case(name: str, edit: Callable[[Path], object], error: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        shutil.copytree(folder.parent / "model", folder / "m")
        edit(folder / "m")
        return ["sample", f"--model={folder / 'm'}", "--prompt=a", "--max_new_tokens=2"]

    return Case(f"model {name}", prepare, error)


def write_edit(file: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()

    def edit(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(raw)

    return edit


def key_edit(key: str, value: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        values.setdefault("text_config", {})
        if isinstance(values["text_config"], dict):
            values["text_config"].pop(key, None)
        path.write_text(json.dumps(values | {key: value}))

    return edit


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def pipe_edit(file: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return edit


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


# ---- workdirs ------------------------------------------------------------------------------------

WORKDIR_FILES = {  # (command, file, content): a part of the error
    ("report", "config.json", "[]"): "config.json: expected an object {...}, got list",
    ("report", "config.json", '{"stages": 5}'): "expected a run's config with stages",
    ("report", "config.json", '{"stages": [{"task": "facts", "steps": 1}], "eval": "x"}'): "the result files in",
    ("report", "evals.csv", b"\xff\xfe\0"): "evals.csv: not a CSV file in UTF-8",
    ("report", "evals.csv", "a,b\n1,2\n"): "evals.csv: columns",
    ("report", "metrics.jsonl", "[1]\n"): "metrics.jsonl: expected one JSON object per line",
    ("report", "metrics.jsonl", DEEP + "\n"): "metrics.jsonl: expected one JSON object per line",
    ("report", "metrics.jsonl", '{"step": 1}\n'): "the result files in",
    ("report", "metrics.jsonl", '{"stage": [1], "step": {}}\n'): "the result files in",
    ("report", "predictions/stage1.jsonl", "5\n"): "expected one JSON object per line",
    ("report", "predictions/stage1.jsonl", '{"score": "x", "task": [1]}\n'): "the result files in",
    ("report", "rollouts/stage1.jsonl", "[[1]]\n"): "expected one JSON object per line",
    ("report", "runs.json", "[5]"): "runs.json: expected names of sub-folders",
    ("report", "runs.json", '["../../x"]'): "runs.json: expected names of sub-folders",
    ("report", "versions.json", "[]"): "versions.json: expected an object",
    ("sample", "config.json", '{"stages": []}'): "config.arms: expected a section",
    ("sample", "config.json", "\0"): "config.json",
    ("train", "config.json", "[]"): "config.json: expected an object",
    ("train", "config.json", DEEP): "config.json: expected JSON (nested deeper",
    ("train", "inputs.json", "{}"): "inputs.json",
    ("train", "versions.json", '{"starts": 5}'): "versions.json: expected a list of starts",
    ("evaluate", "config.json", "[]"): "config.json: expected an object {...}, got list",
    ("convert", "config.json", '{"stages": []}'): "config.arms: expected a section",
}  # fmt: skip


def workdir_case(command: str, file: str, content: str | bytes, error: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        shutil.copytree(folder.parent / "run", folder / "run")
        write_edit(file, content)(folder / "run")
        (folder / "cfg.py").write_text(CONFIG.format("pass"))
        config, run = f"--config={folder / 'cfg.py'}", folder / "run"
        return {
            "report": ["report", str(run)],
            "sample": ["sample", f"--model={run}", "--prompt=a"],
            "train": ["train", config, f"--workdir={run}"],
            "evaluate": ["evaluate", config, f"--workdir={run}"],
            "convert": ["convert", f"--workdir={run}", f"--dst={folder / 'dst'}"],
        }[command]

    return Case(f"{command} {file} {str(content)[:50]}", prepare, error)


# ---- flags ---------------------------------------------------------------------------------------

FLAGS = {  # {config}, {run}, {model}, {here} are paths
    "train --config={config}": "--workdir: expected a value, got none",
    "train --workdir={here}/r": "--config is missing",
    "train --config={config} --workdir=": "--workdir is empty",
    "train --config={config} --workdir=/dev/null": "/dev/null",
    "train --config={config} --workdir={here}/r --only=nope": "--only=nope: no run",
    "train --config={config} --workdir={here}/r --config.orders=(0,1)": "config.orders",
    "train --config={config} --workdir={here}/r --config.seeds=a,b": "config.seeds",
    "train --config={config} --workdir={here}/r --config.stages[5].steps=1": "there are 1 stages",
    "train --config={config} --workdir={here}/r --config.stages[0].train.lr=x": "lr=x",
    "train --config={config} --workdir={here}/r --config.train=5": "config.train",
    "train --config={config} --workdir={here}/r --config.train.bacth=5": "did you mean",
    "train --config={config} --workdir={here}/r --config.seed=99999999999999999999": "config.seed",
    "train --config={here}/none.py --workdir={here}/r": "none.py",
    "check --config={config} --rows=0": "--rows=0: expected a number of rows",
    "check --config=configs/cpt7.py:gpro,7b": "gpro",
    "evaluate --config={config} --workdir={here}/none": "expected the workdir of a run",
    "evaluate --config={config} --workdir={run} --stage=9": "stage",
    "evaluate --config={config} --workdir={run} --tasks=nope": "nope",
    "generate --config={config} --workdir={run} --task=facts --out=x.txt": "ends with .jsonl",
    "generate --config={config} --workdir={run} --task=nope --out={here}/o.jsonl": "no task 'nope'",
    "convert --src={model}": "expected --dst",
    "convert --src=/etc --dst={here}/c": "/etc/config.json does not exist",
    "convert --src={model} --dst={model}": "exists already",
    "convert --checkpoint={model} --dst={here}/c": "expected an Orbax checkpoint",
    "sample --model=nope --prompt=x": "nope is neither a folder nor a hub id",
    "sample --model=tiny --prompt=x --n=0": "n=0",
    "sample --model={model} --prompt=x --n=1000000": "n=1000000",
    "sample --model={model} --prompt=x --seed=99999999999999999999999": "seed=",
    "sample --model={model} --prompt=x --seed=-1": "seed=-1",
    "sample --model={model} --prompt=x --temperature=nan": "temperature",
    "sample --model={model} --prompt=x --image=/dev/zero": "no such file",
    "sample --model={model} --prompt=\udcff": "half of a surrogate pair",
    "sample --model={model} --prompt=<|im_end|>": "contains <|im_end|>",
    "report /etc": "/etc is not a run",
    "report {run} --sort=nope": "sort='nope' is no metric",
    "report {run} --out=/dev/null/x.html": "/dev/null",
    "report": "the following arguments are required: DIR",
    "analyze drift /etc": "/etc is not a run",
    "analyze influence {model}": "config.arms: expected a section",
    "analyze nope": "invalid choice: 'nope'",
    "plan --config={config} --topology=v5e:axb": "v5e:axb",
    "bench --size=nope": "--size=nope: expected one of",
    "bench --phases=nope": "--phases=nope: expected some of",
    "bench --rows=base": "--rows: not a flag of the phases",
    "bench --suite --new=3": "--new: not a flag of --suite",
    "bench --check --repeat=3": "--repeat: not a flag of --check",
    "bench --suite --rows=nope": "--rows=nope: expected some of base",
}


def flags_case(line: str, error: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / "cfg.py").write_text(CONFIG.format("pass"))
        paths = {name: folder.parent / name for name in ("run", "model")}
        paths |= {"config": folder / "cfg.py", "here": folder}
        return [word.format(**paths) for word in line.split()]

    return Case(line, prepare, error)


CASES = [
    *(config_case(line, error) for line, error in CONFIGS.items()),
    *(config_file_case(text, error) for text, error in CONFIG_FILES.items()),
    *(rows_case(*key, error) for key, error in ROW_FILES.items()),
    *(rows_case("rows.jsonl", f'{{"messages": {m}, "answer": "1"}}', e) for m, e in MESSAGES.items()),
    *(rows_case("rows.jsonl", GOOD, error, s) for s, error in TASK_SETTINGS.items()),
    *(image_case(*row) for row in IMAGES),
    *(template_case(text, error) for text, error in TEMPLATES.items()),
    *(code_case(*key, error) for key, error in CODE.items()),
    *(plugin_case(code, error) for code, error in PLUGINS.items()),
    *(model_case(f"{f} {str(c)[:50]}", write_edit(f, c), e) for (f, c), e in MODEL_FILES.items()),
    *(model_case(f"{k}={v}", key_edit(k, v), e) for (k, v), e in MODEL_KEYS.items()),
    model_case("pickle", only_pickle, "only pickled weights"),
    model_case("cut weights", truncate_weights, "is truncated"),
    model_case("weights pipe", pipe_edit(WEIGHTS), "expected a file"),
    model_case("tokenizer pipe", pipe_edit("tokenizer.json"), "expected a file"),
    *(workdir_case(*key, error) for key, error in WORKDIR_FILES.items()),
    *(flags_case(line, error) for line, error in FLAGS.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of all cases, in order; the folders of a good model and a good run are shared."""
    from cptjax import api

    folder = tmp_path_factory.mktemp("wrong")
    api.save(api.load("tiny", dtype="float32"), folder / "model")
    (folder / "cfg.py").write_text(CONFIG.format("pass"))
    good = ["train", f"--config={folder / 'cfg.py'}", f"--workdir={folder / 'run'}"]
    with launcher_forks.start_launcher(run_helpers.ROOT) as run_commands:
        (made,) = run_commands([good])
        assert made["code"] == 0, made["said"]
        commands = []
        for number, case in enumerate(CASES):
            (folder / str(number)).mkdir()
            commands.append(case.prepare(folder / str(number)))
        return run_commands(commands)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name[:100] for case in CASES])
def test_wrong_input_is_one_line_and_exit_code_2(results, number):
    result, expected = results[number], CASES[number].error
    said = [line for line in result["said"].splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    assert result["code"] == 2 and "Traceback" not in result["said"], result["said"][-3000:]
    assert len(errors) == 1 and said[-1] == errors[0], said
    assert expected in errors[0] and "error: unexpected" not in errors[0]
    assert result["seconds"] < SECONDS


def test_there_are_many_cases_of_different_names():
    assert len(CASES) == len({case.name for case in CASES}) >= 250
