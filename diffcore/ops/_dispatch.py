"""Which backend runs a call.

Each op says for each of its backends why it can't take a call, or that it can; the first that can
runs it. `reference` takes everything, so no call fails for want of a kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: backend -> what says why it can't take the call, or None when it can; in order of preference. It is
#: asked only of those that are thought of: looking at every tensor takes time.
Support = dict[str, Callable[[], str | None]]


def no_reason() -> None:
    """The reference takes everything."""


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


def restrict(support: Support, name: str, further: Callable[[], str | None]) -> None:
    """Give a backend one more reason not to take the call, asked for where it has no other."""
    reason = support[name]
    support[name] = lambda: reason() or further()


def choose(op: str, support: Support, forced: str | None) -> str:
    """The backend that runs: `forced` if given, else the first that can."""
    if forced is None:
        for name, reason in support.items():
            if reason() is None:
                return name
        raise AssertionError("the reference takes everything")
    if forced not in support:
        raise ValueError(f"backend: expected one of {', '.join(support)}, got {forced!r}")
    why = support[forced]()
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
    module = importlib.import_module(f"diffcore.ops.{op}")
    support: Support = module.support(*args, **kwargs)
    backend = choose(op, support, kwargs.get("backend"))
    preferred = list(support)[: list(support).index(backend)]
    passed_over = {name: why for name in preferred if (why := support[name]()) is not None}
    return Explanation(op, backend, passed_over)
