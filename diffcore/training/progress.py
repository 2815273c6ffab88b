"""What a run shows while it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

REFRESH_SECONDS = 0.25
"""Between two states of the live line."""
RECENT_SECONDS = 30.0
"""What the speed shown is a mean of. Random steps at the start are a hundred times as fast as those
that learn, so the mean of a whole run says little of either, and promises too early an end."""


@contextmanager
def printing(console: Console) -> Iterator[None]:
    """Print to ``console`` inside. What can't be printed is dropped.

    Whoever read it may be gone, or the disk full that it goes to: no reason to lose a run.
    """
    try:
        yield
    except (OSError, SystemExit):  # rich raises the latter on a broken pipe
        quiet, console.quiet = console.quiet, True
        console.print()  # empties rich's buffer, which would go before the next line
        console.quiet = quiet


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is."""
    with printing(console):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressDisplay:
    """Step, returns, speed and time left. Use as a context manager.

    Args:
        console: where to; a live line is shown only if it is a terminal.
        first_step: where this process starts.
        total_steps: where it ends.
    """

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._console = console
        self._first_step = first_step
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._last_return: float | None = None
        self._evaluation: float | None = None
        self._step = first_step
        self._next_refresh = 0.0
        self._marks = deque([(self._started, first_step)])  # a second or more apart
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed:>9,}/{task.total:,}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=console,
                auto_refresh=False,  # that would be a thread, in which nobody catches errors
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step)

    def __enter__(self) -> ProgressDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            with printing(self._console):
                self._update(self._progress)
                self._progress.stop()

    def episode(self, episode_return: float) -> None:
        """An episode of training ended."""
        self._last_return = episode_return

    def evaluated(self, step: int, mean_return: float, std_return: float) -> None:
        """An evaluation ended."""
        self._evaluation = mean_return
        if self._progress is None:
            self.message(f"step {step:,}: evaluation return {mean_return:.1f} ± {std_return:.1f}")

    def step(self, step: int) -> None:
        """Training reached ``step``. Cheap enough to call at every one."""
        self._step = step
        self._mark(step)
        if self._progress is not None and time.monotonic() >= self._next_refresh:
            with printing(self._console):
                self._update(self._progress)
                self._progress.refresh()
            self._next_refresh = time.monotonic() + REFRESH_SECONDS

    def line(self, step: int) -> None:
        """Print a plain line, unless there is a live one."""
        if self._progress is None:
            self.message(f"step {step:,}/{self._total_steps:,}  {self._status(step)}")

    def message(self, text: str) -> None:
        """Print something that stays."""
        say(self._console, text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        with printing(self._console):
            warning = f"[bold yellow]warning:[/] {escape(text)}"
            self._console.print(warning, markup=True, highlight=False, soft_wrap=True)

    def steps_per_second(self, step: int) -> float:
        """Mean speed of this process so far."""
        return _speed(step - self._first_step, self.seconds())

    def seconds(self) -> float:
        """Seconds since this process started training."""
        return time.monotonic() - self._started

    def _mark(self, step: int) -> None:
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, step))
        while len(self._marks) > 1 and now - self._marks[1][0] >= RECENT_SECONDS:
            self._marks.popleft()

    def _recent_speed(self, step: int) -> float:
        """Mean steps per second over the last RECENT_SECONDS, or as long as there were."""
        then, step_then = self._marks[0]
        return _speed(step - step_then, time.monotonic() - then)

    def _status(self, step: int) -> str:
        speed = self._recent_speed(step)
        # The last step may overshoot: several environments make one together.
        left = max(self._total_steps - step, 0) / speed if speed > 0 else None
        return "  ".join(
            [
                f"return {_number(self._last_return)}",
                f"eval {_number(self._evaluation)}",
                f"{speed:,.1f} steps/s",
                f"{_duration(left)} left",
            ]
        )

    def _update(self, progress: Progress) -> None:
        progress.update(self._task, completed=self._step, description=self._status(self._step))


def _speed(steps: int, seconds: float) -> float:
    return steps / max(seconds, 1e-9)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
