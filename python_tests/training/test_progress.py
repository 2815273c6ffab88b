"""What a run shows."""

from __future__ import annotations

import errno
import io
import os

import pytest
from rich.console import Console

from diffcore.training import progress
from diffcore.training.progress import ProgressDisplay, _duration


def shown(terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    with ProgressDisplay(console, first_step=100, total_steps=1000) as display:
        display.episode(-12.34)
        display.evaluated(200, 5.0, 1.0)
        display.step(200)
        display.line(200)
        display.warn("the [disk] is full")
        display.message("run: runs/[x]")
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "step 200/1,000  return -12.3  eval 5.0  " in text
    assert "steps/s" in text
    assert "left" in text
    assert "step 200: evaluation return 5.0 ± 1.0" in text
    assert "warning: the [disk] is full" in text
    assert "run: runs/[x]" in text


def test_a_live_line_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "200/1,000" in text
    assert "return -12.3  eval 5.0" in text
    assert "step 200/1,000" not in text
    assert "the [disk] is full" in text


class FullForAWhile(io.StringIO):
    """What rich writes to fails, as a file on a full disk does, while ``full`` is set."""

    full = False

    def flush(self) -> None:
        if self.full:
            self.seek(0)
            self.truncate()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("terminal", [False, True])
def test_what_cannot_be_printed_is_dropped(terminal: bool) -> None:
    output = FullForAWhile()
    console = Console(file=output, force_terminal=terminal, width=120)
    with ProgressDisplay(console, first_step=100, total_steps=1000) as display:
        output.full = True
        display.step(200)
        display.line(200)
        display.evaluated(200, 5.0, 1.0)
        display.message("unseen")
        display.warn("unseen")
        output.full = False
        display.message("seen")
        output.full = terminal  # in the end too
    assert output.getvalue().count("unseen") == 0
    assert terminal or output.getvalue() == "seen\n"
    output.full = False
    console.print("later")
    assert output.getvalue().endswith("later\n")


def test_the_live_line_ends_with_the_last_step() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with ProgressDisplay(console, first_step=0, total_steps=400) as display:
        for step in range(1, 401):  # in less time than between two of its states
            display.step(step)
    assert "400/400" in output.getvalue()


def test_speed_and_time_left_are_of_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, width=120), 0, 100_000) as display:
        step = 0
        for speed, seconds in ((5000, 2), (10, 60)):  # random steps, then such that learn
            for _ in range(seconds):
                now, step = now + 1, step + speed
                display.step(step)
        display.line(step)
        assert display.steps_per_second(step) == pytest.approx(10_600 / 62)
    assert "10.0 steps/s  2:29:00 left" in output.getvalue()


def test_durations() -> None:
    assert _duration(3725.4) == "1:02:05"
    assert _duration(None) == "?"
