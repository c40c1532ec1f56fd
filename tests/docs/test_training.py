"""The code of the training page runs."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def program() -> nestor.Program:
    torch.manual_seed(0)
    net, weights = torch.nn.Linear(3, 1), nestor.Variable(torch.zeros(8))
    x, y = torch.randn(8, 3), torch.randn(8)

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        return (torch.sigmoid(weights()) * (net(batch[0]).squeeze(1) - batch[1]) ** 2).mean()

    return nestor.Program(
        net=nestor.Problem(net, train, data=[(x, y)], optimizer=torch.optim.SGD(net.parameters(), lr=0.1)),
        weights=nestor.Problem(
            weights,
            lambda batch, net: (net(batch[0]).squeeze(1) - batch[1]).square().mean(),
            data=[(x.flip(1), y)],
            optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
        ),
    )


@pytest.mark.parametrize("place", range(1, len(BLOCKS)))  # the first one is for torchrun
def test_blocks_run(place: int, tmp_path: Path) -> None:
    """Each on a small program."""

    def validate(net: Any) -> dict[str, float]:
        return {"error": float(net.weight.detach().norm())}

    namespace: dict[str, Any] = {"nestor": nestor, "program": program(), "folder": tmp_path, "validate": validate}
    namespace["batches"] = {name: level.problem.data[0] for name, level in namespace["program"].levels.items()}
    with warnings.catch_warnings():
        if "compile=True" in BLOCKS[place]:
            warnings.simplefilter("ignore")  # torch's compiler warns of torch's own deprecations
        exec(compile(BLOCKS[place], "docs/training.md", "exec"), namespace)
    if "engine" in namespace:
        assert namespace["engine"].run(1)
        assert namespace["engine"].eager_reasons == {}
