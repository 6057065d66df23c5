"""Progress bars: live, plain and silent."""

import subprocess
import sys
import threading
import time

import pytest

from cptjax.common import console


def test_plain_progress_has_counts_eta_and_values(monkeypatch, capsys):
    console.set_console_mode("plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    with console.progress_bar("evaluate scienceqa", 4) as bar:
        bar.advance(2, accuracy=0.51239)
    with console.show_waiting("compiling"):
        pass
    err = capsys.readouterr().err
    assert (
        "evaluate scienceqa  2/4 (50%)  ETA 0s  accuracy 0.5124" in err
        and "compiling: took 0s" in err
    )


def test_the_last_line_of_a_plain_bar_is_printed_once(monkeypatch, capsys):
    console.set_console_mode("plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    with console.progress_bar("evaluate", 2) as bar:
        bar.advance()
        bar.advance()
    assert capsys.readouterr().err.count("evaluate  2/2 (100%)") == 1


def test_a_table_in_a_log_file_keeps_its_numbers(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    console.set_console_mode("plain")
    row = [f"{1.2345678 * k:.6f}" for k in range(1, 12)]
    console.print_table("numbers", [f"c{k}" for k in range(11)], [row])
    shown = capsys.readouterr().err
    assert all(cell in shown for cell in row)


def test_the_line_of_an_error_or_a_signal_is_the_last_one(monkeypatch, capsys):
    console.set_console_mode("plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.02)
    with pytest.raises(SystemExit), console.progress_bar("stage 1", 4):
        time.sleep(0.05)
        console.print_message("stopped by SIGTERM")
        raise SystemExit
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"


def test_a_plain_bar_prints_while_its_first_step_compiles_and_no_longer(monkeypatch, capsys):
    console.set_console_mode("plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.02)
    with console.progress_bar("stage 1", 4) as bar:
        bar.advance(0, accuracy=0.5)  # no step
        time.sleep(0.1)
        assert "stage 1  0/4 (a first step compiles)" in capsys.readouterr().err
        bar.advance(1)
        capsys.readouterr()
        time.sleep(0.1)
        assert capsys.readouterr().err == ""
    with console.progress_bar("stage 2", 4, done=1):
        time.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3 and said[-2] == "stage 2  1/4 (a first step compiles)  0s so far"
    assert not [t for t in threading.enumerate() if t.name.endswith("(_remind)")]


def test_live_bars_nest_and_silent_mode_prints_nothing(monkeypatch, capsys):
    console.set_console_mode("live")
    with console.progress_bar("stage 1 [colour]", 2) as outer, console.show_waiting("saving"):
        outer.advance(1, loss=1.0)
        console.print_warning("disk is [nearly] full")
    assert console._live is None and "disk is [nearly] full" in capsys.readouterr().err
    console.set_console_mode("silent")
    with console.progress_bar("x", 1) as bar:
        bar.advance()
    console.print_message("nothing")
    assert capsys.readouterr().err == ""


def test_eta_of_a_resumed_bar_counts_only_what_this_process_did():
    bar = console.ProgressBar("train", 100, done=90)
    bar.started -= 10
    bar.advance(5)
    assert bar.eta() == pytest.approx(10, rel=0.01)


def test_eta_leaves_out_a_first_step_that_compiles_and_follows_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = console.ProgressBar("train", 1000)
    assert bar.eta() is None
    for seconds, eta in ((30, None), (1, 998), (1, 997)):  # the first step compiles
        now[0] += seconds
        bar.advance()
        bar.advance(0, loss=1.0)
        assert bar.eta() == (eta and pytest.approx(eta))
    quick = console.ProgressBar("evaluate", 10)
    now[0] += 2
    quick.advance()
    assert quick.eta() == pytest.approx(18)
    for _ in range(console.RECENT):
        now[0] += 2
        bar.advance()
    assert bar.eta() == pytest.approx(2 * (997 - console.RECENT))


def test_the_log_keeps_what_was_printed_and_why_it_ended_over_restarts(
    tmp_path, monkeypatch, capsys
):
    console.set_console_mode("live")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    path = tmp_path / "run.log"
    with console.keep_log(path):
        with console.progress_bar("stage 1 [colour]", 2) as bar:
            bar.advance(1, loss=1.0)
            console.print_warning("disk is [nearly] full")
        console.print_table("totals", ("task", "n"), [("colour", "8")])
    with pytest.raises(ValueError), console.keep_log(path):
        raise ValueError("train.lr: expected a number,\n got \udc80")
    with pytest.raises(ZeroDivisionError), console.keep_log(path):
        _ = 1 / 0
    console.print_message("after the block")
    lines = [line[21:] for line in path.read_text().splitlines()]
    for line in (
        "stage 1 [colour]  1/2 (50%)  ETA 0s  loss 1",
        "warning: disk is [nearly] full",
        "colour  8",
        "error: train.lr: expected a number, got \\udc80",
        "ZeroDivisionError: division by zero",
    ):
        assert line in lines
    assert sum(line.startswith("----") for line in lines) == 3 and "after the block" not in lines


def test_control_characters_of_data_are_shown_escaped(monkeypatch, capsys):
    console.set_console_mode("plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    hostile = "a\x1b]52;c;eA==\x07\r\x9b2J\u202eb\tc\ud800"
    shown = "a\\x1b]52;c;eA==\\x07\\r\\x9b2J\\u202eb\tc\\ud800"
    console.print_message(hostile)
    console.print_warning(hostile)
    console.print_error(hostile.replace("\t", ""))
    with console.progress_bar(hostile, 2) as bar:
        bar.advance(1, reward=hostile)
    console.set_console_mode("live")
    console.print_table("t", ["task"], [[hostile]])
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\r\x9b\u202e\ud800")
    assert err.startswith(f"{shown}\n".expandtabs()) and shown.partition("\t")[0] in err
    assert console.escape_controls(hostile) == shown


@pytest.mark.parametrize("terminal", [True, False])
def test_results_are_escaped_on_a_terminal_and_unchanged_in_a_pipe(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    console.print_result("a\x1b[2J")
    assert capsys.readouterr().out == ("a\\x1b[2J\n" if terminal else "a\x1b[2J\n")


def test_a_closed_pipe_acts_like_a_closed_terminal_and_a_full_disk_is_ignored(monkeypatch):
    """A print never raises; after a broken pipe the process gets SIGHUP, which a run handles."""
    code = (
        "import os, signal\n"
        "from cptjax.common import console\n"
        "got = []\n"
        "signal.signal(signal.SIGHUP, lambda *_: got.append(1))\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "console.print_message('lost')\n"
        "assert not got\n"
        "read, write = os.pipe()\n"
        "os.dup2(write, 2)\n"
        "os.close(read)\n"
        "console.print_message('to nobody')\n"
        "console.print_warning('again')\n"
        "assert got == [1], got\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
