"""``nestor doctor``: list the environment and compare hypergradients with closed forms."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nestor.autodiff.torch_private import FEATURES
from nestor.errors import NestorError
from nestor.problem import Problem
from nestor.program import Program
from nestor.responses import SAMA, T1T2, FiniteDifference, Implicit, Response, Unrolled
from nestor.solvers import ConjugateGradient, DenseSolve
from nestor.variable import Variable

# Module, distribution, and the extra of nestor that installs the distribution.
EXTRAS = (
    ("matplotlib", "matplotlib", "matplotlib"),
    ("tensorboard", "tensorboard", "tensorboard"),
    ("wandb", "wandb", "wandb"),
    ("mlflow", "mlflow", "mlflow"),
    ("transformers", "transformers", "transformers"),
    ("mlxtend", "mlxtend", "demo"),
    ("sklearn", "scikit-learn", "demo"),
)
UNROLL = 5
RATE = 0.05


@dataclass(frozen=True)
class Check:
    """The comparison of one hypergradient with its closed form.

    Attributes:
        name: The response.
        error: Relative error; NaN if the evaluation failed.
        tolerance: Largest relative error that passes.
        failure: The exception of a failed evaluation; empty otherwise.
    """

    name: str
    error: float
    tolerance: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """True if the error is at most the tolerance; False for NaN."""
        return self.error <= self.tolerance


def run_doctor(*, self_test: bool = True) -> int:
    """Print the environment and the checks; return the exit status, 1 if a check fails.

    Args:
        self_test: Whether to compare hypergradients with closed forms.
    """
    console = Console()
    console.print(_environment())
    console.print(_private_functions())
    if not self_test:
        return 0
    checks = check_closed_forms()
    table = Table(title="Hypergradients of a ridge problem, float64", title_justify="left")
    table.add_column("response", overflow="fold")
    table.add_column("relative error", justify="right")
    table.add_column("tolerance", justify="right")
    table.add_column("")
    for check in checks:
        verdict = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
        table.add_row(escape(check.name), f"{check.error:.1e}", f"{check.tolerance:.0e}", verdict)
    console.print(table)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        if check.failure:
            console.print(f"{check.name}: {check.failure}", style="red", markup=False, highlight=False)
    if failed:
        console.print(
            f"{len(failed)} of {len(checks)} checks failed: this installation computes wrong hypergradients. Compare "
            "the torch version above with the one in nestor's constraints.txt, and report the two tables.",
            style="red",
        )
        return 1
    console.print(f"All {len(checks)} checks passed.", style="green", highlight=False)
    return 0


def check_closed_forms() -> list[Check]:
    r"""Compare the hypergradients of several responses with closed forms, in double precision on the CPU.

    Lower: :math:`|Aw - b|^2 / n + \sum_i e^{\lambda_i} w_i^2`; upper: :math:`|Cw - d|^2 / n`. With the Hessian
    :math:`H = 2 A^T A / n + 2\,\mathrm{diag}(e^\lambda)`, the mixed derivative
    :math:`M(w) = 2\,\mathrm{diag}(e^\lambda w)` and the upper gradient :math:`c`, the hypergradient is
    :math:`-M H^{-1} c` exactly, :math:`-M c` by T1-T2, :math:`-\eta M c` by SAMA with gradient descent of rate
    :math:`\eta`. The derivative of unrolled steps follows :math:`dw \leftarrow (I - \eta H) dw - \eta M(w)`.
    """
    problem = _Ridge()
    weight = problem.minimizer()
    mixed, upper = problem.mixed(weight), problem.upper_gradient(weight)
    exact = -mixed * torch.linalg.solve(problem.hessian(), upper)
    cross = -mixed * upper
    cg = ConjugateGradient(max_steps=50, rtol=1e-12)
    # The condition number is 20: 1e-9 is far above rounding errors and far below the error of a wrong formula. The
    # regularizer is quadratic in the weights, so the error of a central difference is rounding alone: eps / rel_step.
    cases: Sequence[tuple[str, Response, Tensor, Tensor, float]] = (
        ("T1T2", T1T2(), weight, cross, 1e-12),
        ("FiniteDifference", FiniteDifference(), weight, cross, 1e-9),
        ("Implicit(ConjugateGradient)", Implicit(solver=cg), weight, exact, 1e-9),
        ("Implicit(DenseSolve)", Implicit(solver=DenseSolve()), weight, exact, 1e-9),
        (f"Unrolled, {UNROLL} steps", Unrolled(), torch.zeros_like(weight), problem.unrolled(), 1e-12),
        ("SAMA", SAMA(), weight, RATE * cross, 1e-9),
    )
    return [_check(problem, *case) for case in cases]


class _Ridge:
    """Ridge regression with one penalty per weight."""

    def __init__(self, rows: int = 8, size: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        self.train = (random(rows, size), random(rows))
        self.test = (random(rows, size), random(rows))
        self.penalty = random(size) - 2

    def program(self, weight: Tensor, response: Response) -> Program:
        """Declare the bilevel program; the lower variables start at ``weight``."""
        lower, upper = Variable(weight), Variable(self.penalty)

        def fit(lower: Any, upper: Any) -> Tensor:
            inputs, targets = self.train
            loss: Tensor = (inputs @ lower() - targets).square().mean() + (upper().exp() * lower().square()).sum()
            return loss

        def judge(lower: Any) -> Tensor:
            inputs, targets = self.test
            loss: Tensor = (inputs @ lower() - targets).square().mean()
            return loss

        descent = torch.optim.SGD(lower.parameters(), RATE)
        return Program(
            lower=Problem(lower, fit, optimizer=descent, response=response, unroll_steps=UNROLL),
            upper=Problem(upper, judge),
        )

    def hessian(self) -> Tensor:
        inputs, _ = self.train
        return 2 * inputs.T @ inputs / len(inputs) + 2 * self.penalty.exp().diag()

    def linear(self) -> Tensor:
        inputs, targets = self.train
        product: Tensor = 2 * inputs.T @ targets / len(inputs)
        return product

    def minimizer(self) -> Tensor:
        weight: Tensor = torch.linalg.solve(self.hessian(), self.linear())
        return weight

    def mixed(self, weight: Tensor) -> Tensor:
        product: Tensor = 2 * self.penalty.exp() * weight
        return product

    def upper_gradient(self, weight: Tensor) -> Tensor:
        inputs, targets = self.test
        return 2 * inputs.T @ (inputs @ weight - targets) / len(inputs)

    def unrolled(self) -> Tensor:
        """Return the hypergradient of ``UNROLL`` steps of gradient descent from zero."""
        hessian, linear = self.hessian(), self.linear()
        weight, jacobian = torch.zeros_like(self.penalty), torch.zeros_like(hessian)
        for _ in range(UNROLL):
            jacobian = jacobian - RATE * (hessian @ jacobian + self.mixed(weight).diag())
            weight = weight - RATE * (hessian @ weight - linear)
        return jacobian.T @ self.upper_gradient(weight)


def _check(problem: _Ridge, name: str, response: Response, weight: Tensor, truth: Tensor, tolerance: float) -> Check:
    try:
        (value,) = problem.program(weight, response).hypergradient("upper").values()
    except (NestorError, RuntimeError, ValueError, TypeError) as error:
        return Check(name, float("nan"), tolerance, failure=f"{type(error).__name__}: {error}")
    return Check(name, float((value - truth).norm() / truth.norm()), tolerance)


def _environment() -> Table:
    from nestor import __version__

    table = Table(title="nestor doctor", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("nestor", f"{__version__} in {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}"),
        ("torch", torch.__version__),
        ("devices", _devices()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("torch.distributed", _backends()),
        ("torch.compile", _compiler()),
    ):
        table.add_row(name, escape(value))
    table.add_section()
    for module, distribution, extra in EXTRAS:
        table.add_row(distribution, _extra(module, distribution, extra))
    return table


def _private_functions() -> Table:
    """List the features for which nestor calls private functions of torch, and whether it does with this version."""
    table = Table(title="Private functions of torch", title_justify="left")
    table.add_column("feature")
    table.add_column("in use")
    for feature in FEATURES:
        table.add_row(feature.purpose, "private" if feature.uses_private else "public fallback")
    return table


def _devices() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu only; no accelerator is available to this build of torch"
    names = [accelerator.type]
    if accelerator.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"cpu; {torch.accelerator.device_count()} x {accelerator.type}: {', '.join(names)}"


def _backends() -> str:
    if not torch.distributed.is_available():
        return "not in this build of torch"
    backends = {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "mpi": torch.distributed.is_mpi_available(),
    }
    return ", ".join(f"{name} {'yes' if is_available else 'no'}" for name, is_available in backends.items())


def _compiler() -> str:
    """Describe what torch.compile needs to build C++ code for the CPU: a compiler and the headers of Python."""
    tried = [name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name]
    compiler = next((path for path in map(shutil.which, tried) if path), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(tried)}): install one (apt install g++, xcode-select --install)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"{compiler}, but {header} is missing: install Python's headers (apt install python3-dev)"
    return f"C++ compiler {compiler}"


def _extra(module: str, distribution: str, extra: str) -> str:
    """Return the version of an optional package, or the reason why it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other packages on import
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return escape(f"not installed: pip install 'nestor[{extra}]'")
        return f"[red]{escape(f'cannot be imported, {error.name} is missing: pip install {error.name}')}[/red]"
    except Exception as error:  # a broken package must not hide the other lines of the table
        return f"[red]{escape(f'cannot be imported: {type(error).__name__}: {error}')}[/red]"
    try:
        return escape(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:  # importable from the path, but not installed
        return "yes, version unknown"
