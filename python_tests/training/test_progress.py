"""What a run shows."""

from __future__ import annotations

import io

from rich.console import Console

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


def test_durations() -> None:
    assert _duration(3725.4) == "1:02:05"
    assert _duration(None) == "?"
