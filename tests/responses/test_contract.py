"""Every response keeps the contract."""

import pytest
import torch
from contract import Lower, ResponseContract, implicit, logistic, mixed_product, ridge, unrolled
from torch import Tensor

import nestor


class TestFirstOrder(ResponseContract):
    twice = False

    def make(self) -> nestor.Response:
        return nestor.FirstOrder()

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return torch.zeros(sum(i.numel() for i in lower.inputs), dtype=torch.float64)


class TestT1T2(ResponseContract):
    twice = False  # differentiable, but the response of an approximation is not that of its derivative

    def make(self) -> nestor.Response:
        return nestor.T1T2()

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return mixed_product(lower, cotangent)


class TestT1T2ForwardMode(TestT1T2):
    def make(self) -> nestor.Response:
        return nestor.T1T2(scale=1.0, cross=nestor.ForwardMode())


class TestFiniteDifference(TestT1T2):
    tolerance = 1e-5

    def make(self) -> nestor.Response:
        return nestor.FiniteDifference(rel_step=1e-4)


class TestSAMA(TestT1T2):
    def make(self) -> nestor.Response:
        return nestor.SAMA(cross=nestor.ReverseMode())

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return lower.rate * mixed_product(lower, cotangent)


class TestConjugateGradient(ResponseContract):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=60, rtol=1e-12))

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return implicit(lower, cotangent)


class TestPreconditionedConjugateGradient(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(
            solver=nestor.ConjugateGradient(max_steps=90, rtol=1e-12, preconditioner=nestor.HutchinsonDiagonal())
        )


class TestDenseSolve(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.DenseSolve())


class TestMINRES(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.MINRES(max_steps=60, rtol=1e-12))


class TestNormalConjugateGradient(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.NormalConjugateGradient(max_steps=300, rtol=1e-12))


class TestNeumann(TestConjugateGradient):
    tolerance = 1e-6

    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.Neumann(num_terms=400, step_size=None, power_steps=30))


class TestLBFGSInverse(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.LBFGSInverse(pairs=0, max_steps=60, rtol=1e-12))


class TestNystrom(TestConjugateGradient):
    tolerance = 1e-6

    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.Nystrom(rank=50, rho=1e-9))


class TestFixedPoint(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.GMRES(max_steps=80, rtol=1e-13), condition=nestor.FixedPoint())


class TestFixedPointDense(TestConjugateGradient):
    def make(self) -> nestor.Response:
        return nestor.Implicit(solver=nestor.DenseSolve(), condition=nestor.FixedPoint())


class TestFiniteDifferenceHessian(TestConjugateGradient):
    tolerance = 1e-4
    twice = False  # its derivative takes the Hessian

    def make(self) -> nestor.Response:
        return nestor.Implicit(
            solver=nestor.DenseSolve(),
            condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian(rel_step=1e-4)),
        )


class TestUnrolled(ResponseContract):
    def make(self) -> nestor.Response:
        return nestor.Unrolled(steps=4)

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return unrolled(lower, cotangent, 4)

    def solved(self, lower: Lower, values: object) -> list[Tensor]:
        return lower.theta


class TestUnrolledTree(TestUnrolled):
    def make(self) -> nestor.Response:
        return nestor.Unrolled(steps=4, checkpoint="tree")


class TestUnrolledNone(TestUnrolled):
    def make(self) -> nestor.Response:
        return nestor.Unrolled(steps=4, checkpoint="none")


class TestForwardUnrolled(TestUnrolled):
    def make(self) -> nestor.Response:
        return nestor.ForwardUnrolled()

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return unrolled(lower, cotangent, 1)


class TestEvolutionStrategies(ResponseContract):
    tolerance = 0.5
    twice = False
    random = True

    def make(self) -> nestor.Response:
        return nestor.EvolutionStrategies(samples=300, sigma=1e-3)

    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        return unrolled(lower, cotangent, 1)


@pytest.mark.parametrize("make", [ridge, logistic])
def test_triangle(make: object) -> None:
    """Implicit = unrolled to convergence = finite difference of the re-solved problem, on strongly convex problems."""
    assert callable(make)
    lower: Lower = make()
    cotangent = torch.linspace(-1, 1, lower.theta[0].numel(), dtype=torch.float64)

    def solve(inputs: Tensor) -> Tensor:
        point = [lower.theta[0].clone()]
        for _ in range(30):
            now = Lower(lower.objective, point, [inputs])
            hessian, _ = now.derivatives()
            t = [point[0].clone().requires_grad_()]
            (g,) = torch.autograd.grad(lower.objective(t, [inputs]), t)
            point = [point[0] - torch.linalg.solve(hessian, g)]
        return point[0]

    inputs = lower.inputs[0].detach().clone().requires_grad_()
    star = solve(inputs.detach())
    dense = nestor.Implicit(solver=nestor.DenseSolve())
    by_implicit = torch.autograd.grad(
        nestor.best_response(lambda t, i: lower.objective([t], [i]), star, inputs, dense), inputs, cotangent
    )[0]
    steps = torch.optim.SGD([lower.theta[0]], lr=0.1)
    by_unrolling = torch.autograd.grad(
        nestor.best_response(
            lambda t, i: lower.objective([t], [i]),
            lower.theta[0],
            inputs,
            nestor.Unrolled(steps=600, checkpoint="tree"),
            optimizer=steps,
        ),
        inputs,
        cotangent,
    )[0]
    by_difference = torch.zeros_like(by_implicit)
    for entry in range(inputs.numel()):
        shift = torch.zeros_like(by_implicit)
        shift[entry] = 1e-5
        ends = [solve(inputs.detach() + sign * shift) @ cotangent for sign in (1, -1)]
        by_difference[entry] = (ends[0] - ends[1]) / 2e-5
    assert (by_implicit - by_difference).norm() <= 1e-6 * by_difference.norm()
    assert (by_unrolling - by_difference).norm() <= 1e-6 * by_difference.norm()
