"""SIGTERM ends the process at once, or waits for the end of a `deferred` block."""

import os
import signal

import pytest

from cptjax.common import signals


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_process_at_once_outside_a_deferred_block(capsys):
    with signals.handle_sigterm(signals.SigtermHandler()), pytest.raises(signals.Preempted) as end:
        send_sigterm()
    assert end.value.code == 0
    assert "stopped by SIGTERM outside of training" in capsys.readouterr().err


def test_sigterm_is_only_recorded_inside_a_deferred_block():
    sigterm = signals.SigtermHandler()
    with signals.handle_sigterm(sigterm):
        with sigterm.deferred():
            assert not sigterm.agreed()
            send_sigterm()
            assert sigterm.agreed()
        with pytest.raises(signals.Preempted):  # the block is over
            send_sigterm()


def test_an_immediate_block_inside_a_deferred_one_ends_the_process_at_once():
    sigterm = signals.SigtermHandler()
    with signals.handle_sigterm(sigterm), sigterm.deferred():
        with pytest.raises(signals.Preempted), sigterm.immediate():
            send_sigterm()
        send_sigterm()  # deferred again, after an exception too


def test_the_previous_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    sigterm = signals.SigtermHandler()
    with signals.handle_sigterm(sigterm):
        assert signal.getsignal(signal.SIGTERM) is sigterm
    assert signal.getsignal(signal.SIGTERM) is before
