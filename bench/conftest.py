"""What the pytest-benchmark files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Case

TimeVariant = Callable[[Case, str], None]


@pytest.fixture
def time_variant(benchmark: BenchmarkFixture) -> TimeVariant:
    """Check one variant of a case, then time it; variants of a case are shown as a group."""

    def run(case: Case, name: str) -> None:
        if name not in {v.name for v in case.variants}:
            pytest.skip(f"{case.op} has no {name!r} here")
        variant = case.variant(name)
        case.check(name)
        benchmark.group = str(case)
        rounds = 5 if case.op == "diffsr_update" else 10 if case.batch > 256 else 50
        benchmark.pedantic(variant.call, setup=variant.before, rounds=rounds, warmup_rounds=2)

    return run
