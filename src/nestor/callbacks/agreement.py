"""How good the hypergradients of a run are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestor.callbacks.callback import Callback
from nestor.responses import Implicit, Response
from nestor.solvers import ConjugateGradient
from nestor.vectors import algebra

if TYPE_CHECKING:
    from nestor.engine import Engine


class Agreement(Callback):
    """Compare the hypergradients of a run with those of a trusted response, now and then.

    Adds the metrics ``level/cosine`` and ``level/relative_error`` of every level that has levels below: its
    hypergradient at the present point and on the present batches, against the same with ``reference`` for all levels
    below. Costs two hypergradients each time; the run itself goes on as if nothing had been looked at.

    Args:
        every: Engine steps between two comparisons.
        reference: The trusted response; None is a conjugate-gradient solve of up to 200 iterations, truncated at
            negative curvature.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    reads_moments = True

    def __init__(self, *, every: int = 100, reference: Response | None = None) -> None:
        if every < 1:
            raise ValueError(f"Agreement(every={every}) must be at least 1.")
        self.every = every
        self.reference = reference or Implicit(solver=ConjugateGradient(max_steps=200, rtol=1e-8, truncate=True))

    def on_level_step(self, engine: Engine, level: str) -> None:
        """Compare when a comparison is due."""
        if not engine.program.levels[level].lowers or (engine.step + 1) % self.every:
            return
        below = engine.program.below(level)[:-1]
        trusted = engine.program.with_responses(dict.fromkeys(below, self.reference))
        moments = {name: runner.moment() for name, runner in engine.runners.items()}
        own, truth = (
            _flat(
                p.gradient(p.levels[level], moments, statistics=False).values,
                p.levels[level].parameters,
            )
            for p in (engine.program, trusted)
        )
        tiny = torch.finfo(truth.dtype).tiny
        length = truth.norm().clamp(min=tiny)
        engine.runners[level].extra.update(
            {
                "cosine": own @ truth / (own.norm().clamp(min=tiny) * length),
                "relative_error": (own - truth).norm() / length,
            }
        )


def _flat(values: list[Tensor | None], like: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in algebra.zeros_for_none(values, like)])
