"""Hypergradients of Betty and of nestor at the same points, compared with trusted ones.

Betty's table of Meta-Weight-Net has its conjugate gradients and Neumann series up to nine points below its finite
differences. This program asks why, at points of one training: long-tailed Fashion-MNIST (IF 100, every fourth image,
pooled to 7 x 7), a perceptron 49-32-10 in float64, so that the whole Hessian of the lower loss can be computed. At each
point all methods get the same pairs of a training batch and a guide batch of 100 images, as in a run. Their
hypergradients with respect to the weight function are compared with trusted ones, on all images (`trusted.py`):

- `next step`: through one lower step. It is what T1-T2 approximates from batches.
- `exact`: the implicit one, by the dense Hessian, damped until it is positive definite.
- `attached`: `next step` of another loss, in which the weight function's inputs are not detached.
- `continued`: through 100 further lower steps; what a change of the weight function does to a training that goes on.

Run by the environment that holds Betty:

    PYTHONPATH=examples python -m evidence.implicit_solvers [--quick]
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from evidence import trusted
from evidence.betty_problems import Method, hypergradient_function
from evidence.meta_weight_net import attached_loss, load, weighted_loss
from shared.batches import Batches
from shared.evidence import versions
from shared.experiment import ROOT, digest
from shared.noisy_clothes import Labelled, plain_loss
from shared.weight_functions import WeightFunction

PAIRS, BATCH, FURTHER, SEED, SETTING, GUIDE, EVERY = 20, 100, 100, 0, "IF 100", 1_000, 4
POINTS, LOWER_RATE, MOMENTUM, UPPER_RATE = (100, 300, 1_000), 0.1, 0.9, 1e-3
OUTPUT = ROOT / "docs" / "evidence" / "implicit_solvers.json"
BETTY = [
    Method("darts"),
    *(Method("cg", iterations, alpha) for iterations, alpha in ((1, 1.0), (3, 1.0), (10, 1.0), (3, 0.1), (10, 0.1))),
    *(Method("neumann", iterations, alpha) for iterations, alpha in ((1, 1.0), (3, 1.0), (10, 1.0))),
    *(Method("neumann", iterations, alpha) for iterations, alpha in ((3, 0.1), (10, 0.1), (10, 0.01))),
]
_CG, _GGN = nestor.ConjugateGradient, nestor.Stationarity(curvature=nestor.GaussNewton())
ATTACHED = "T1T2, losses attached"
NESTOR: dict[str, nestor.Response] = {
    "T1T2": nestor.T1T2(),
    ATTACHED: nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "CG(3), no damping": nestor.Implicit(solver=_CG(max_steps=3)),
    "CG(3), damping 1": nestor.Implicit(solver=_CG(max_steps=3), damping=1.0),
    "CG(3), Gauss-Newton, damping 0.1": nestor.Implicit(solver=_CG(max_steps=3), condition=_GGN, damping=0.1),
    "Neumann(3), step 0.1": nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.1)),
    "Neumann(10), step from the spectrum": nestor.Implicit(solver=nestor.Neumann(num_terms=10, step_size=None)),
    "MINRES(10)": nestor.Implicit(solver=nestor.MINRES(max_steps=10)),
}
Hypergradient = Callable[[Labelled, Labelled], Tensor]


def perceptron() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Flatten(), nn.Linear(49, 32), nn.ReLU(), nn.Linear(32, 10)).double()


def pooled(part: Labelled, every: int = 1) -> Labelled:
    return F.avg_pool2d(part[0][::every], 4).double(), part[1][::every]


def program(network: nn.Module, weight: nn.Module, train: Labelled, guide: Labelled, loss=weighted_loss, **options):
    """Return the program with a loss of the lower level."""
    return nestor.Program(
        classifier=nestor.Problem(network, loss, data=Batches(*train, size=BATCH), **options,
                                  optimizer=SGD(network.parameters(), lr=LOWER_RATE, momentum=MOMENTUM)),
        weight=nestor.Problem(weight, plain_loss, data=Batches(*guide, size=BATCH),
                              optimizer=Adam(weight.parameters(), lr=UPPER_RATE)),
    )  # fmt: skip


def by_nestor(name: str, network: nn.Module, weight: nn.Module, train: Labelled, guide: Labelled) -> Hypergradient:
    loss = attached_loss if name == ATTACHED else weighted_loss
    built = program(network, weight, train, guide, loss, response=NESTOR[name])

    def hypergradient(batch: Labelled, guides: Labelled) -> Tensor:
        return trusted.flat(list(built.hypergradient("weight", {"classifier": batch, "weight": guides}).values()))

    return hypergradient


def spectrum(matrix: Tensor) -> dict[str, float]:
    values = torch.linalg.eigvalsh(matrix)
    negative = values < -1e-6 * values.abs().max()
    return {"largest": float(values[-1]), "smallest": float(values[0]), "negative": float(negative.double().mean())}


def compare(method: Hypergradient, pairs: list[tuple[Labelled, Labelled]], known: dict[str, Tensor]) -> dict[str, Any]:
    """Return cosines to the trusted hypergradients and norms, a number a pair; what failed or is not finite counts."""
    row: dict[str, Any] = {"norm": [], "failed": 0, **{name: [] for name in known}}
    for batch, guides in pairs:
        try:
            found = method(batch, guides)
        except nestor.NestorError:
            row["failed"] += 1
            continue
        if not found.isfinite().all():
            row["failed"] += 1
            continue
        row["norm"].append(float(f"{found.norm().item():.4g}"))
        for name, reference in known.items():
            row[name].append(round(float(F.cosine_similarity(found, reference, dim=0)), 4))
    return row


def at_point(steps: int, modules: tuple[nn.Module, nn.Module], parts: tuple[Labelled, Labelled], pairs: int) -> Any:
    """Compare all methods at the present point."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(part: Labelled) -> Labelled:
        index = torch.randperm(len(part[1]), generator=generator)[:BATCH]
        return part[0][index], part[1][index]

    drawn = [(draw(parts[0]), draw(parts[1])) for _ in range(pairs)]
    whole = trusted.hessian(*modules, parts[0])
    known = {
        "next step": by_nestor("T1T2", *modules, *parts)(*parts),
        "exact": trusted.exact(whole, *modules, *parts),
        "attached": by_nestor(ATTACHED, *modules, *parts)(*parts),
        "continued": trusted.continued(*modules, *parts, FURTHER, LOWER_RATE, MOMENTUM),
    }
    rows = {f"nestor, {name}": by_nestor(name, *modules, *parts) for name in NESTOR}
    rows |= {f"Betty, {method}": hypergradient_function(method, *modules, *parts) for method in BETTY}
    return {
        "steps": steps,
        "spectrum": {"all images": spectrum(whole), "a batch": spectrum(trusted.hessian(*modules, drawn[0][0]))},
        "trusted": {
            name: {other: round(float(F.cosine_similarity(one, two, dim=0)), 4) for other, two in known.items()}
            for name, one in known.items()
        },
        "rows": {name: compare(row, drawn, known) for name, row in track(rows.items(), f"after {steps} steps")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare hypergradients of Betty and nestor at the same points.")
    parser.add_argument("--quick", action="store_true", help="few images and pairs; writes runs/evidence/solvers.json")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")  # what they say is measured here
    config = {"setting": SETTING, "pairs": PAIRS, "batch": BATCH, "further": FURTHER}
    code, output = {"source": digest(Path(__file__)), "config": config, "versions": versions()}, OUTPUT
    if arguments.quick:
        output = ROOT / "runs" / "evidence" / "solvers.json"
    elif output.exists() and json.loads(output.read_text(encoding="utf-8"))["source"] == code["source"]:
        return
    data = load(arguments.data, SETTING, GUIDE, SEED)
    few = 20 if arguments.quick else EVERY
    parts, points = (pooled(data.all_labelled(), few), pooled(data.guide)), []
    modules = (perceptron(), WeightFunction().double())
    engine = nestor.Engine(program(*modules, *parts), seed=SEED)
    for steps in POINTS[:1] if arguments.quick else POINTS:
        engine.run(steps - engine.step)
        points.append(at_point(steps, modules, parts, 2 if arguments.quick else PAIRS))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**code, "points": points}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
