"""JAX (0.10): the outer iteration written out by hand and jitted whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks.adapters.solving import solve
from benchmarks.case import Case, repeated
from benchmarks.workloads.maml import MAML
from benchmarks.workloads.regression import Regression


def _adam(h: Any, m: Any, v: Any, t: Any, lr: float) -> tuple[Any, Any, Any]:
    m, v = 0.9 * m + 0.1 * h, 0.999 * v + 0.001 * h * h
    return -lr * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v


def _regression(method: str) -> Callable[[Regression], Case]:
    def build(problem: Regression) -> Case:
        (x, y), (xv, yv) = (tuple(jnp.asarray(t.numpy()) for t in pair) for pair in (problem.train, problem.validation))

        def entropy(logits: Any, labels: Any) -> Any:
            return jnp.mean(jax.nn.softplus(logits) - logits * labels)

        def lower(w: Any, decay: Any) -> Any:
            return entropy(x @ w, y) + 0.5 * jnp.sum(jnp.exp(decay) * w * w)

        def upper(w: Any) -> Any:
            return entropy(xv @ w, yv)

        of_w, of_decay = jax.grad(lower), jax.grad(lower, argnums=1)

        def hypergradient(w: Any, decay: Any) -> Any:
            v = jax.grad(upper)(w)
            if method == "difference":
                e = problem.rel_step / jnp.linalg.norm(v)
                return (of_decay(w - e * v, decay) - of_decay(w + e * v, decay)) / (2 * e)
            solution = solve(problem, method, v, lambda u: jax.jvp(lambda p: of_w(p, decay), (w,), (u,))[1])
            return -jax.grad(lambda d: jnp.vdot(of_w(w, d), solution))(decay)

        @jax.jit
        def body(w: Any, decay: Any, m: Any, v: Any, t: Any) -> Any:
            for _ in range(problem.unroll):
                w = w - problem.lower_lr * of_w(w, decay)
            t = t + 1
            move, m, v = _adam(hypergradient(w, decay), m, v, t, problem.upper_lr)
            return w, decay + move, m, v, t

        zeros = jnp.zeros(problem.features)
        state = [zeros, jnp.asarray(problem.decay.numpy()), zeros, zeros, jnp.zeros(())]

        def step() -> None:
            state[:] = body(*state)
            state[0].block_until_ready()

        return repeated(step, lambda: problem.quality(torch.tensor(state[0].tolist())))

    return build


def _maml(problem: MAML) -> Case:
    layers = [p.detach().numpy() for p in problem.model.parameters()]
    params = [jnp.asarray(p) for p in layers]
    arrays = [jnp.asarray(t.numpy()) for t in (*problem.support, *problem.query)]

    def loss(params: Any, x: Any, y: Any) -> Any:
        for index in range(0, len(params), 2):
            x = x @ params[index].T + params[index + 1]
            x = jax.nn.relu(x) if index + 2 < len(params) else x
        return jnp.mean((x - y) ** 2)

    def task(params: Any, xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        for _ in range(problem.inner_steps):
            grads = jax.grad(loss)(params, xs, ys)
            params = [p - problem.inner_lr * g for p, g in zip(params, grads, strict=True)]
        return loss(params, xq, yq)

    def mean(params: Any) -> Any:
        return jnp.mean(jax.vmap(task, (None, 0, 0, 0, 0))(params, *arrays))

    @jax.jit
    def body(params: Any, ms: Any, vs: Any, t: Any) -> Any:
        t = t + 1
        moves = [_adam(h, m, v, t, problem.outer_lr) for h, m, v in zip(jax.grad(mean)(params), ms, vs, strict=True)]
        return (
            [p + move for p, (move, _, _) in zip(params, moves, strict=True)],
            [m for _, m, _ in moves],
            [v for _, _, v in moves],
            t,
        )

    zeros = [jnp.zeros_like(p) for p in params]
    state = [params, zeros, zeros, jnp.zeros(())]

    def step() -> None:
        state[:] = body(*state)
        jax.block_until_ready(state[0])

    def quality() -> float:
        with torch.no_grad():
            for p, value in zip(problem.model.parameters(), state[0], strict=True):
                p.copy_(torch.tensor(value.tolist()))
        return problem.quality()

    return repeated(step, quality)


CASES = {
    "regression": {f"{name}, jitted": _regression(name) for name in ("difference", "conjugate gradient", "neumann")},
    "sinusoid": {"vmap, jitted": _maml},
}
