"""Progress on the terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nestor.callbacks.callback import Callback

if TYPE_CHECKING:
    from nestor.engine import Engine


class Progress(Callback):
    """Show a line for every level, with its steps and latest metrics, and steps per second and time to go.

    Without a terminal it prints one line now and then instead. Metrics are read only when something is shown.

    Args:
        title: Stands before the bar.
        refresh: Seconds between two pictures on a terminal.
        interval: Seconds between two lines without a terminal.
        console: Where to; the standard output by default.

    Raises:
        ValueError: If ``refresh`` or ``interval`` is not positive.
    """

    only_first: ClassVar[bool] = True

    def __init__(
        self, title: str = "", *, refresh: float = 0.25, interval: float = 10.0, console: Console | None = None
    ) -> None:
        if refresh <= 0 or interval <= 0:
            raise ValueError(f"Progress(refresh={refresh}, interval={interval}) must be positive, in seconds.")
        self.title = title
        self.refresh = refresh
        self.interval = interval
        self.console = console or Console()
        self._live: Live | None = None
        self._begin = self._next = 0.0
        self._first = 0

    def on_start(self, engine: Engine) -> None:
        """Begin the display."""
        self._begin = time.monotonic()
        self._first = engine.step
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
            self._next = self._begin
        else:
            self._next = self._begin + self.interval

    def looks_at(self, engine: Engine, step: int) -> bool:
        """At no step in particular: the clock says when."""
        return False

    def on_step(self, engine: Engine) -> None:
        """Show the state when it is time to."""
        if time.monotonic() >= self._next:
            self._show(engine)

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Show the last state; on an error, what was shown last stays."""
        try:
            if error is None:
                self._show(engine)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _show(self, engine: Engine) -> None:
        now = time.monotonic()
        metrics = engine.read_metrics() | {f"validation/{name}": value for name, value in engine.validation.items()}
        done, elapsed = engine.step - self._first, max(now - self._begin, 1e-9)
        rate = done / elapsed
        left = timedelta(seconds=round((engine.target - engine.step) / rate)) if rate else "?"
        if self._live is not None:
            self._live.update(self._picture(engine, metrics, rate, str(left)), refresh=True)
            self._next = now + self.refresh
        else:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "gradient_norm" not in name)
            begin = f"{self.title}: " if self.title else ""
            self.console.print(
                f"{begin}step {engine.step}/{engine.target}  {rate:.1f} steps/s  {left} left  {numbers}",
                soft_wrap=True,
                highlight=False,
            )
            self._next = now + self.interval

    def _picture(self, engine: Engine, metrics: dict[str, float], rate: float, left: str) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=engine.target - self._first, completed=engine.step - self._first, width=32)
        head.add_row(
            Text(self.title, style="bold"), bar, f"{engine.step}/{engine.target}", f"{rate:.1f} steps/s", f"{left} left"
        )
        levels = Table.grid(padding=(0, 2))
        for name, runner in engine.runners.items():
            levels.add_row(Text(f"  {name}", style="cyan"), f"{runner.steps} steps", _numbers(metrics, name))
        if engine.validation:
            levels.add_row(Text("  validation", style="green"), "", _numbers(metrics, "validation"))
        return Group(head, levels)


def _numbers(metrics: dict[str, float], prefix: str) -> str:
    start = f"{prefix}/"
    return "  ".join(
        f"{name.removeprefix(start)} {value:.4g}" for name, value in metrics.items() if name.startswith(start)
    )
