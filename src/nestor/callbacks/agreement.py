"""Comparison of the hypergradients of a run with those of a trusted response."""

import warnings

import torch

from nestor.errors import NestorWarning
from nestor.errors.options import check_options, typed
from nestor.responses import Implicit, Response
from nestor.solvers import ConjugateGradient
from nestor.training.callback import Callback
from nestor.training.run import Run


class Agreement(Callback):
    r"""Compare the hypergradients of the run with those of a trusted response.

    Adds the metrics ``level/cosine`` and ``level/relative_error`` to every level that has levels below. Both compare
    the run's hypergradient :math:`h` at the present point and batches with :math:`h_{ref}`, for which ``reference`` is
    the response of all levels below: :math:`h \cdot h_{ref} / (|h| |h_{ref}|)` and
    :math:`|h - h_{ref}| / |h_{ref}|`. A comparison costs two hypergradients and does not change the run.

    Args:
        every: Engine steps between two comparisons.
        reference: The trusted response; None is a conjugate-gradient solve of at most 200 iterations, truncated at
            negative curvature.

    Raises:
        ValueError: If ``every`` is not positive.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.1) for variable in (low, top)]
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0])
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> agreement = nestor.callbacks.Agreement(every=5)
        >>> metrics = nestor.Engine(program, callbacks=[agreement], seed=0).run(5)
        >>> print(f"{metrics['top/cosine']:.2f}")
        1.00
    """

    @typed
    def __init__(self, *, every: int = 100, reference: Response | None = None) -> None:
        self.every = every
        check_options(self, counts=["every"])
        self.reference = reference or Implicit(solver=ConjugateGradient(max_steps=200, rtol=1e-8))

    def on_start(self, engine: Run) -> None:
        engine.keep_histories()

    def on_level_step(self, engine: Run, level: str) -> None:
        state = engine.states[level]
        if not state.level.lowers or (engine.step + 1) % self.every:
            return
        with warnings.catch_warnings():
            # The run has warned of its own solves, and a reference that is truncated is documented.
            warnings.simplefilter("ignore", NestorWarning)
            gradients = engine.hypergradient(level), engine.hypergradient(level, response=self.reference)
        own, truth = (torch.cat([v.reshape(-1) for v in values]) for values in gradients)
        tiny = torch.finfo(truth.dtype).tiny
        length = truth.norm().clamp(min=tiny)
        state.metrics.callback_metrics["cosine"] = own @ truth / (own.norm().clamp(min=tiny) * length)
        state.metrics.callback_metrics["relative_error"] = (own - truth).norm() / length
