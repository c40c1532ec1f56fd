"""``nestor doctor``: list the environment and compare hypergradients with closed forms."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
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
    columns = (Column(name, justify="right") for name in ("relative error", "tolerance"))
    title = "Hypergradients of a ridge problem, float64"
    table = Table(Column("response", overflow="fold"), *columns, "", title=title, title_justify="left")
    failures = []
    for name, error, tolerance, failure in checks:
        passed = error <= tolerance
        verdict = "[green]pass[/green]" if passed else "[red]FAIL[/red]"
        table.add_row(escape(name), f"{error:.1e}", f"{tolerance:.0e}", verdict)
        if not passed:
            failures.append(f"{name}: {failure}" if failure else "")
    console.print(table)
    for failure in filter(None, failures):
        console.print(failure, style="red", markup=False, highlight=False)
    if failures:
        console.print(
            f"{len(failures)} of {len(checks)} checks failed: this installation computes wrong hypergradients. Compare "
            "the torch version above with the one in nestor's constraints.txt, and report the two tables.",
            style="red",
        )
        return 1
    console.print(f"All {len(checks)} checks passed.", style="green", highlight=False)
    return 0


def check_closed_forms() -> list[tuple[str, float, float, str]]:
    r"""Compare the hypergradients of several responses with closed forms, in double precision on the CPU.

    Lower: :math:`|Aw - b|^2 / n + \sum_i e^{\lambda_i} w_i^2`; upper: :math:`|Cw - d|^2 / n`. With the Hessian
    :math:`H = 2 A^T A / n + 2\,\mathrm{diag}(e^\lambda)`, the mixed derivative
    :math:`M(w) = 2\,\mathrm{diag}(e^\lambda w)` and the upper gradient :math:`c`, the hypergradient is
    :math:`-M H^{-1} c` exactly, :math:`-M c` by T1-T2, :math:`-\eta M c` by SAMA with gradient descent of rate
    :math:`\eta`. The derivative of unrolled steps follows :math:`dw \leftarrow (I - \eta H) dw - \eta M(w)`.

    Returns:
        For each response: its name, the relative error (NaN if the evaluation failed), the largest relative error that
        passes, and the exception of a failed evaluation (empty otherwise).
    """
    a, b, c, d, penalty = ridge = _ridge()
    hessian, linear = 2 * a.T @ a / len(a) + 2 * penalty.exp().diag(), 2 * a.T @ b / len(a)
    weight = torch.linalg.solve(hessian, linear)
    mixed, upper = 2 * penalty.exp() * weight, 2 * c.T @ (c @ weight - d) / len(c)
    exact, cross = -mixed * torch.linalg.solve(hessian, upper), -mixed * upper
    steps, jacobian = torch.zeros_like(penalty), torch.zeros_like(hessian)
    for _ in range(UNROLL):
        jacobian = jacobian - RATE * (hessian @ jacobian + (2 * penalty.exp() * steps).diag())
        steps = steps - RATE * (hessian @ steps - linear)
    unrolled = jacobian.T @ (2 * c.T @ (c @ steps - d) / len(c))
    cg = Implicit(solver=ConjugateGradient(max_steps=50, rtol=1e-12))
    # The condition number is 20: 1e-9 is far above rounding errors and far below the error of a wrong formula. The
    # regularizer is quadratic in the weights, so the error of a central difference is rounding alone: eps / rel_step.
    cases: Sequence[tuple[str, Response, Tensor, Tensor, float]] = (
        ("T1T2", T1T2(), weight, cross, 1e-12),
        ("FiniteDifference", FiniteDifference(), weight, cross, 1e-9),
        ("Implicit(ConjugateGradient)", cg, weight, exact, 1e-9),
        ("Implicit(DenseSolve)", Implicit(solver=DenseSolve()), weight, exact, 1e-9),
        (f"Unrolled, {UNROLL} steps", Unrolled(), torch.zeros_like(weight), unrolled, 1e-12),
        ("SAMA", SAMA(), weight, RATE * cross, 1e-9),
    )
    checks = []
    for name, response, start, truth, tolerance in cases:
        try:
            (value,) = _program(ridge, start, response).hypergradient("upper").values()
            checks.append((name, float((value - truth).norm() / truth.norm()), tolerance, ""))
        except (NestorError, RuntimeError, ValueError, TypeError) as error:
            checks.append((name, float("nan"), tolerance, f"{type(error).__name__}: {error}"))
    return checks


def _ridge(rows: int = 8, size: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw ``A``, ``b``, ``C``, ``d`` and ``lambda`` of ridge regression with one penalty per weight."""
    shapes = ((rows, size), (rows,), (rows, size), (rows,), (size,))
    generator = torch.Generator().manual_seed(0)
    a, b, c, d, penalty = (torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes)
    return a, b, c, d, penalty - 2


def _program(ridge: tuple[Tensor, ...], weight: Tensor, response: Response) -> Program:
    """Declare the bilevel program of the ridge problem; the lower variables start at ``weight``."""
    a, b, c, d, penalty = ridge
    lower, upper = Variable(weight), Variable(penalty)

    def fit(lower: Any, upper: Any) -> Any:
        return (a @ lower() - b).square().mean() + (upper().exp() * lower().square()).sum()

    def judge(lower: Any) -> Any:
        return (c @ lower() - d).square().mean()

    descent = torch.optim.SGD(lower.parameters(), RATE)
    return Program(
        lower=Problem(lower, fit, optimizer=descent, response=response, unroll_steps=UNROLL),
        upper=Problem(upper, judge),
    )


def _environment() -> Table:
    from nestor import __version__

    columns = Column(style="bold"), Column(overflow="fold")
    table = Table(*columns, title="nestor doctor", title_justify="left", show_header=False)
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
    """List the features that have a private implementation in torch, and whether nestor uses it with this version."""
    table = Table("feature", "in use", title="Private functions of torch", title_justify="left")
    for feature in FEATURES:
        table.add_row(feature.purpose, "public fallback" if feature.private is None else "private")
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
        with warnings.catch_warnings(action="ignore"):  # warnings of other packages on import
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
