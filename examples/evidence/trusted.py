"""Hypergradients to trust, on all images of a small problem: of a dense solve, and of a training that goes on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.meta_weight_net import weighted_loss
from shared.noisy_clothes import Labelled, plain_loss

Tensors = list[Tensor]


def flat(tensors: Tensors | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def called(module: nn.Module, values: Tensors | tuple[Tensor, ...], inputs: Tensor) -> Tensor:
    """Call a module with other values of its parameters."""
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (inputs,))


def hessian(network: nn.Module, weight: nn.Module, batch: Labelled) -> Tensor:
    """Return the dense Hessian of the lower loss in the flat variables of the network; the weights are constants."""
    shapes = [parameter.shape for parameter in network.parameters()]
    with torch.no_grad():
        weights = weight(F.cross_entropy(network(batch[0]), batch[1], reduction="none"))
        weights = weights / weights.sum()

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return weights @ F.cross_entropy(called(network, values, batch[0]), batch[1], reduction="none")

    return torch.func.jacrev(torch.func.grad(loss), chunk_size=16)(flat(list(network.parameters())))


def exact(matrix: Tensor, network: nn.Module, weight: nn.Module, train: Labelled, guide: Labelled) -> Tensor:
    """Return ``-M (H + d I)^-1 c``; d is 1.5 times what makes the sum positive definite."""
    variables = list(network.parameters())
    cotangent = flat(torch.autograd.grad(plain_loss(guide, network), variables))
    shift = 1.5 * max(-float(torch.linalg.eigvalsh(matrix)[0]), 1e-3)
    solution = torch.linalg.solve(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype), cotangent)
    gradient = torch.autograd.grad(weighted_loss(train, network, weight), variables, create_graph=True)
    product = torch.cat([g.reshape(-1) for g in gradient]) @ solution
    return -flat(torch.autograd.grad(product, list(weight.parameters())))


def direction(network: nn.Module, weight: nn.Module, theta: Tensors, v: Tensors, batch: Labelled) -> Tensors:
    """Return the gradient that the lower level descends, as a function of its variables and of the weight function.

    The weights do not take part in the gradient, but its derivative goes through them too: where a training goes on, a
    change of the variables changes the losses, and these change the weights.
    """
    losses = F.cross_entropy(called(network, theta, batch[0]), batch[1], reduction="none")
    weights = called(weight, v, losses)
    return list(torch.autograd.grad(losses, theta, grad_outputs=weights / weights.sum(), create_graph=True))


def leaves(tensors: Tensors) -> Tensors:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def continued(
    network: nn.Module, weight: nn.Module, train: Labelled, guide: Labelled, steps: int, rate: float, momentum: float
) -> Tensor:
    """Return the derivative of the guide loss through further steps of SGD with momentum, by the adjoint of each step.

    A step is ``m' = momentum m + g(theta, v)``, ``theta' = theta - rate m'``.
    """
    v, theta = leaves(list(weight.parameters())), [p.detach() for p in network.parameters()]
    buffer, passed = [torch.zeros_like(p) for p in theta], []
    for _ in range(steps):
        passed.append(theta)
        gradient = direction(network, weight, leaves(theta), v, train)
        buffer = [momentum * m + g.detach() for m, g in zip(buffer, gradient, strict=True)]
        theta = [p - rate * m for p, m in zip(theta, buffer, strict=True)]
    last = leaves(theta)
    loss = F.cross_entropy(called(network, last, guide[0]), guide[1])
    of_theta, total = list(torch.autograd.grad(loss, last)), [torch.zeros_like(p) for p in v]
    of_buffer = [torch.zeros_like(p) for p in of_theta]
    for point in reversed(passed):
        at = leaves(point)
        of_buffer = [m - rate * p for m, p in zip(of_buffer, of_theta, strict=True)]
        pulled = torch.autograd.grad(direction(network, weight, at, v, train), [*at, *v], grad_outputs=of_buffer)
        of_theta = [p + q for p, q in zip(of_theta, pulled[: len(at)], strict=True)]
        total = [p + q for p, q in zip(total, pulled[len(at) :], strict=True)]
        of_buffer = [momentum * m for m in of_buffer]
    return flat(total)
