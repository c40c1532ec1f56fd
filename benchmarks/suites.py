"""The suites: a workload, the cases that are measured side by side, and the bars that have been set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.workloads import maml, metagradient, reweighting
from benchmarks.workloads.depth import Depth
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.unrolling import Unrolling
from benchmarks.workloads.zoo import MODELS, zoo


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
        group: The question that several suites answer in one table; empty for a table of its own.
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
    group: str = ""


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


def _zoo(model: str) -> Suite:
    """What an exact mixed derivative costs on one model of the zoo, beside differences and Betty."""
    kind, size = model.split(", ")
    # Blocks of some 50 ms: long against a timer, and short enough that a page fault or a neighbour hits all alike.
    block = {"MLP": 20, "transformer": 2, "ResNet block": 2}.get(kind, 6) // (1 if size == "small" else 2)
    return Suite(
        model,
        functools.partial(zoo, model),
        ("reweighting",),
        "nestor difference",
        rounds=25,
        block=max(block, 1),
        warm_up=4,
        skipped=("plain", "sama", "one step unrolled"),
        bars=(
            Bar("nestor exact", ("nestor difference",), 1.3 if kind in ("GRU", "LSTM") else 1.13),
            Bar("nestor exact, reused", ("nestor difference",), 1.0),
            Bar("nestor exact, reused", ("betty difference",), 0.95),
            Bar("nestor difference, reused", ("betty difference",), 0.85),
        ),
        group="Meta-Weight-Net on every kind of model: what does an exact mixed derivative cost?",
    )


_GRAPHS = ("torchopt graph of all steps",)
_AGAINST_GRAPHS = tuple(
    Bar(f"nestor {case}", _GRAPHS, bar)
    for case, bar in (
        ("every graph kept", 1.0),
        ("default, small graphs kept", 1.1),
        ("sqrt(T) states kept", 1.2),
        ("sqrt(T) states kept, compiled", 0.85),
    )
)
_AGAINST_TRAINING = tuple(
    Bar(f"nestor {case}", ("hand training",), bar)
    for case, bar in (
        ("every graph kept", 3.0),
        ("default, small graphs kept", 3.4),
        ("sqrt(T) states kept", 4.0),
        ("log(T) states kept", 4.8),
    )
)

SUITES: Mapping[str, Suite] = {
    "regression": Suite(
        "What does the bookkeeping of a library cost? W1: weight decay of a logistic regression, 20 weights",
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
        "And on a larger problem? W1: weight decay of a logistic regression, 1,000 weights",
        functools.partial(Regression, features=1000),
        ("regression",),
        "hand difference",
        rounds=10,
        block=8,
        warm_up=10,
        bars=(*_AGAINST_HAND, *_AGAINST_BETTY, *_against_jax(1.2, 1.2, 1.2)),
    ),
    "reweighting": Suite(
        "Whose hypergradient is cheapest for a network? W2: Meta-Weight-Net on a CNN, 28 x 28, batch 100",
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
        "How fast are tasks? W4: MAML on sine waves, MLP 1-40-40-1, 4 tasks, 5 inner steps",
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
        "And tasks of images? W4: MAML on a small CNN, 28 x 28, 5-way 5-shot, 4 tasks, 5 inner steps",
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
        "What do many levels cost? W5: six levels, each reading every other",
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
        "What does exact nesting cost? W5: three levels, each reading every other, T1-T2 everywhere",
        functools.partial(Depth, depth=3),
        ("depth",),
        "nestor frozen",
        rounds=12,
        block=8,
        warm_up=3,
        bars=(Bar("nestor exact", ("nestor frozen",), 3.0),),
    ),
    "unrolling": Suite(
        "What does a long unrolled run cost? 200 Adam steps of an MLP of width 256, differentiated through",
        Unrolling,
        ("unrolling",),
        "hand graph of all steps",
        rounds=10,
        block=1,
        # A compiled engine compiles in its first iterations.
        warm_up=3,
        bars=_AGAINST_GRAPHS,
    ),
    "unrolling-512": Suite(
        "200 Adam steps of an MLP of width 512, differentiated through",
        functools.partial(Unrolling, width=512),
        ("unrolling",),
        "hand graph of all steps",
        rounds=6,
        block=1,
        warm_up=3,
        bars=_AGAINST_GRAPHS,
    ),
    "metagradient": Suite(
        "The derivative of a training run in the weights of its samples: 150 Adam steps of an MLP on digits",
        metagradient.digits,
        ("metagradient",),
        "hand training",
        rounds=10,
        block=1,
        warm_up=3,
        bars=(*_AGAINST_TRAINING, Bar("nestor sqrt(T) states kept, compiled", ("hand training",), 2.5)),
    ),
    "metagradient-images": Suite(
        "The derivative of a training run in the weights of its samples: 60 Adam steps of a CNN, 28 x 28",
        metagradient.images,
        ("metagradient",),
        "hand training",
        rounds=6,
        block=1,
        warm_up=1,
        skipped=("sqrt(T) states kept, compiled",),
        bars=_AGAINST_TRAINING,
    ),
    **{f"zoo-{model.replace(', ', '-').replace(' ', '-').lower()}": _zoo(model) for model in MODELS},
}
