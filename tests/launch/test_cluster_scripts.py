"""Scripts that start runs on clusters: every host gets the same code and arguments, lost ones restart.

The commands of the clusters are programs that only record their arguments.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ARGUMENTS = ["--config.seeds=(0,1)", "--workdir=/shared/my runs", "--config.name=$(hostname)"]
CREATE = ["--zone=us-east5-a", "--type=v5litepod-64", "--spot"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert not done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path):
    """A repository of its own with the scripts, and a folder of programs that come first in PATH."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "launch").mkdir()
    for script in ("slurm.sh", "tpu_pod.sh", "tpu_worker.sh"):
        shutil.copy(LAUNCH / script, tmp_path / "launch")
    (tmp_path / "launch" / "env.sh").write_text(
        'mkdir -p "$VENV/bin"; echo PATH="$PROGRAMS:$PATH" > "$VENV/bin/activate"\n'
    )
    (tmp_path / "setup.py").touch()
    for command in (
        ("init", "-q"),
        ("add", "launch", "setup.py"),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"),
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def write_program(repository, name, text):
    path = repository / "programs" / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def call(repository, script, *arguments, **variables):
    programs = repository / "programs"
    return subprocess.run(
        ["bash", str(repository / "launch" / script), *arguments],
        cwd=repository,
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "PROGRAMS": str(programs)}
        | {"POLL_SECONDS": "0", "VENV": str(repository / "venv"), "LOG": str(repository / "log")}
        | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- SLURM ---------------------------------------------------------------------------------------


def run_slurm(repository, code=0, listed=(), **variables):
    """Run slurm.sh as a job; return its exit code, errors and the commands that it called."""
    record = 'printf "%s\\n" "$(basename "$0") $CPTJAX_DISTRIBUTED $(printf "%q " "$@")" >> "$LOG"'
    write_program(repository, "srun", f"{record}; exit {code}")
    write_program(repository, "scontrol", record)
    write_program(repository, "python", f"printf '%s\\n' {shlex.join(listed)}" if listed else ":")
    done = call(repository, "slurm.sh", *ARGUMENTS, SLURM_JOB_ID="7", **variables)
    log = repository / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stderr, [shlex.split(line) for line in lines]


def test_slurm_starts_a_process_per_node_and_ends_all_if_one_fails(repository):
    code, _, lines = run_slurm(repository, 1, SLURM_CPUS_PER_TASK="32")
    command = ["python", "launch/train.py", "--fail_on_sigterm", *ARGUMENTS]
    assert lines == [["srun", "1", "--kill-on-bad-exit=1", "--cpus-per-task=32", *command]]
    assert code == 1
    text = (LAUNCH / "slurm.sh").read_text()
    for option in ("ntasks-per-node=1", "signal=TERM@120", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in text


def test_slurm_queues_a_job_again_only_after_sigterm(repository):
    *_, lines = run_slurm(repository, 143)
    assert lines[1:] == [["scontrol", "requeue", "7"]]
    # The last task of an array has the array's id, which would stand for all of its tasks.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    *_, lines = run_slurm(repository, 143, ("sft",), **array)
    assert lines[-1] == ["scontrol", "requeue", "7_0"]


def test_a_task_of_a_slurm_array_runs_one_arm_and_seed(repository):
    listed = ("sft/seed0", "grpo+lr=1e-06/seed0")
    *_, lines = run_slurm(repository, 0, listed, SLURM_ARRAY_TASK_ID="1")
    assert lines[0][-len(ARGUMENTS) - 1 :] == [*ARGUMENTS, f"--only={listed[1]}"]
    code, error, lines = run_slurm(repository, 0, listed, SLURM_ARRAY_TASK_ID="2")
    assert code == 2 and "got task 2, but the config has 2 arms" in error and len(lines) == 1


def test_a_task_of_a_slurm_array_with_a_wrong_flag_ends_with_the_error_of_train(repository):
    write_program(repository, "python", "echo 'error: a wrong flag' >&2; exit 2")
    done = call(repository, "slurm.sh", *ARGUMENTS, SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 2 and done.stderr == "error: a wrong flag\n"


def test_train_lists_the_parts_of_a_config_and_fails_on_sigterm_where_it_is_asked_to():
    script = """
import sys, types
from cptjax.common import signals
def run(*_): raise signals.Preempted
sys.modules["cptjax.continual.driver"] = types.SimpleNamespace(run=run)
import cptjax.continual as package; package.driver = sys.modules["cptjax.continual.driver"]
import runpy; runpy.run_path("launch/train.py", run_name="__main__")
"""
    command = [sys.executable, "-c", script, "--config=configs/demo.py", "--workdir=unused"]
    started = [
        subprocess.Popen(
            [*command, *more],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for more in (["--fail_on_sigterm"], ["--list", "--config.seeds=0,1", "--only=sft*"])
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [143, 0]
    listed = [f"{arm}/seed{seed}" for arm in ("sft_bare", "sft_style") for seed in (0, 1)]
    assert outputs[1].split() == listed


@pytest.mark.parametrize("python", ["/nowhere/python3", "false"])
def test_an_interpreter_that_is_missing_or_too_old_is_refused_in_one_line(tmp_path, python):
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "env.sh", tmp_path / "launch")
    done = subprocess.run(
        ["bash", "-c", "source launch/env.sh"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    expected = f"expected Python 3.11 or newer, got none of: {python}; set PYTHON=...\n"
    assert done.stderr == expected


# ---- TPU slices ----------------------------------------------------------------------------------


def gcloud_lines(text):
    return [shlex.split(line)[4:] for line in text.splitlines() if line.startswith("gcloud")]


def test_a_dry_run_prints_every_command_and_gives_all_hosts_the_same_commit(repository):
    write_program(repository, "gcloud", "exit 9")  # must not be called
    done = call(repository, "tpu_pod.sh", "run", "s", *CREATE, "--dry-run", "--", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=repository, text=True)
    archives = [line for line in done.stdout.splitlines() if line.startswith("git archive")]
    assert len(archives) == 1 and archives[0].endswith(commit.strip())
    lines = gcloud_lines(done.stdout)
    assert all("s" in line or any(a.startswith("s:") for a in line) for line in lines)
    assert all("--zone=us-east5-a" in line for line in lines)
    verbs = [line[0] for line in lines]
    assert verbs == ["describe", "delete", "create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh"]
    create, copy = lines[2], lines[4]
    assert {"--spot", "--node-id=s", "--accelerator-type=v5litepod-64"} <= {*create}
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create and "--force" in lines[1]
    assert any(a.endswith("/code.tar.gz") for a in copy) and "s:cptjax_run" in copy
    for line, act in zip(lines[3:7], ("mkdir", "", "install", "start"), strict=True):
        assert {"--worker=all", "--node=all"} <= {*line} and act in line[-1]
    assert "--worker=0" in lines[7] and lines[7][-1].endswith("tpu_worker.sh follow")
    assert not (repository / ".tpu_pod").exists()
    two = call(repository, "tpu_pod.sh", "create", "s", *CREATE, "--slices=2", "--dry-run").stdout
    assert {"--node-count=2", "--node-prefix=s"} <= {*gcloud_lines(two)[0]}


# Answers from files with a line for each call; the last line is repeated.
GCLOUD = """
printf '%q ' gcloud "$@" >> "$LOG"; echo >> "$LOG"
answer() {
  sed -n 1p "$ANSWERS/$1"
  [ "$(wc -l < "$ANSWERS/$1")" = 1 ] || sed -i 1d "$ANSWERS/$1"
}
case "$*" in
  *queued-resources\\ describe*)
    state=$(answer queued)
    if [ "$state" = NOT_FOUND ]; then echo "$state" >&2; exit 1; fi
    echo "$state" ;;
  *tpu-vm\\ describe*) answer node ;;
  *tpu_worker.sh\\ status) answer status ;;
  *tpu_worker.sh\\ start) exit "$(answer start)" ;;
  *\\ scp\\ *)
    for file in "$@"; do
      case $file in */arguments | */environment) cp "$file" "$ANSWERS" ;; esac
    done ;;
esac
"""


def run_pod(repository, *arguments, **answers):
    """Run tpu_pod.sh with a gcloud that gives these answers; return it and the called verbs."""
    folder = repository / "answers"
    folder.mkdir(exist_ok=True)
    for name, lines in {"node": ["READY"], "start": ["0"], **answers}.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    write_program(repository, "gcloud", GCLOUD)
    (repository / "log").write_text("")
    done = call(repository, "tpu_pod.sh", *arguments, ANSWERS=str(folder), TOKEN="a b'c")
    verbs = []
    for line in gcloud_lines((repository / "log").read_text()):
        verbs.append(line[-1].split()[-1] if "tpu_worker" in line[-1] else line[0])
    return done, [verb for verb in verbs if verb not in ("describe", "status", "s")]


ENDED = ["ended 1", "ended 0"]
ATTEMPT = ["ssh", "scp", "install", "start", "follow"]


def test_a_preempted_slice_is_requested_again_and_the_run_continues(repository):
    done, verbs = run_pod(
        repository, "run", "s", *CREATE, "--env=TOKEN", "--", *ARGUMENTS,
        queued=["WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "SUSPENDED", "NOT_FOUND", "ACTIVE"],
        start=["0", "1", "0"],  # the new hosts have nothing yet
        status=["", "", "ended 0"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert verbs == [*ATTEMPT, "delete", "create", "start", *ATTEMPT]
    assert "TOKEN" not in (repository / "log").read_text()
    folder = repository / "answers"
    assert shlex.split((folder / "arguments").read_text()) == ARGUMENTS
    assert shlex.split((folder / "environment").read_text()) == ["TOKEN=a b'c"]


def test_a_failed_run_starts_again_on_the_same_hosts_but_not_for_ever(repository):
    run = ("run", "s", *CREATE, "--restarts=2", "--", *ARGUMENTS)
    done, verbs = run_pod(repository, *run, queued=["ACTIVE"], status=["", *ENDED])
    assert done.returncode == 0 and verbs == [*ATTEMPT, "start", "follow"]
    done, verbs = run_pod(repository, *run, queued=["ACTIVE"], status=["", "ended 137"])
    assert done.returncode == 2 and "failed 3 times, the last time with: ended 137" in done.stderr
    assert verbs.count("follow") == 3


def test_a_lost_connection_is_no_failure(repository):
    run = ("run", "s", *CREATE, "--restarts=1", "--", *ARGUMENTS)
    lost = ["", "", "running", "running", "ended 0"]  # without an answer first
    done, verbs = run_pod(repository, *run, queued=["ACTIVE"], status=lost)
    assert done.returncode == 0, done.stderr
    assert verbs == [*ATTEMPT, *["start", "follow"] * 3]


@pytest.mark.parametrize(("ended", "code"), [("ended 2", 2), ("stopped", 0)])
def test_a_mistake_or_stop_ends_the_loop(repository, ended, code):
    run = ("run", "s", *CREATE, "--", *ARGUMENTS)
    done, verbs = run_pod(repository, *run, queued=["ACTIVE"], status=["", ended])
    assert (done.returncode, verbs) == (code, ATTEMPT)


def test_resume_follows_a_run_that_goes_on_and_run_refuses_it(repository):
    run = ("run", "s", *CREATE, "--", *ARGUMENTS)
    run_pod(repository, *run, queued=["ACTIVE"], status=["", "stopped"])
    # A lost connection, then the end. The slice is known by now.
    done, verbs = run_pod(
        repository, "resume", "s", queued=["ACTIVE"], status=["running", *ENDED[1:]]
    )
    assert done.returncode == 0 and verbs == ["start", "follow"] * 2
    done, verbs = run_pod(repository, *run, queued=["ACTIVE"], status=["running"])
    assert done.returncode == 2 and "a run is going on on s" in done.stderr and not verbs
    # Nodes may be lost before the request says so.
    done, verbs = run_pod(
        repository, "resume", "s",
        queued=["ACTIVE", "NOT_FOUND", "ACTIVE"], node=["PREEMPTED", "READY"], status=["ended 0"],
    )  # fmt: skip
    assert verbs == ["delete", "create", "start", "follow"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "S"], "got the name 'S'"),
        (["run", "s", "--", "--x"], "give --zone and --type"),
        (["run", "s", "--zone=z", "--type=v9-8", "--", "--x"], "give --runtime"),
        (["run", "s", *CREATE], "expected the flags of train.py after --"),
        (["run", "s", *CREATE, "--ref=nothing", "--", "--x"], "no such commit"),
        (["run", "s", *CREATE, "--tarball=no.tar", "--", "--x"], "no such file"),
        (["run", "s", *CREATE, "--env=NOT_SET_X", "--", "--x"], "is not set here"),
        (["run", "s", *CREATE, "--env=HF_TOKEN=x", "--", "--x"], "expected the name of a variable"),
        (["create", "s", *CREATE, "--slices=0"], "--slices=0: expected a whole number"),
        (["create", "s", *CREATE, "--slices="], "--slices=: expected a whole number"),
        (["create", "s", *CREATE, "--restarts=x"], "--restarts=x: expected a whole number"),
        (["run", "s", *CREATE, "--config=x"], "unexpected argument --config=x"),
        (["resume", "s", *CREATE], "no run was started on s from here"),
    ],
)
def test_tpu_pod_refuses_wrong_input_in_one_line(repository, arguments, error):
    done = call(repository, "tpu_pod.sh", *arguments)
    assert done.returncode == 2 and error in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_host_runs_on_without_the_connection_and_stops_when_told(repository, tmp_path):
    """tpu_worker.sh as it is, with a program that runs until SIGTERM in place of train.py."""
    host = tmp_path / "cptjax_run"
    host.mkdir()
    with tarfile.open(host / "code.tar.gz", "w:gz") as archive:
        archive.add(repository / "launch", "launch")
    (host / "arguments").write_text(shlex.join(ARGUMENTS))
    (host / "environment").write_text("TOKEN='a b'\n")
    write_program(
        repository, "python",
        'trap "exit 143" TERM; printf "%s\\n" "$TOKEN" "$CPTJAX_DISTRIBUTED" "$@";'
        " for i in $(seq 600); do sleep 0.1; done",
    )  # fmt: skip
    shutil.copy(LAUNCH / "tpu_worker.sh", host)

    def act(verb):
        programs = repository / "programs"
        done = subprocess.run(
            ["bash", host / "tpu_worker.sh", verb],
            env={"PATH": os.environ["PATH"], "PROGRAMS": str(programs)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.stdout.strip(), done.returncode

    assert act("status") == ("ended 1", 0)
    assert act("install") == ("", 0) and act("start") == ("", 0)
    try:
        log = host / "run.log"
        while len(log.read_text().splitlines() if log.exists() else ()) < 6:
            time.sleep(0.02)
        assert act("status") == ("running", 0) and act("start") == ("", 0)
        assert act("install")[1] == 2
        act("stop")
        followed, _ = act("follow")
    finally:
        act("stop")
    assert followed.splitlines() == ["a b", "1", "launch/train.py", "--fail_on_sigterm", *ARGUMENTS]
    assert act("status") == ("stopped", 0)
    assert (host / "code_of_exit").read_text() == "143\n"


# ---- containers ----------------------------------------------------------------------------------


def test_the_job_sets_start_again_after_a_preemption_and_agree_on_their_hosts():
    yaml = pytest.importorskip("yaml")
    sets = list(yaml.safe_load_all((LAUNCH / "gke.yaml").read_text()))
    assert [s["metadata"]["labels"]["variant"] for s in sets] == ["tpu", "gpu"]
    for job_set in sets:
        assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert job_set["spec"].keys() <= {"failurePolicy", "replicatedJobs"}
        policy = job_set["spec"]["failurePolicy"]
        assert policy["maxRestarts"] > 0
        assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
        (replicated,) = job_set["spec"]["replicatedJobs"]
        assert replicated.keys() == {"name", "replicas", "template"}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        job |= replicated["template"]
        if importlib.util.find_spec("kubernetes_validate"):
            schemas = importlib.import_module("kubernetes_validate")
            schemas.validate(job, "1.33", strict=True)
        spec = job["spec"]
        assert spec["completions"] == spec["parallelism"] and spec["backoffLimit"] == 0
        codes = [
            rule.get("onExitCodes", {}).get("values") for rule in spec["podFailurePolicy"]["rules"]
        ]
        assert codes == [[143], None]
        (container,) = spec["template"]["spec"]["containers"]
        arguments = dict(a.removeprefix("--").partition("=")[::2] for a in container["args"])
        assert (
            "fail_on_sigterm" in arguments and spec["template"]["spec"]["restartPolicy"] == "Never"
        )
        source = (LAUNCH / "train.py").read_text() + (ROOT / "cptjax/common/cli.py").read_text()
        assert all(f'"{flag}"' in source for flag in arguments if flag != "config")
        name, pods = job_set["metadata"]["name"], spec["completions"]
        if "coordinator" in arguments:  # the first pod, as JobSet names it
            host = f"{name}-{replicated['name']}-0-0.{name}"
            assert arguments["coordinator"].startswith(f"{host}:")
            assert int(arguments["num_processes"]) == pods
        else:
            selector = spec["template"]["spec"]["nodeSelector"]
            rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
            assert rows * columns == pods * container["resources"]["limits"]["google.com/tpu"]


def test_the_job_sets_ask_for_the_roles_that_the_readme_names():
    needed = re.search(r"the account needs the roles ([\w ]+)\)", (ROOT / "README.md").read_text())
    names = needed[1].removeprefix("Storage ").split(" and Storage ")
    roles = [f"roles/storage.{name[0].lower()}{name[1:].replace(' ', '')}" for name in names]
    assert roles == re.findall(r"roles/[\w.]*\w", (LAUNCH / "gke.yaml").read_text())


def test_the_container_copies_files_that_exist_and_installs_extras_that_exist():
    text = (LAUNCH / "Dockerfile").read_text()
    kept = [
        line.removeprefix("!")
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    assert copied and all((ROOT / name).exists() and name in kept for name in copied)
    setup = (ROOT / "setup.py").read_text()
    extras = [*re.findall(r"EXTRAS=(\w+)", text)]
    assert {"tpu", "cuda"} <= {*extras} and all(f'"{extra}": [' in setup for extra in extras)
    (package,) = re.findall(r"^RUN pip install .* -e (.*)$", text, re.M)  # as its shell expands it
    for given, expected in (("cuda,gcs", ".[cuda,gcs]"), ("", ".")):
        env = {"EXTRAS": given}
        found = subprocess.check_output(["sh", "-c", f"printf %s {package}"], env=env, text=True)
        assert found == expected
    assert 'ENTRYPOINT ["python", "launch/train.py"]' in text  # SIGTERM reaches Python
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", str(LAUNCH / "Dockerfile")], check=True)
