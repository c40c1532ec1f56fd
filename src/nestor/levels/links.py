"""How a level is linked to the other levels of its program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """The levels that one level is linked to, by name, in the order of the program.

    Attributes:
        direct_reads: The levels whose variables its loss reads; usually the level itself is one of them.
        dependencies: The levels that its step depends on: those of ``direct_reads``, those that its update rule reads,
            those whose variables are hyperparameters of its optimizer, and the level of ``Problem(init=...)``.
        lower_levels: The levels below whose best responses its objective contains.
        upper_levels: The levels above on which its objective depends.
        init_indices: For each of its variables, the index of the variable of the level ``Problem(init=...)`` that it
            starts from; empty without ``init``.
    """

    direct_reads: tuple[str, ...]
    dependencies: tuple[str, ...]
    lower_levels: tuple[str, ...]
    upper_levels: tuple[str, ...]
    init_indices: tuple[int, ...]
