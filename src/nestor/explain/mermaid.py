"""The graph of a program as a Mermaid flowchart."""

from collections.abc import Mapping

from nestor.levels.level import Level
from nestor.vectors import algebra


def mermaid(levels: Mapping[str, Level]) -> str:
    """Write the graph. Solid arrows carry best responses to upper levels; dotted arrows constrain lower levels."""
    sizes = {name: algebra.size(level.parameters) for name, level in levels.items()}
    lines = ["flowchart BT", *(f'    {name}["{name}<br/>{size:,} variables"]' for name, size in sizes.items())]
    for name, level in levels.items():
        for other in level.links.direct_reads:
            if levels[other].index < level.index:
                lines.append(f"    {other} -->|best response| {name}")
            elif levels[other].index > level.index:
                lines.append(f"    {other} -.->|constrains| {name}")
        lines += [f"    {name} ---|peers| {peer}" for peer in level.peers if levels[peer].index > level.index]
    return "\n".join(lines) + "\n"
