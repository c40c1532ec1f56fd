"""``nestor watch``: show the metrics of a running job in the terminal."""

import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
# Points of a metric that its line shows.
POINTS = 30
# Entries of a JSON line that are neither metrics nor labels of the run.
OWN = ("step", "seconds")


class Tail:
    """Reads a file of JSON lines from where it was read last; an incomplete last line waits for its end."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the new entries; a file that became shorter is read from its beginning."""
        if self._file.stat().st_size < self._offset:
            self._offset = 0
        with self._file.open("rb") as opened:
            opened.seek(self._offset)
            whole, newline, _ = opened.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        entries = []
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line that a kill has cut
            if isinstance(entry, dict):
                entries.append(entry)
        return entries


class State:
    """What is shown of a run: the last step, and the last values of each metric of each level."""

    def __init__(self) -> None:
        self.step, self.seconds, self.label = 0, 0.0, ""
        self.written = time.time()
        self.metrics: dict[str, dict[str, deque[float]]] = defaultdict(
            lambda: defaultdict(lambda: deque(maxlen=POINTS))
        )
        self._rate: deque[tuple[int, float]] = deque(maxlen=50)

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Take new entries of the file."""
        for entry in entries:
            label = ", ".join(f"{k}={v}" for k, v in entry.items() if k not in OWN and "/" not in k)
            if label != self.label or entry.get("step", 0) < self.step:
                self.metrics.clear()
                self._rate.clear()
            self.step, self.seconds, self.label = entry.get("step", self.step), entry.get("seconds", 0.0), label
            self._rate.append((self.step, self.seconds))
            for key, value in entry.items():
                level, slash, metric = key.partition("/")
                if slash and isinstance(value, int | float):
                    self.metrics[level][metric].append(float(value))
        if entries:
            self.written = time.time()

    def table(self) -> RenderableType:
        """Return the table: a row for each metric of each level."""
        table = Table("level", "metric", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("now", justify="right")
        table.add_column("lowest", justify="right")
        table.add_column("highest", justify="right")
        table.add_column(f"last {POINTS} values", no_wrap=True)
        for level, metrics in reversed(list(self.metrics.items())):
            for position, (metric, values) in enumerate(metrics.items()):
                finite = [value for value in values if math.isfinite(value)]
                ends = (f"{min(finite):.4g}", f"{max(finite):.4g}") if finite else ("", "")
                now = Text(f"{values[-1]:.4g}", style="bold" if math.isfinite(values[-1]) else "bold red")
                table.add_row("" if position else level, metric, now, *ends, bars(values))
        steps = f"step {self.step:,}, {self.seconds:,.0f} s"
        speed = self._speed()
        age = time.time() - self.written
        parts = [steps, *([f"{speed:,.3g} steps/s"] if speed else []), *([self.label] if self.label else [])]
        if age > 10:
            parts.append(f"nothing written for {age:,.0f} s")
        return Group(Text(", ".join(parts), style="bold"), table)

    def _speed(self) -> float:
        (first, begin), (last, end) = (
            self._rate[0] if self._rate else (0, 0.0),
            self._rate[-1] if self._rate else (0, 0.0),
        )
        return (last - first) / (end - begin) if end > begin else 0.0


def bars(values: Sequence[float]) -> str:
    """Return a line of bars, from the lowest to the highest of the values; ``x`` is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "x" * len(values)
    low, span = min(finite), max(finite) - min(finite)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "x"
        return BARS[min(int((value - low) / span * len(BARS)), len(BARS) - 1)] if span else BARS[0]

    return "".join(map(bar, values))


def run_watch(*, run: Path, every: float, once: bool) -> int:
    """Show a run until Ctrl-C, or once; return the exit status.

    Args:
        run: A file that :class:`nestor.callbacks.JSONLines` writes, or a folder with one: the one written last.
        every: Seconds between two looks at the file.
        once: Print the present state and end.
    """
    console = Console()
    file = newest(run)
    if file is None:
        console.print(
            f"{run}: there is no *.jsonl file. A run writes one with "
            "Engine(callbacks=[nestor.callbacks.JSONLines(path)]).",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 1
    tail, state = Tail(file), State()
    state.add(tail.read())
    state.written = file.stat().st_mtime
    if once or not console.is_terminal:
        console.print(state.table())
        return 0
    try:
        with Live(state.table(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                state.add(tail.read())
                live.update(state.table(), refresh=True)
    except KeyboardInterrupt:
        return 0


def newest(run: Path) -> Path | None:
    """Return the file of JSON lines at a path: itself, or the one in a folder that was written last."""
    if run.is_file():
        return run
    return max(run.glob("*.jsonl"), key=lambda file: file.stat().st_mtime, default=None)
