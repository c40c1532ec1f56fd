"""Forecast of the memory of a program's updates, on tensors without values."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from nestor.autodiff.derivatives import reason_of
from nestor.autodiff.instruments import counting, trace
from nestor.autodiff.torch_private import DataDependentError, fake_tensor_mode, tree_map
from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.errors import NestorError
from nestor.explain.peak_memory import PeakMemory
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.needed_history import needed_history
from nestor.levels.planning import planned_history
from nestor.levels.pure_graph import pure_graph
from nestor.optim.history import GradientGraph, HistoryBuilder, LevelHistory
from nestor.optim.kept_graphs import may_keep
from nestor.optim.state import State


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors.

    Attributes:
        held: Bytes that exist between steps: parameters and buffers of the modules, states of the optimizers, the
            histories that responses need, and copies of the variables of peers that share a lower.
        update: By level, the largest number of bytes that exist at one time of an update beyond ``held``.
        mixed: By level, how its mixed derivative is computed, if a response computes one.
        graphs: The levels whose history has the graphs of the steps because they are small.
    """

    held: int
    update: Mapping[str, int]
    mixed: Mapping[str, str]
    graphs: Collection[str] = ()

    @property
    def peak(self) -> int:
        """The largest number of bytes at any time of an engine step."""
        return self.held + max(self.update.values())


def forecast(evaluator: Evaluator, batches: Mapping[str, Any]) -> Memory:
    """Run the updates on tensors that have shapes but no values, and count the bytes that they would allocate.

    Some kernels allocate scratch memory in addition to their tensors. The forecast does not contain it.

    Args:
        evaluator: Evaluates the losses of the program.
        batches: One batch for each level that takes one, by level name.

    Raises:
        ValueError: If a batch is missing.
        NestorError: If a loss or a response reads the value of a tensor, or computes outside torch.
    """
    missing = [name for name, level in evaluator.levels.items() if level.loss.takes_batch and name not in batches]
    if missing:
        raise ValueError(f"explain(batches=...) needs a batch of level {', '.join(map(repr, missing))} too.")
    randomness = Captured.now()
    with fake_tensor_mode() as fake, trace(placeholder=1.0), randomness.replay(), counting() as counts:

        def placeholder(value: Any) -> Any:
            return fake.from_tensor(value) if isinstance(value, Tensor) else value

        variables = {
            name: tuple(fake.from_tensor(p.detach()).requires_grad_() for p in level.parameters)
            for name, level in evaluator.levels.items()
        }
        shapes = evaluator.with_variables(variables)
        given = {name: tree_map(placeholder, batch) for name, batch in batches.items()}
        held = _held(evaluator)
        histories: dict[str, LevelHistory] = {}
        update: dict[str, int] = {}
        graphs: list[str] = []
        try:
            for name, level in shapes.levels.items():
                draws = (Draw(given.get(name), randomness),) * level.problem.accumulate
                slots = _slots(shapes, level)
                planned = planned_history(level, draws, dict(histories))
                graph, size = _small_graph(shapes, planned, level, slots)
                graphs += [name] * (graph is not None)
                owned = name in shapes.single_reader_levels
                histories[name], kept = _taken(planned, level, slots, graph, owned=owned)
                kept += size * len(histories[name].steps)  # each with the variables before its step
                with PeakMemory() as memory, torch.enable_grad():
                    below = {n: _with_gradient(histories[n], shapes.levels[n]) for n in shapes.below(name)[:-1]}
                    shapes.gradient(level, {**below, name: LevelHistory(draws)}, statistics=False, exclusive=True)
                    del below
                update[name] = max(memory.peak, _step(level))
                held += kept + sum(_bytes(v) for slot in slots for v in slot.values() if isinstance(v, Tensor))
        except DataDependentError as error:
            raise NestorError(
                f"The memory cannot be forecast: {getattr(error, 'func', 'an operation')} reads a value, in a loss or "
                "in a solver whose residual decides when it stops. check_hypergradient(...) measures the memory.",
            ) from None
        except NestorError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise NestorError(
                f"The memory cannot be forecast: an operation does not work on tensors without values "
                f"({reason_of(error)}). check_hypergradient(...) measures the memory.",
            ) from error
    mixed = {name: " and ".join(sorted(methods)) for name, methods in counts.methods.items()}
    return Memory(held, update, mixed, graphs)


def taken_steps(
    planned: LevelHistory,
    level: Level,
    state: Callable[[], State] | None = None,
    graph: Callable[[], GradientGraph] | None = None,
) -> HistoryBuilder | None:
    """Record planned steps as if the engine had taken them; None if the level's response needs no history.

    Args:
        planned: The planned steps.
        level: The level.
        state: Returns the state before each step; None records the state before the first step.
        graph: Returns the graph of each step's gradient; None records no graphs.
    """
    spec = needed_history(level)
    if spec is None or not planned.steps:
        return None
    spec = spec.with_graphs() if graph is not None and spec.graphs is None else spec
    builder = HistoryBuilder(replace(spec, offload_to=None))
    total = spec.count(len(planned.steps))
    for count, record in enumerate(planned.steps[:total]):
        builder.note(record, state or planned.states[0], remaining=total - count)
        if graph is not None:
            builder.keep_graph(graph())
    return builder


def _held(evaluator: Evaluator) -> int:
    """Count the bytes of parameters, buffers, variables that are copies of them, and notes of peers' variables."""
    tensors = {
        id(t): t
        for level in evaluator.levels.values()
        for t in (*level.problem.module.parameters(), *level.problem.module.buffers(), *level.parameters)
    }
    noted = {name for level in evaluator.levels.values() for name in level.links.noted_uppers}
    copies = (p for name in noted for p in evaluator.levels[name].parameters)
    return sum(map(_bytes, (*tensors.values(), *copies)))


def _taken(
    planned: LevelHistory,
    level: Level,
    slots: Sequence[Mapping[str, Any]],
    graph: GradientGraph | None,
    *,
    owned: bool,
) -> tuple[LevelHistory, int]:
    """Turn planned steps into the history that an engine would have built; count the bytes of that history.

    ``graph`` stands for the graph of each step, if they are kept; its bytes are not counted.
    An ``owned`` history has a single reader, which frees the gradient if the history stores it in place of the states.
    """
    spec = needed_history(level)
    params = planned.states[0]().params if planned.steps else ()

    def state() -> State:
        return State(params, slots if spec and spec.slots else [{} for _ in slots])

    builder = taken_steps(planned, level, state, None if graph is None else lambda: graph)
    if builder is None or spec is None:
        return planned, 0
    loss = level.loss
    uppers = {n: list(map(torch.zeros_like, loss.variables[n] if n in loss.slots else ())) for n in level.uppers}
    is_freed = owned and not builder.keeps_states
    gradient = [] if is_freed else [torch.ones_like(p) for p in level.parameters]
    builder.took(gradient, uppers if spec.input_gradients and not level.lowers else {})
    history = builder.build(planned.draws, slots=lambda: slots)
    states = [stored().tensors() for stored in history.states.values()] if spec.offload_to is None else []
    kept = [t for tensors in (*states, *history.gradients) for t in tensors if t is not None]
    return history, sum(map(_bytes, kept))


def _small_graph(
    evaluator: Evaluator, planned: LevelHistory, level: Level, slots: Sequence[Mapping[str, Any]]
) -> tuple[GradientGraph | None, int]:
    """Return the graph of a step and its bytes, if the graphs of the steps are kept because they are small."""
    spec = needed_history(level)
    if spec is None or spec.graphs is not None:
        return None, 0
    graph, size = pure_graph(evaluator, level, planned.draws)
    state = State(level.parameters, slots)
    if size is None or not may_keep(size, state, spec.count(len(planned.steps))):
        return None, 0
    return graph, size + sum(map(_bytes, level.parameters))


def _with_gradient(history: LevelHistory, level: Level) -> LevelHistory:
    """Add the gradient of the last step, if the response frees it."""
    if history.slots_after is None or any(history.gradients):
        return history
    return history._replace(gradients=[[torch.ones_like(p) for p in level.parameters]])


def _step(level: Level) -> int:
    """Count the bytes of the gradient and of the tensors that the optimizer's own step creates.

    SGD creates none. The other optimizers of torch create two tensors per variable: for one variable at a time on the
    CPU, for all variables at once elsewhere.
    """
    sizes = [_bytes(p) for p in level.parameters]
    optimizer = level.problem.optimizer
    if optimizer is None or isinstance(optimizer, SGD):
        return sum(sizes)
    in_turn = level.parameters[0].device.type == "cpu"
    return sum(sizes) + 2 * (max(sizes) if in_turn else sum(sizes))


def _slots(evaluator: Evaluator, level: Level) -> Sequence[Mapping[str, Any]]:
    """Return the optimizer state of the level after a step."""
    optimizer = level.problem.optimizer
    if optimizer is None:
        return []
    known = [optimizer.state.get(p, {}) for p in level.stepping.parameters]
    if level.problem.tasks is None and any(known):
        return known
    zeros = [torch.zeros_like(p) for p in level.parameters]
    before = State([p.detach() for p in level.parameters], [{} for _ in level.parameters])
    inputs = {name: evaluator.levels[name].parameters for name in level.links.dependencies}
    with torch.no_grad():
        return level.stepping.rule().differentiable_step(before, zeros, inputs).slots


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
