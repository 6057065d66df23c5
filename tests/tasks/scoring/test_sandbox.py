"""Worker processes under hangs, crashes and noise."""

import subprocess
import sys
import time

import pytest

from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(processes=1, timeout=20.0) as workers:
        yield workers


USER = """
import os, sys, time
def good(prediction, answer, **columns): return float(prediction == answer) + len(columns)
def few(prediction, answer, weight): return weight
def python_loop(prediction, answer):
    while prediction == "hang": pass
    return 1.0
def c_loop(prediction, answer): return float(len(str(9 ** 9 ** 9)))
def dies(prediction, answer): os._exit(3)
def aborts(prediction, answer): os.abort()
def leaves(prediction, answer): sys.exit(1)
def prints(prediction, answer):
    print("noise", flush=True)
    return 1.0
def numpy_like(prediction, answer):
    import numpy
    return numpy.float32(0.5)
def makes_child(prediction, answer):
    if os.fork() == 0: time.sleep(30)
    time.sleep(30)
def forks(prediction, answer):
    os.fork()
    return float(prediction)
def speaks(prediction, answer):
    if prediction == "1":
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                try: os.write(number, b"[99, 1.0, null]\\n")
                except OSError: pass
    return float(prediction)
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(USER)
    return path


def ask(workers, user, function, *predictions, **columns):
    return workers.map(f"{user}:{function}", [SandboxCall((p, "a"), columns) for p in predictions])


def test_pool_survives_hangs_and_crashes_in_order(user):
    with SandboxPool(processes=2, timeout=0.6) as workers:
        assert [o.value for o in ask(workers, user, "good", "a", "b", x=1)] == [2.0, 1.0]
        mixed = ask(workers, user, "python_loop", "hang", "a", "b")
        assert [o.value for o in mixed] == [None, 1.0, 1.0] and mixed[0].late
        assert ask(workers, user, "c_loop", "a")[0].late
        assert "exit code 3" in ask(workers, user, "dies", "a")[0].error
        assert "SIGABRT" in ask(workers, user, "aborts", "a")[0].error
        assert "SystemExit" in ask(workers, user, "leaves", "a")[0].error
        start = time.perf_counter()
        assert ask(workers, user, "makes_child", "a")[0].late  # its child holds the pipes as well
        assert time.perf_counter() - start < 5.0
        assert [o.value for o in ask(workers, user, "good", "a")] == [1.0]


def test_workers_end_with_the_pool(user):
    workers = SandboxPool(processes=1, timeout=5.0)
    ask(workers, user, "good", "a")
    process = workers._workers[0].process
    workers.close()
    assert process.poll() is not None


def test_functions_see_the_columns_they_can_take(user, pool):
    assert ask(pool, user, "few", "a", weight=0.25, other=1)[0].value == 0.25
    assert ask(pool, user, "numpy_like", "a")[0].value == 0.5
    assert ask(pool, user, "prints", "a")[0].value == 1.0
    assert (
        "missing 1 required positional argument: 'weight'" in ask(pool, user, "few", "a")[0].error
    )
    assert "cannot be sent" in ask(pool, user, "good", "a", f=lambda: 0)[0].error


def test_neither_the_package_nor_a_worker_imports_jax(user, tmp_path):
    body = "import sys\ndef spy(prediction, answer): return float('jax' in sys.modules or 'cptjax' in sys.modules)"
    (tmp_path / "spy.py").write_text(body)
    code = (
        "import sys, cptjax.tasks.scoring.scorers, cptjax.tasks.rewards, cptjax.tasks.prompt_templates as t; t.load_template('cot')\n"
        "from cptjax.tasks.scoring.sandbox import SandboxPool as Pool, SandboxCall as Call\n"
        f"p = Pool(1); print(p.map({str(tmp_path / 'spy.py') + ':spy'!r}, [Call(('a', 'a'))])[0].value, 'jax.numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0.0", "False"], out.stdout + out.stderr


def test_importing_a_slow_file_is_not_under_the_limit_of_a_call(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ntime.sleep(0.8)\ndef f(prediction, answer):\n    while prediction == 'hang': pass\n    return 1.0\n"
    )
    with SandboxPool(processes=1, timeout=0.5) as workers:
        outcomes = ask(
            workers, tmp_path / "slow.py", "f", "a", "hang", "a"
        )  # the replacement imports it again
    assert [o.value for o in outcomes] == [1.0, None, 1.0]


def test_a_function_whose_child_returns_does_not_shift_the_following_answers(user, pool):
    answers = ask(pool, user, "forks", *map(str, range(8)))
    assert [answer.value for answer in answers] == [float(i) for i in range(8)]


def test_an_answer_to_another_call_is_refused(user, pool):
    answers = ask(pool, user, "speaks", "1", "2", "3")
    assert "answered call 99 instead of" in answers[0].error
    assert [answer.value for answer in answers[1:]] == [2.0, 3.0]
