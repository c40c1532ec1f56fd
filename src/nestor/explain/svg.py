"""The graph of a program as a picture that needs no network and no other program."""

from collections.abc import Mapping
from html import escape

from nestor.levels.level import Level
from nestor.vectors import algebra

# Pixels: the box of a level, and the gaps between boxes.
_WIDTH, _HEIGHT, _BESIDE, _BETWEEN, _MARGIN, _LEGEND = 190, 46, 50, 56, 80, 20
_HEAD = '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'


def svg(levels: Mapping[str, Level]) -> str:
    """Draw the graph, the highest level at the top, peers beside each other.

    Solid arrows go up and carry best responses; dotted arrows go down, to the levels that read a level above.
    """
    floors = _floors(levels)
    rows = [[name for name in levels if floors[name] == floor] for floor in range(max(floors.values()) + 1)]
    widest = max(map(len, rows))
    width = 2 * _MARGIN + widest * _WIDTH + (widest - 1) * _BESIDE
    height = _LEGEND + _MARGIN // 2 + len(rows) * _HEIGHT + (len(rows) - 1) * _BETWEEN
    places = {}
    for floor, names in enumerate(rows):
        left = (width - len(names) * _WIDTH - (len(names) - 1) * _BESIDE) / 2
        top = height - _LEGEND - _MARGIN // 4 - (floor + 1) * _HEIGHT - floor * _BETWEEN
        for position, name in enumerate(names):
            places[name] = (left + position * (_WIDTH + _BESIDE), top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<defs>{_HEAD}<path d="M0 0 L8 4 L0 8 z" fill="#555555"/></marker></defs>',
    ]
    for name, level in levels.items():
        for other in level.links.direct_reads:
            if levels[other].index < level.index:
                parts.append(_arrow(places[other], places[name], floors[name] - floors[other], up=True))
            elif levels[other].index > level.index:
                parts.append(_arrow(places[other], places[name], floors[other] - floors[name], up=False))
    for name, level in levels.items():
        left, top = places[name]
        size = algebra.size(level.parameters)
        parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#eaf2f8" '
            f'stroke="#1b6ca8"/><text x="{left + _WIDTH / 2:g}" y="{top + 19:g}" text-anchor="middle" fill="#111111" '
            f'font-weight="bold">{escape(name)}</text><text x="{left + _WIDTH / 2:g}" y="{top + 37:g}" '
            f'text-anchor="middle" fill="#333333">{size:,} variables</text>'
        )
    legend = "solid: best response; dotted: constrains" if len(levels) > 1 else ""
    parts.append(
        f'<text x="{width / 2:g}" y="{height - 8}" text-anchor="middle" fill="#555555" font-size="11">{legend}</text>'
    )
    return "".join([*parts, "</svg>"])


def _floors(levels: Mapping[str, Level]) -> dict[str, int]:
    """Return the floor of each level: one above the highest of the levels that it stands on."""
    floors: dict[str, int] = {}
    for name, level in levels.items():
        below = [other for other in level.links.direct_reads if levels[other].index < level.index]
        below += [other for other in floors if name in levels[other].links.direct_reads]
        floors[name] = max((floors[other] + 1 for other in below), default=0)
    return floors


def _arrow(start: tuple[float, float], end: tuple[float, float], distance: int, *, up: bool) -> str:
    """Draw an arrow between two boxes; one that passes others by leaves and enters at the sides."""
    side = -1 if up else 1
    if distance == 1:
        from_x, to_x = (x + _WIDTH / 2 + side * 24 for x in (start[0], end[0]))
        from_y, to_y = (start[1], end[1] + _HEIGHT) if up else (start[1] + _HEIGHT, end[1])
        line = f"M{from_x:g} {from_y:g} L{to_x:g} {to_y:g}"
    else:
        from_x, to_x = (x + (0 if up else _WIDTH) for x in (start[0], end[0]))
        from_y, to_y = start[1] + _HEIGHT / 2, end[1] + _HEIGHT / 2
        bend = side * min(26 * (distance - 1), _MARGIN) * 4 / 3
        line = f"M{from_x:g} {from_y:g} C{from_x + bend:g} {from_y:g} {to_x + bend:g} {to_y:g} {to_x:g} {to_y:g}"
    dash = "" if up else ' stroke-dasharray="3 4"'
    return f'<path d="{line}" fill="none" stroke="#555555" stroke-width="1.6"{dash} marker-end="url(#head)"/>'
