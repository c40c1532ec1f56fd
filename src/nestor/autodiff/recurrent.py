"""Recurrent layers on dual numbers, written out: values and tangents of each step in one product.

Torch's forward mode takes a recurrent layer apart into the operations of each step and adds the tangents of each, and
its fastest kernel for an LSTM has no forward mode. Here the products with the inputs of all steps, and with both the
weights and their tangents, are one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestor.autodiff.forward_mode import Dual


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent layer.

    Attributes:
        step: Maps the products of the weights with the input and with the last output, and the last state, to the next
            state.
        adds: Whether the two products are added: ``step`` then gets the sum in the place of the second.
        arrange: Puts the gates of a weight into the order that ``step`` expects.
    """

    step: Callable[[Dual, Dual, Sequence[Dual]], Sequence[Dual]]
    adds: bool
    arrange: Callable[[Tensor], Tensor]


def _lstm(given: Dual, gates: Dual, state: Sequence[Dual]) -> Sequence[Dual]:
    r"""LSTM: :math:`c' = f c + i g, \quad h' = o \tanh(c')`, with gates in the order i, f, o, g."""
    _, (c, dc) = state
    size = c.shape[-1]
    sigmoids, g = gates[0][:, : 3 * size].sigmoid(), gates[0][:, 3 * size :].tanh()
    i, f, o = sigmoids.chunk(3, 1)
    di, df, do = _sigmoid_tangent(sigmoids, gates[1][:, : 3 * size]).chunk(3, 1)
    dg = _tanh_tangent(g, gates[1][:, 3 * size :])
    dc = torch.addcmul(df * c, f, dc).addcmul_(di, g).addcmul_(i, dg)
    c = torch.addcmul(f * c, i, g)
    t = c.tanh()
    return (o * t, torch.addcmul(do * t, o, _tanh_tangent(t, dc))), (c, dc)


def _sigmoids_first(weight: Tensor) -> Tensor:
    i, f, g, o = weight.chunk(4)
    return torch.cat((i, f, o, g))


def _gru(given: Dual, recurrent: Dual, state: Sequence[Dual]) -> Sequence[Dual]:
    r"""GRU: :math:`n = \tanh(x_n + r h_n), \quad h' = n + z (h - n)`, with gates in torch's order r, z, n."""
    ((h, dh),) = state
    size = h.shape[-1]
    both = (given[0][:, : 2 * size] + recurrent[0][:, : 2 * size]).sigmoid_()
    r, z = both.chunk(2, 1)
    dr, dz = _sigmoid_tangent(both, given[1][:, : 2 * size] + recurrent[1][:, : 2 * size]).chunk(2, 1)
    hidden, dhidden = recurrent[0][:, 2 * size :], recurrent[1][:, 2 * size :]
    n = torch.addcmul(given[0][:, 2 * size :], r, hidden).tanh_()
    dn = _tanh_tangent(n, torch.addcmul(given[1][:, 2 * size :], dr, hidden).addcmul_(r, dhidden))
    change = h - n
    return ((torch.addcmul(n, z, change), torch.addcmul(dn, dz, change).addcmul_(z, dh - dn)),)


def _sigmoid_tangent(value: Tensor, direction: Tensor) -> Tensor:
    return torch.addcmul(value, value, value, value=-1).mul_(direction)


def _tanh_tangent(value: Tensor, direction: Tensor) -> Tensor:
    return torch.addcmul(direction, value * value, direction, value=-1)


CELLS: Mapping[Any, Cell] = {
    torch.lstm: Cell(_lstm, adds=True, arrange=_sigmoids_first),
    torch.gru: Cell(_gru, adds=False, arrange=lambda weight: weight),
}
"""The kinds of layers that are written out, by torch's function."""


def run_layers(
    cell: Cell,
    x: tuple[Tensor, Tensor | None],
    first: Sequence[Dual],
    weights: Sequence[Dual],
    *,
    biases: bool,
    directions: int,
) -> tuple[Dual, Sequence[Dual]]:
    """Run a network of recurrent layers.

    Args:
        cell: The kind of the layers.
        x: The inputs, of shape (steps, batch, size); their tangent may be None, which means zero.
        first: The first states, each of shape (layers * directions, batch, size).
        weights: The weights in torch's order: for each layer and direction those of the input, those of the output, and
            their biases.
        biases: Whether there are biases.
        directions: 2 for a bidirectional network.

    Returns:
        The outputs of the last layer, and the last states.
    """
    each = 4 if biases else 2
    last: list[Sequence[Dual]] = []
    for start in range(0, len(weights) // each, directions):
        outputs = []
        for index in range(start, start + directions):
            own = weights[index * each : (index + 1) * each]
            states = [(value[index], change[index]) for value, change in first]
            found, end = _run_steps(cell, x, states, own, reverse=index > start)
            outputs.append(found)
            last.append(end)
        x = outputs[0] if directions == 1 else (_cat(outputs, 0), _cat(outputs, 1))
    assert x[1] is not None
    ends = [(_stack(last, state, 0), _stack(last, state, 1)) for state in range(len(first))]
    return (x[0], x[1]), ends


def _cat(pairs: Sequence[Dual], part: int) -> Tensor:
    return torch.cat([pair[part] for pair in pairs], -1)


def _stack(states: Sequence[Sequence[Dual]], index: int, part: int) -> Tensor:
    return torch.stack([state[index][part] for state in states])


def _run_steps(
    cell: Cell,
    x: tuple[Tensor, Tensor | None],
    state: Sequence[Dual],
    weights: Sequence[Dual],
    *,
    reverse: bool,
) -> tuple[Dual, Sequence[Dual]]:
    """Run one layer in one direction."""
    arranged = [(cell.arrange(value), cell.arrange(change)) for value, change in weights]
    (w, _), (u, _) = arranged[:2]
    # Each weight beside its tangent: one product gives the gates, and the part of their tangents that is due to it.
    w_both, u_both, *biases = (torch.cat(pair) for pair in arranged)
    b, e = biases or (None, w.new_zeros(2 * len(w)))
    given = F.linear(x[0].contiguous(), w_both, b)
    if cell.adds:
        given = given + e
    size = len(w)
    if x[1] is not None:
        given[..., size:] += F.linear(x[1].contiguous(), w)
    u, u_both = u.t(), u_both.t()
    values, changes = [state[0][0]] * len(given), [state[0][1]] * len(given)
    for step in range(len(given) - 1, -1, -1) if reverse else range(len(given)):
        h, dh = state[0]
        products = torch.addmm(given[step] if cell.adds else e, h, u_both)
        products[:, size:].addmm_(dh, u)
        state = cell.step(_halves(given[step], size), _halves(products, size), state)
        values[step], changes[step] = state[0]
    return (torch.stack(values), torch.stack(changes)), state


def _halves(both: Tensor, size: int) -> Dual:
    return both[:, :size], both[:, size:]
