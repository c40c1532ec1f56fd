"""Run under torchrun: derivatives to third order across processes, against those of one process; writes errors."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ending import finish
from torch import Tensor
from torch.autograd import forward_ad

from nestor.distributed.mesh import MeshPlacement
from nestor.levels.placement import Placement
from nestor.optim.update import clip
from nestor.vectors.space import LOCAL

SHAPES = [torch.Size([5]), torch.Size([2, 2]), torch.Size([1])]  # shards of different lengths, and an empty one


class Whole(Placement):
    """This process holds the whole vectors."""

    def to_loss(self, variables):
        return variables

    def gather(self, values):
        return list(values)

    shard = gather


def derivatives(placement: Placement) -> list[Tensor]:
    """Clip a vector; return its pullback at a cotangent, and two derivatives of the pullback in both arguments."""
    generator = torch.Generator().manual_seed(0)
    vectors = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]
    x, u, v, w = ([t.detach().requires_grad_() for t in placement.shard(vector)] for vector in vectors)
    space, count = placement.space, len(SHAPES)

    def value(x: list[Tensor]) -> list[Tensor]:
        """Clip the sum of a function of the entries and the gradient of a loss of the whole variables."""
        with torch.enable_grad():
            whole = placement.to_loss(x)
            loss = sum((t.sin() * t.sum()).sum() for t in whole)
            grads = torch.autograd.grad(loss, x, create_graph=True)
        return clip(space, [a.sin() + g for a, g in zip(x, grads, strict=True)], 0.5)

    def square(a: list[Tensor]) -> list[Tensor]:
        return [t.square() for t in a]

    y = value(x)
    first = torch.autograd.grad(y, x, u, create_graph=True)
    second = torch.autograd.grad(space.dot(square(first), v), [*x, *u], create_graph=True)
    top = space.dot(square(second[:count]), w) + space.dot(second[count:], v)
    third = torch.autograd.grad(top, [*x, *u])
    found = [y, first, second[:count], second[count:], third[:count], third[count:]]
    with forward_ad.dual_level():
        moved = value([forward_ad.make_dual(a, b) for a, b in zip(x, v, strict=True)])
        found.append([forward_ad.unpack_dual(t).tangent for t in moved])
        one = placement.to_loss([forward_ad.make_dual(x[0], v[0]), *x[1:]])
        moved = clip(LOCAL, [t * t.sum() for t in one], 0.5)
        tangents = [forward_ad.unpack_dual(t).tangent for t in moved]
        found.append(placement.shard(tangents))
    return [torch.cat([t.detach().flatten() for t in placement.gather(list(vector))]) for vector in found]


def main(output: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = ["value", "first", "second", "second-cotangent", "third", "third-cotangent", "forward", "forward-one"]
    world, expected = dist.group.WORLD, derivatives(Whole())
    found = {
        "sharded": derivatives(MeshPlacement(SHAPES, world, None)),
        "replicated": derivatives(MeshPlacement(SHAPES, None, world)),
    }
    errors = {
        f"{kind}/{name}": ((a - b).norm() / b.norm()).item()
        for kind, vectors in found.items()
        for name, a, b in zip(names, vectors, expected, strict=True)
    }
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
