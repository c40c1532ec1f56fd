"""The suites: a workload, the cases that are measured side by side, and the bars that have been set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.workloads import maml, reweighting
from benchmarks.workloads.depth import Depth
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.unrolling import Unrolling


@dataclass(frozen=True)
class Bar:
    """A ratio that is not to be exceeded.

    Attributes:
        case: Whose time.
        against: Of these the fastest.
        at_most: The ratio.
    """

    case: str
    against: tuple[str, ...]
    at_most: float


@dataclass(frozen=True)
class Suite:
    """Cases that are measured in turn.

    Attributes:
        title: What it is.
        workload: Builds the definition, a new one for each case.
        families: Names in the adapters' tables.
        reference: The case that ratios are given to.
        rounds: Rounds of blocks.
        block: Outer iterations in a block.
        warm_up: Outer iterations before the first round.
        skipped: Methods that are left out.
        bars: What has been set.
    """

    title: str
    workload: Callable[[], Any]
    families: tuple[str, ...]
    reference: str
    rounds: int
    block: int
    warm_up: int
    skipped: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = field(default=())


_SAME = ("exact", "difference", "conjugate gradient", "neumann")
_AGAINST_HAND = tuple(
    Bar(f"nestor {method}", (f"hand {'difference' if method == 'exact' else method}",), bar)
    for method, bar in zip(_SAME, (1.10, 1.15, 1.10, 1.10), strict=True)
)
_AGAINST_BETTY = tuple(
    Bar(f"nestor {method}", (f"betty {'difference' if method == 'exact' else method}",), bar)
    for method, bar in zip(_SAME, (0.85, 0.85, 0.85, 1.0), strict=True)
)
_SOLVED = ("difference", "conjugate gradient", "neumann")
_COMPILED = tuple(Bar(f"nestor {method}, compiled", (f"betty {method}",), 0.12) for method in _SOLVED)


def _against_jax(*ratios: float) -> tuple[Bar, ...]:
    return tuple(
        Bar(f"nestor {method}, compiled", (f"jax {method}, jitted",), ratio)
        for method, ratio in zip(_SOLVED, ratios, strict=True)
    )


SUITES: Mapping[str, Suite] = {
    "regression": Suite(
        "W1: weight decay of a logistic regression, 20 weights",
        Regression,
        ("regression",),
        "hand difference",
        # Beyond some 500 outer iterations the problem itself diverges for differences and T1-T2, in every library. A
        # block is long against the first iterations after another library's, which run on cold caches.
        rounds=11,
        block=40,
        warm_up=20,
        bars=(*_AGAINST_HAND, *_AGAINST_BETTY, *_COMPILED, *_against_jax(1.0, 1.25, 1.1)),
    ),
    "regression-1000": Suite(
        "W1: weight decay of a logistic regression, 1,000 weights",
        functools.partial(Regression, features=1000),
        ("regression",),
        "hand difference",
        rounds=10,
        block=8,
        warm_up=10,
        bars=(*_AGAINST_HAND, *_AGAINST_BETTY, *_against_jax(1.2, 1.2, 1.2)),
    ),
    "reweighting": Suite(
        "W2: Meta-Weight-Net on a small CNN, 28 x 28, batch 100, SGD with momentum",
        reweighting.images,
        ("reweighting",),
        "hand difference",
        rounds=12,
        block=2,
        warm_up=3,
        bars=(
            Bar("nestor exact", ("hand difference",), 1.12),
            Bar("nestor difference", ("hand difference",), 1.02),
            Bar("nestor difference, reused", ("betty difference",), 0.80),
            Bar("nestor sama", ("hand difference",), 1.15),
        ),
    ),
    "sinusoid": Suite(
        "W4: MAML on sine waves, MLP 1-40-40-1, 4 tasks, 5 inner steps",
        maml.sinusoid,
        ("maml", "sinusoid"),
        "hand loop",
        rounds=20,
        block=4,
        warm_up=6,
        bars=(
            Bar("nestor vmap", ("higher loop", "torchopt loop"), 0.9),
            Bar("nestor vmap, compiled", ("higher loop", "torchopt loop"), 0.15),
            Bar("nestor vmap, compiled", ("jax vmap, jitted",), 1.6),
        ),
    ),
    "few-shot": Suite(
        "W4: MAML on a small CNN, 28 x 28, 5-way 5-shot, 4 tasks, 5 inner steps",
        maml.few_shot,
        ("maml",),
        "hand loop",
        rounds=6,
        block=1,
        warm_up=1,
        skipped=("vmap, compiled",),
        bars=(Bar("nestor vmap", ("higher loop", "torchopt loop"), 1.0),),
    ),
    "depth": Suite(
        "W5: six levels, each reading every other",
        functools.partial(Depth, depth=6),
        ("depth",),
        "nestor frozen, difference",
        rounds=6,
        block=3,
        warm_up=2,
        skipped=("exact",),
        bars=(Bar("nestor frozen, difference", ("betty finite differences along every path",), 0.2),),
    ),
    "trilevel": Suite(
        "W5: three levels, each reading every other: exact against frozen nesting, T1-T2 everywhere",
        functools.partial(Depth, depth=3),
        ("depth",),
        "nestor frozen",
        rounds=12,
        block=8,
        warm_up=3,
        bars=(Bar("nestor exact", ("nestor frozen",), 3.0),),
    ),
    "unrolling": Suite(
        "200 Adam steps of an MLP, differentiated through",
        Unrolling,
        ("unrolling",),
        "hand graph of all steps",
        rounds=4,
        block=1,
        warm_up=1,
        bars=(
            Bar(
                "nestor sqrt(T) states kept, compiled",
                ("higher graph of all steps", "torchopt graph of all steps"),
                1.0,
            ),
        ),
    ),
}
