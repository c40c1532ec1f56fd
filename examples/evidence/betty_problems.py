"""Meta-Weight-Net by Betty, with each of its hypergradients: as a training, and as a function of two batches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.hypergradient import jvp_fn_mapping
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from evidence.meta_weight_net import weighted_loss
from shared.batches import Batches
from shared.noisy_clothes import BATCH, Labelled, plain_loss


@dataclass(frozen=True)
class Method:
    """One of Betty's hypergradients with its number of iterations and its alpha; both of ``darts`` are Betty's own."""

    kind: str
    iterations: int = 0
    alpha: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "darts" else f"{self.kind}({self.iterations}), alpha {self.alpha:g}"

    def config(self) -> Config:
        """Return the configuration of the lower problem."""
        options = {"cg": ("cg_iterations", "cg_alpha"), "neumann": ("neumann_iterations", "neumann_alpha")}
        names = options.get(self.kind, ())
        return Config(type=self.kind, unroll_steps=1, **dict(zip(names, (self.iterations, self.alpha), strict=False)))


class Weight(ImplicitProblem):
    """The upper problem: the loss of the classifier on guide images."""

    def training_step(self, batch: Labelled) -> Tensor:
        return plain_loss(batch, self.classifier.module)


class Classifier(ImplicitProblem):
    """The lower problem: weighted losses."""

    def training_step(self, batch: Labelled) -> Tensor:
        return weighted_loss(batch, self.module, self.weight.module)


def engine_of(
    method: Method, optimizers: tuple[Optimizer, Optimizer], modules: tuple[nn.Module, nn.Module],
    parts: tuple[Labelled, Labelled], steps: int,
) -> tuple[Engine, Classifier, Weight]:  # fmt: skip
    """Return Betty's engine with the lower and the upper problem; each pair is that of the lower and the upper."""
    below, above = (Batches(*part, size=BATCH) for part in parts)
    scheduler = CosineAnnealingLR(optimizers[0], max(steps, 1))
    upper = Weight("weight", Config(), module=modules[1], optimizer=optimizers[1], train_data_loader=above)
    lower = Classifier("classifier", method.config(), module=modules[0], optimizer=optimizers[0], scheduler=scheduler,
                       train_data_loader=below)  # fmt: skip
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    settings = EngineConfig(train_iters=steps, valid_step=10 * max(steps, 1), strategy="cpu")
    return Engine(config=settings, problems=[upper, lower], dependencies=dependencies), lower, upper


def trained(method: Method, classifier: nn.Module, weight: nn.Module, parts: tuple[Labelled, Labelled], steps: int,
            rates: tuple[float, float], seed: int) -> tuple[nn.Module, nn.Module]:  # fmt: skip
    """Train both modules; return those that Betty trained."""
    torch.manual_seed(seed)
    optimizers = (SGD(classifier.parameters(), lr=rates[0], momentum=0.9, weight_decay=5e-4),
                  Adam(weight.parameters(), lr=rates[1]))  # fmt: skip
    engine, lower, upper = engine_of(method, optimizers, (classifier, weight), parts, steps)
    engine.run()
    return lower.module, upper.module


def hypergradient_function(
    method: Method, classifier: nn.Module, weight: nn.Module, train: Labelled, guide: Labelled
) -> Callable[[Labelled, Labelled], Tensor]:
    """Return Betty's own hypergradient at the present variables, as a function of a training and a guide batch."""
    optimizers = SGD(classifier.parameters(), lr=0.1), Adam(weight.parameters(), lr=1e-3)
    _, lower, upper = engine_of(method, optimizers, (classifier, weight), (train, guide), 0)

    def hypergradient(batch: Labelled, guides: Labelled) -> Tensor:
        lower.cur_batch = batch
        vector = torch.autograd.grad(upper.training_step(guides), lower.trainable_parameters())
        found = jvp_fn_mapping[method.kind](vector, lower, upper, False)
        return torch.cat([tensor.detach().reshape(-1) for tensor in found])

    return hypergradient
