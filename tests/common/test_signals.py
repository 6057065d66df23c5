"""Stop signals end the process at once, or wait for the end of a `deferred` block."""

import os
import signal
import subprocess
import sys

import pytest

from cptjax.common import signals


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_process_at_once_outside_a_deferred_block(capsys):
    with (
        signals.handle_stop_signals(signals.StopSignals()),
        pytest.raises(signals.Preempted) as end,
    ):
        send_sigterm()
    assert end.value.code == 0
    assert "stopped by SIGTERM outside of training" in capsys.readouterr().err


def test_sigterm_is_only_recorded_inside_a_deferred_block():
    stop_signals = signals.StopSignals()
    with signals.handle_stop_signals(stop_signals):
        with stop_signals.deferred():
            assert not stop_signals.agreed()
            send_sigterm()
            assert stop_signals.agreed()
        with pytest.raises(signals.Preempted):  # the block is over
            send_sigterm()


def test_an_immediate_block_inside_a_deferred_one_ends_the_process_at_once():
    stop_signals = signals.StopSignals()
    with signals.handle_stop_signals(stop_signals), stop_signals.deferred():
        with pytest.raises(signals.Preempted), stop_signals.immediate():
            send_sigterm()
        send_sigterm()  # deferred again, after an exception too


def test_the_previous_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    stop_signals = signals.StopSignals()
    with signals.handle_stop_signals(stop_signals):
        assert signal.getsignal(signal.SIGTERM) is stop_signals
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def default_handlers():
    """The tests themselves may run in the background, where a shell ignores SIGINT."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, code, name", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGHUP, 129, "SIGHUP")]
)
def test_ctrl_c_and_a_closed_terminal_stop_a_run_like_sigterm(
    number, code, name, capsys, default_handlers
):
    stop_signals = signals.StopSignals()
    with signals.handle_stop_signals(stop_signals), stop_signals.deferred():
        os.kill(os.getpid(), number)
        assert stop_signals.agreed()
        with pytest.raises(signals.Preempted) as end:
            stop_signals.leave("after step 3, saved")
    assert end.value.code == code
    assert f"stopped by {name} after step 3, saved; run the same" in capsys.readouterr().err


def test_sighup_stays_ignored_after_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handle_stop_signals(signals.StopSignals()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once():
    code = (
        "import os, signal\n"
        "from cptjax.common import signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stop_signals = signals.StopSignals()\n"
        "with signals.handle_stop_signals(stop_signals), stop_signals.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still running')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: stopped at once by a second Ctrl-C")
