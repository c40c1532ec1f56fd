"""Generated code is compared with the operations of the graph, and not used if it computes something else."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.compilation import generated
from nestor.compilation.arguments import Unsuitable
from nestor.compilation.generated import are_equal, compiled
from nestor.compilation.graph import traced

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(12) % 3


def spectral(x: Tensor, phase: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.exp(1j * phase), n=6)


def smooth(x: Tensor, phase: Tensor) -> Tensor:
    return torch.tanh(x) * phase.sum()


def train(layer: Callable[[Tensor, Tensor], Tensor], *, compile: bool) -> tuple[list[Tensor], dict[str, str]]:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)}).double()
    w = nestor.Variable(torch.zeros(12).double())

    def low(net: Any, w: nn.Module) -> Tensor:
        losses = F.cross_entropy(net["b"](layer(net["a"](X), net["a"].bias[:4])), Y, reduction="none")
        return (torch.sigmoid(w()) * losses).mean()

    def top(net: Any) -> Tensor:
        return F.cross_entropy(net["b"](torch.tanh(net["a"](X.flip(0)))), Y)

    program = nestor.Program(
        net=nestor.Problem(net, low, optimizer=torch.optim.AdamW(net.parameters(), 0.02), unroll_steps=2),
        w=nestor.Problem(w, top, optimizer=torch.optim.Adam(w.parameters(), 0.1)),
    )
    engine = nestor.Engine(program, seed=0, compile=compile)
    engine.run(10)
    return [p.detach().clone() for p in (*net.parameters(), *w.parameters())], engine.eager_reasons


def check_eager(layer: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    """Both levels step eagerly, with the reason, and the run is that without a compiler."""
    with pytest.warns(nestor.NestorWarning, match=reason):
        found, reasons = train(layer, compile=True)
    assert set(reasons) == {"net", "w"}
    wanted, _ = train(layer, compile=False)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_complex_numbers_are_not_compiled() -> None:
    """Torch 2.13 generates wrong code for this Fourier transform."""
    check_eager(spectral, "complex numbers")


def test_other_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = generated.compile_graph

    def wrong(*arguments: Any) -> Callable[..., Sequence[Tensor]]:
        run = right(*arguments)

        def shifted(*tensors: Tensor) -> Sequence[Tensor]:
            return [t * 1.001 if t.is_floating_point() else t for t in run(*tensors)]

        return shifted

    monkeypatch.setattr(generated, "compile_graph", wrong)
    check_eager(smooth, "other numbers than its operations")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_equal(dtype: torch.dtype) -> None:
    """Rounding, results that are not finite, and small results of large numbers are; integers are exact."""
    x = torch.linspace(1, 2, 100, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert are_equal([x * (1 + 100 * eps), x.sum()], [x, x.sum()], [x])
    assert not are_equal([x * (1 + 10 * eps**0.5)], [x], [x])
    assert are_equal([x - x + 4 * eps], [x - x], [1 * x])
    assert not are_equal([x - x + 1e3 * eps], [x - x], [1 * x])
    assert are_equal([x / 0], [-x / 0], [x])
    assert are_equal([torch.ones(2).bool()], [torch.ones(2).bool()], [x])
    assert not are_equal([torch.ones(2).bool()], [torch.zeros(2).bool()], [x])


def test_no_notes_of_the_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """Operations without a C++ shim are called in another way, which concerns nobody."""
    matrix = torch.eye(3) + 1

    def function(a: Tensor) -> list[Tensor]:
        return [torch.linalg.eigh(a + a.T).eigenvalues]

    graph, constants = traced(function, [matrix])
    run = compiled(graph, constants, [matrix])
    torch.testing.assert_close(run(matrix)[0], torch.linalg.eigvalsh(2 * matrix))
    assert "c-shim" not in caplog.text
    with pytest.raises(Unsuitable, match="complex"):
        traced(lambda a: [torch.fft.rfft(a).abs()], [matrix])
