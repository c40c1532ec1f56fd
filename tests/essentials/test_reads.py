"""One loss function for several levels: Problem(reads={"argument": "level"})."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor


def loss(batch: Any, model: Any, prior: Any, scale: float = 0.5) -> Tensor:
    """Fit the data near the level above."""
    x, y = batch
    return (model(x) - y).square().mean() + scale * (model.weight - prior.weight).square().sum()


def low(batch: Any, a: Any, b: Any) -> Tensor:
    return loss(batch, a, b)


def middle(batch: Any, b: Any, c: Any) -> Tensor:
    return loss(batch, b, c)


def high(batch: Any, c: Any, a: Any) -> Tensor:
    return loss(batch, c, a)


READS = [{"model": "a", "prior": "b"}, {"model": "b", "prior": "c"}, {"model": "c", "prior": "a"}]
LOSSES: list[Callable[..., Tensor]] = [low, middle, high]


def program_of(shared: bool, **options: Any) -> nestor.Program:
    torch.manual_seed(0)
    problems = {}
    for index, name in enumerate("abc"):
        net = nn.Linear(3, 1).double()
        data = [(torch.randn(5, 3).double(), torch.randn(5, 1).double())]
        chosen: dict[str, Any] = {"loss": loss, "reads": READS[index]} if shared else {"loss": LOSSES[index]}
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        problems[name] = nestor.Problem(net, data=data, optimizer=optimizer, unroll_steps=2, **chosen, **options)
    return nestor.Program(**problems)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.Unrolled()])
def test_three_levels_share_one_loss(response: nestor.Response) -> None:
    """As with three functions: the graph, hypergradients, a run."""
    programs = [program_of(shared, response=response) for shared in (True, False)]
    batches = {name: level.problem.data[0] for name, level in programs[0].levels.items()}  # type: ignore[index]
    for name in "abc":
        assert programs[0].lowers(name) == programs[1].lowers(name)
        assert programs[0].uppers(name) == programs[1].uppers(name)
        one, other = (program.hypergradient(name, batches) for program in programs)
        assert all(torch.equal(one[key], other[key]) for key in other)
    for program in programs:
        nestor.Engine(program, seed=0).run(10)
    for name in "abc":
        assert all(map(torch.equal, *(program.levels[name].parameters for program in programs)))
    assert str(programs[0].explain()) == str(programs[1].explain())


def test_reads_has_precedence_over_a_level_of_the_same_name() -> None:
    """An argument that is named like another level."""
    a, b = (nestor.Variable(torch.tensor(v).double()) for v in (1.0, 2.0))
    program = nestor.Program(
        a=nestor.Problem(a, lambda a, b: (a() - b()) ** 2),
        b=nestor.Problem(b, lambda a, b: a() + 10 * b(), reads={"a": "b", "b": "a"}),
    )
    assert program.objective("b").item() == 12.0


def test_reformulations_read_by_the_mapping() -> None:
    """A penalty calls the losses of both levels."""
    ends = []
    for shared in (True, False):
        x, y = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
        for module in (x, y):
            nn.init.constant_(module.weight, 0.3)
            nn.init.zeros_(module.bias)
        data = [(torch.ones(2, 3).double(), torch.ones(2, 1).double())]
        lower: dict[str, Any] = {"loss": lambda batch, x, y: loss(batch, x, y)}
        upper: dict[str, Any] = {"loss": lambda batch, y, x: loss(batch, y, x)}
        if shared:
            lower = {"loss": loss, "reads": {"model": "x", "prior": "y"}}
            upper = {"loss": loss, "reads": {"model": "y", "prior": "x"}}
        program = nestor.Program(
            x=nestor.Problem(
                x, **lower, data=data, optimizer=torch.optim.SGD(x.parameters(), 0.1), reformulation=nestor.F2SA()
            ),
            y=nestor.Problem(y, **upper, data=data, optimizer=torch.optim.SGD(y.parameters(), 0.1)),
        )
        nestor.Engine(program, seed=0).run(4)
        ends.append([p.detach() for p in (*x.parameters(), *y.parameters())])
    assert all(map(torch.equal, *ends))


def test_errors_name_argument_and_level() -> None:
    net, other = nn.Linear(3, 1), nn.Linear(3, 1)

    def declare(reads: Any) -> nestor.Program:
        return nestor.Program(
            net=nestor.Problem(net, loss, reads=reads),
            other=nestor.Problem(other, lambda batch, net, other: net(batch).sum() + other(batch).sum()),
        )

    with pytest.raises(ValueError, match=r"'net', loss loss \(.*'modle': 'net'.*no argument 'modle'.*'model', 'prior'"):
        declare({"modle": "net", "prior": "other"})
    with pytest.raises(ValueError, match=r"'prior': 'above'.*'above' is the name of no level \('net', 'other'\)"):
        declare({"model": "net", "prior": "above"})
    with pytest.raises(
        ValueError, match=r"the argument 'prior' is the name of no level \(the levels are 'net', 'other'\)"
    ):
        declare({"model": "net"})
    with pytest.raises(ValueError, match="'batch', a level, as its first argument"):
        nestor.Program(net=nestor.Problem(net, loss, data=[1], reads={"batch": "net", "model": "net", "prior": "net"}))
    for reads in ("model", ["model"], {"model": 1}, {1: "net"}):
        with pytest.raises(TypeError, match=r"Problem\(reads=.*\) must "):
            nestor.Problem(net, loss, reads=reads)  # type: ignore[arg-type]
