"""Which levels of a program are above which, and which are peers."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from nestor.errors import NestorWarning
from nestor.levels.level import Level


def levels_above(dependencies: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    r"""For each level, name the levels above it.

    Of two levels of which one depends on the other, the one listed later is above. The relation is transitive:

    .. math:: k \prec m \iff k = k_0 < k_1 < \dots < k_n = m, \quad
        \text{of } k_{i-1} \text{ and } k_i \text{ one depends on the other}

    Two levels are peers if neither is above the other. The order of listing therefore matters only between levels of
    which one depends on the other.

    Args:
        dependencies: The levels that each level depends on, by name, lowest first.
    """
    names = list(dependencies)
    linked = {name: set(found) for name, found in dependencies.items()}
    for name, found in dependencies.items():
        for other in found:
            linked[other].add(name)
    above: dict[str, set[str]] = {name: set() for name in names}
    for index in reversed(range(len(names))):
        direct = linked[names[index]].intersection(names[index + 1 :])
        above[names[index]] = direct.union(*(above[name] for name in direct))
    return above


def peers_of(name: str, above: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Name the peers of a level, in the order of the program."""
    return tuple(o for o in above if o != name and o not in above[name] and name not in above[o])


def warn_of_coupled_peers(levels: Mapping[str, Level], below: Callable[[str], Sequence[str]]) -> None:
    """Warn if a level is above two peers that a level below them couples.

    Args:
        levels: The levels by name, lowest first.
        below: Names a level and all levels that its objective evaluates.
    """
    for name in levels:
        for one, other, lower in _coupled(name, levels, below):
            warnings.warn(
                f"Level {name!r} is above the peers {one!r} and {other!r}, which level {lower!r} couples: the "
                f"objective of {one!r} contains the response of {lower!r} to {other!r}. The hypergradient of {name!r} "
                "differentiates the response of each peer with the other held constant; their joint equilibrium is "
                "not solved for. If one of them anticipates the other, name it as an argument of the other's loss, "
                "which need not use it: the one that is listed later is then above.",
                NestorWarning,
                stacklevel=3,
            )
            return


def _coupled(
    top: str, levels: Mapping[str, Level], below: Callable[[str], Sequence[str]]
) -> Iterator[tuple[str, str, str]]:
    """List the coupled peers below a level, each pair with the level that couples it.

    A level is coupled to a peer if its objective contains the response of a level that depends on the peer.
    """
    evaluated = below(top)
    # Of a level that does not respond to a level that is evaluated, no response is differentiated.
    responding = {n for n in evaluated if levels[n].response.differentiable and set(levels[n].uppers) & set(evaluated)}
    for one in evaluated:
        for other in levels[one].peers:
            if other in evaluated and responding & {one, other}:
                yield from ((one, other, lower) for lower in below(one) if other in levels[lower].uppers)
