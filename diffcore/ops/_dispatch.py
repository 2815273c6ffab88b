"""Which backend runs a call.

Each op says for each of its backends why it can't take a call, or that it can; the first that can
runs it. `reference` takes everything, so no call fails for want of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Support:
    """Which backends can take a call.

    Args:
        backends: in order of preference.
        lacks: why one of them can't take the call, or None when it can. Asked only of those that are
            thought of: looking at every tensor takes time.
    """

    __slots__ = ("_further", "_lacks", "backends")

    def __init__(self, backends: Sequence[str], lacks: Callable[[str], str | None]) -> None:
        self.backends = backends
        self._lacks = lacks
        self._further: list[tuple[str, Callable[[], str | None]]] = []

    def restrict(self, backend: str, further: Callable[[], str | None]) -> None:
        """One more reason not to take the call, asked for where there is no other."""
        self._further.append((backend, further))

    def why_not(self, backend: str) -> str | None:
        """Why a backend can't take the call, or None."""
        why = self._lacks(backend)
        for restricted, further in self._further:
            if why is None and restricted == backend:
                why = further()
        return why


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`diffcore.explain`: the backend, and why none preferred to it runs."""

    op: str
    backend: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: runs on '{self.backend}'"]
        lines += [f"  not on '{name}': {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


#: The `backend` by which `explain` asks a call what it would tell `choose`.
_QUESTION: Any = object()


class _Answer(Exception):  # noqa: N818 - nothing went wrong
    """Ends a call that was only asked which backends can take it."""

    def __init__(self, support: Support) -> None:
        super().__init__()
        self.support = support


def choose(op: str, support: Support, forced: str | None) -> str:
    """The backend that runs: `forced` if given, else the first that can.

    Every op asks this before it draws, computes or changes anything, unless its call may go straight
    to the kernel: see `_backends.may_go_straight`.
    """
    if forced is None:
        for backend in support.backends:
            if support.why_not(backend) is None:
                return backend
        raise AssertionError("the reference takes everything")
    if forced not in support.backends:
        if forced is _QUESTION:
            raise _Answer(support)
        expected = ", ".join(support.backends)
        raise ValueError(f"backend: expected one of {expected}, got {forced!r}")
    why = support.why_not(forced)
    if why is not None:
        raise ValueError(f"backend: {op} can't run on {forced!r} here: {why}")
    return forced


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``diffcore.ops.<op>(*args, **kwargs)``, and why the others don't.

    Example:
        >>> print(diffcore.explain("reverse_diffusion", denoiser, schedule, state))
        reverse_diffusion: runs on 'cpu'

    Raises:
        ValueError: there is no such op, or the arguments are ones that the op rejects.
    """
    from diffcore import ops

    if op not in ops.__all__:
        raise ValueError(f"op: expected one of {', '.join(ops.__all__)}, got {op!r}")
    forced = kwargs.pop("backend", None)
    support = _ask(getattr(ops, op), *args, **kwargs)
    backend = choose(op, support, forced)
    preferred = support.backends[: support.backends.index(backend)]
    passed_over = {name: why for name in preferred if (why := support.why_not(name)) is not None}
    return Explanation(op, backend, passed_over)


def _ask(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Support:
    """What the call tells `choose`, where it ends: its own checks, so that they can't differ."""
    try:
        op(*args, **kwargs, backend=_QUESTION)
    except _Answer as answer:
        return answer.support
    raise AssertionError("every op asks choose")
