"""The graph of a program in mermaid's language."""

from __future__ import annotations

from collections.abc import Mapping

from nestor.levels.level import Level
from nestor.vectors import algebra


def mermaid(levels: Mapping[str, Level]) -> str:
    """Draw the graph: solid edges carry best responses upwards, dotted ones constrain levels below."""
    lines = ["flowchart BT"]
    lines += [
        f'    {name}["{name}<br/>{algebra.size(level.parameters):,} variables"]' for name, level in levels.items()
    ]
    for name, level in levels.items():
        for other in level.links.direct_reads:
            if levels[other].index < level.index:
                lines.append(f"    {other} -->|best response| {name}")
            elif levels[other].index > level.index:
                lines.append(f"    {other} -.->|constrains| {name}")
    return "\n".join(lines) + "\n"
