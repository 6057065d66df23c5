"""The time of a run by phase: nothing is counted twice, and sessions add up."""

import pytest

from cptjax.common import phases


class Time:
    """A clock that moves only when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(phases.time, "perf_counter", lambda: self.now)
        phases.restart_clock()

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    yield Time(monkeypatch)
    monkeypatch.undo()
    phases.restart_clock()


def spent(*, other=0.0, **seconds):
    return dict.fromkeys(phases.WORKS.values(), 0.0) | seconds | {"other": other}


def test_of_nested_phases_only_the_inner_one_is_counted(clock):
    clock.passes(1)
    with phases.phase("evaluation"):
        clock.passes(2)
        with phases.phase("saving"):
            clock.passes(4)
        clock.passes(8)
    with pytest.raises(KeyError), phases.phase("update"):
        clock.passes(16)
        raise KeyError
    clock.passes(32)
    expected = spent(other=33.0, evaluating=10.0, saving=4.0, training=16.0)
    assert phases._clock.work_seconds() == expected


def test_a_compilation_is_taken_out_of_its_phase_and_counted_once(clock):
    def reported(seconds, event="backend_compile_duration"):
        phases._listen(f"/jax/core/compile/{event}", seconds)

    with phases.phase("rollout"):
        clock.passes(1)
        clock.passes(2)
        reported(2, "jaxpr_trace_duration")  # within the next one
        clock.passes(3)
        reported(5, "jaxpr_trace_duration")
        clock.passes(4)
        reported(4)
        phases._listen("/jax/checkpoint/write/duration_secs", 3)
    assert phases._clock.work_seconds() == spent(sampling=1.0, compiling=9.0)


def test_idle_devices_are_waiting_not_training(clock):
    with phases.phase("update"):
        clock.passes(5)
        phases.count_idle_time(2.0)
    assert phases._clock.work_seconds() == spent(training=3.0, waiting=2.0)


def test_sessions_of_a_run_add_up_and_a_session_counts_once(clock, tmp_path):
    assert phases.summarise_sessions(tmp_path) is None
    for _ in range(2):
        phases.restart_clock()
        log = phases.SessionLog(tmp_path)
        log.start()
        for _ in range(2):  # what a session records again replaces what it recorded before
            with phases.phase("update"):
                clock.passes(3)
            log.record()
        clock.passes(100)  # killed: never recorded
    found = phases.summarise_sessions(tmp_path)
    assert (found["sessions"], found["seconds"]) == (2, 12.0)
    assert found["shares"]["training"] == 1.0


def test_jax_reports_its_compilations(clock):
    import jax

    jax.jit(lambda x: x * 3.25 + 1)(2.0)
    assert phases._clock.seconds["compile"] == 0.0  # the clock of the test stands still
    assert phases._clock.compiled, "JAX has renamed the events of its compilations"
