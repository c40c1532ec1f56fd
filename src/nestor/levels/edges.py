"""The graph of a program: which levels each level reads, depends on, responds to and contains the responses of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from nestor.levels.level import Links
from nestor.levels.peers import levels_above, peers_of
from nestor.levels.signatures import Signature
from nestor.optim.hyperparameters import Learned
from nestor.problem import Problem
from nestor.responses import T1T2, Response


@dataclass(frozen=True, eq=False)
class Declared:
    """A level as its problem declares it, before it is linked to the others.

    Attributes:
        index: Its position in the program, lowest first.
        problem: The declaration.
        loss: The signature of its loss.
        update_reads: The levels that its update rule reads.
        update_takes_step: Whether its update rule has the argument ``step``.
        parameters: The parameters of its module that it optimizes, by their names in ``module.named_parameters()``.
    """

    index: int
    problem: Problem
    loss: Signature
    update_reads: tuple[str, ...]
    update_takes_step: bool
    parameters: Mapping[str, nn.Parameter]

    @property
    def name(self) -> str:
        """Name of the level."""
        return self.loss.level

    @property
    def response(self) -> Response:
        """How the levels above differentiate through its best response."""
        return self.problem.response or T1T2()


def connect(levels: Mapping[str, Declared], learned: Mapping[str, Learned]) -> dict[str, Links]:
    """Link the levels of a program, and check that the links form a program.

    Args:
        levels: The levels, lowest first.
        learned: For each level, the hyperparameters of its optimizer that are variables of other levels.

    Raises:
        ValueError: If a level is linked to no other, gets no gradient, reads levels with different numbers of tasks, or
            cannot start from its ``init``.
    """
    reads = {name: _direct_reads(level, levels) for name, level in levels.items()}
    dependencies = {name: _dependencies(level, levels, reads[name], learned[name]) for name, level in levels.items()}
    _check_connected(levels, reads, dependencies)
    _check_tasks(levels, reads)
    above = levels_above(dependencies)
    links: dict[str, Links] = {}
    for name, level in levels.items():  # lowest first: the links of all levels below are known
        lower, upper = _lower_and_upper_levels(name, dependencies[name], links, above)
        peers = peers_of(name, above)
        links[name] = Links(reads[name], dependencies[name], lower, upper, peers, _init_indices(level, levels))
    for name, level in levels.items():
        if name not in links[name].direct_reads:
            _check_gradient(level, levels, links)
    return {name: replace(own, noted_uppers=_noted_uppers(name, links)) for name, own in links.items()}


def _ordered(names: set[str], levels: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in levels if name in names)


def _direct_reads(level: Declared, levels: Mapping[str, Declared]) -> tuple[str, ...]:
    """List the levels that are arguments of the loss, and the levels whose variables their modules contain.

    A module may contain variables of several levels: a supernet contains both weights and architecture.
    """
    owner = {id(p): other.name for other in levels.values() for p in other.parameters.values()}
    modules = [levels[argument].problem.module for argument in level.loss.levels]
    held = {owner[id(p)] for module in modules for p in module.parameters() if id(p) in owner}
    return _ordered({*level.loss.levels, *held}, levels)


def _dependencies(
    level: Declared, levels: Mapping[str, Declared], reads: Iterable[str], learned: Learned
) -> tuple[str, ...]:
    init = level.problem.init
    found = {*reads, *level.update_reads, *(other for other, *_ in learned.values())}
    return _ordered(found if init is None else {*found, init}, levels)


def _lower_and_upper_levels(
    name: str, dependencies: Iterable[str], links: Mapping[str, Links], above: Mapping[str, set[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the levels below whose responses the objective of a level contains, and the levels above that it reads."""

    def is_below(other: str) -> bool:
        return name in above[other]

    def through(lower: set[str]) -> set[str]:
        return {upper for other in lower for upper in links[other].upper_levels}

    lower = set(filter(is_below, dependencies))
    # If a lower level responds to another level below this one, the response of that level is needed too, even if this
    # level does not read it. A peer to which a lower level responds is a constant.
    while more := set(filter(is_below, through(lower))) - lower:
        lower |= more
    upper = {*dependencies, *through(lower)} & above[name]
    return _ordered(lower, above), _ordered(upper, above)


def _noted_uppers(name: str, links: Mapping[str, Links]) -> tuple[str, ...]:
    """List the levels above that have a peer whose objective contains the response of the level."""
    evaluating: set[str] = set()
    frontier = [name]
    while frontier:
        level = frontier.pop()
        more = {other for other, own in links.items() if level in own.lower_levels} - evaluating
        evaluating |= more
        frontier.extend(more)
    return tuple(upper for upper in links[name].upper_levels if evaluating.intersection(links[upper].peers))


def _init_indices(level: Declared, levels: Mapping[str, Declared]) -> tuple[int, ...]:
    """Match the variables of a level with the variables of its ``init`` level: by name, or else by position."""
    if level.problem.init is None:
        return ()
    init = levels[level.problem.init]
    index_of = {name: index for index, name in enumerate(init.parameters)}
    named = index_of.keys() >= level.parameters.keys()
    found = tuple(index_of[name] for name in level.parameters) if named else tuple(index_of.values())
    shapes = {name: tuple(p.shape) for name, p in level.parameters.items()}
    init_shapes = {name: tuple(p.shape) for name, p in init.parameters.items()}
    in_order = list(init_shapes.values())
    if list(shapes.values()) != [in_order[index] for index in found]:
        raise level.loss.error(
            f"init={init.name!r} cannot start it: its variables are {shapes}, those of {init.name!r} {init_shapes}. "
            "Make one module a copy of the other: copy.deepcopy(module)."
        )
    return found


def _check_connected(
    levels: Mapping[str, Declared], reads: Mapping[str, Iterable[str]], dependencies: Mapping[str, Iterable[str]]
) -> None:
    pairs = [(name, other) for name in levels for other in dependencies[name] if other != name]
    connected = {name for pair in pairs for name in pair}
    for name, level in levels.items():
        if name not in connected and len(levels) > 1:
            raise level.loss.error(
                f"nothing connects the level: it reads {_listing(reads[name])} and no other level reads it. Name the "
                "levels it depends on as arguments of its loss, or leave it out."
            )


def _check_tasks(levels: Mapping[str, Declared], reads: Mapping[str, Iterable[str]]) -> None:
    for name, level in levels.items():
        counts = {other: n for other in reads[name] if (n := levels[other].problem.tasks) is not None}
        if len(set(counts.values())) > 1:
            raise level.loss.error(f"it reads levels with different numbers of tasks: {counts}.")


def _check_gradient(level: Declared, levels: Mapping[str, Declared], links: Mapping[str, Links]) -> None:
    """Check that a level whose loss does not read its own variables gets a gradient through a response."""
    own = links[level.name]
    responding = [name for name in own.lower_levels if level.name in links[name].upper_levels]
    if any(levels[name].response.differentiable or levels[name].problem.init == level.name for name in responding):
        return
    reads = _listing(own.direct_reads)
    if responding:
        raise level.loss.error(
            f"the level gets no gradient: its loss does not read {level.name!r}, and the derivative of the response of "
            f"{_listing(responding)} is zero. Give that level a response such as T1T2()."
        )
    above = [name for name in own.direct_reads if levels[name].index > level.index]
    if above:
        raise level.loss.error(
            f"the level gets no gradient: its loss reads {reads} and not {level.name!r}. Levels are listed lowest "
            f"first; if {level.name!r} is above {above[0]!r}, list {above[0]!r} before it: "
            f"Program({', '.join(f'{name}=...' for name in reversed(list(levels)))})."
        )
    raise level.loss.error(
        f"the level gets no gradient: its loss reads {reads}, and no level below it depends on {level.name!r}. "
        f"Let this loss or the loss of a level below read {level.name!r} (name it as an argument)."
    )


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no level"
