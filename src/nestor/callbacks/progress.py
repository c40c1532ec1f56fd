"""The progress of a run on the terminal."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import ClassVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nestor.errors.options import check_options, typed
from nestor.training.callback import Callback
from nestor.training.run import Run


class Progress(Callback):
    """Show a progress bar, steps per second, the time left, and the steps and metrics of every level.

    Without a terminal the callback prints one line every ``interval`` seconds. It reads the metrics only when it shows
    them.

    Args:
        title: Text before the bar.
        refresh: Seconds between two updates on a terminal.
        interval: Seconds between two lines without a terminal.
        console: The console to write to; None is the standard output.

    Raises:
        ValueError: If ``refresh`` or ``interval`` is not positive.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[nestor.callbacks.Progress("fit")], seed=0).run(2)
        fit: step 2/2 ... net/loss 0.5
    """

    only_first: ClassVar[bool] = True

    @typed
    def __init__(
        self, title: str = "", *, refresh: float = 0.25, interval: float = 10.0, console: Console | None = None
    ) -> None:
        self.title, self.refresh, self.interval = title, refresh, interval
        check_options(self, positive=["refresh", "interval"])
        self.console = console or Console()
        self._live: Live | None = None
        self._start_time = self._next_time = 0.0
        # The engine step at which the present process started; a resumed run has an earlier first_step.
        self._start = 0

    def is_due(self, engine: Run, step: int) -> bool:
        return False  # the clock decides when the display is updated

    def on_start(self, engine: Run) -> None:
        self._start_time = self._next_time = time.monotonic()
        self._start = engine.step
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        else:
            self._next_time += self.interval

    def on_step(self, engine: Run) -> None:
        if time.monotonic() >= self._next_time:
            self._show(engine)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        try:
            if error is None:
                self._show(engine)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _show(self, run: Run) -> None:
        now = time.monotonic()
        metrics = run.read_metrics() | {f"validation/{name}": value for name, value in run.validation.items()}
        rate = (run.step - self._start) / max(now - self._start_time, 1e-9)
        left = timedelta(seconds=round((run.last_step - run.step) / rate)) if rate else "?"
        texts = (f"{run.step}/{run.last_step}", f"{rate:.1f} steps/s", f"{left} left")
        if self._live is not None:
            self._live.update(self._picture(run, metrics, texts), refresh=True)
            self._next_time = now + self.refresh
        else:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "gradient_norm" not in name)
            title = f"{self.title}: " if self.title else ""
            self.console.print(f"{title}step {'  '.join(texts)}  {numbers}", soft_wrap=True, highlight=False)
            self._next_time = now + self.interval

    def _picture(self, run: Run, metrics: Mapping[str, float], texts: tuple[str, ...]) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=run.last_step - self._start, completed=run.step - self._start, width=32)
        head.add_row(Text(self.title, style="bold"), bar, *texts)
        levels = Table.grid(padding=(0, 2))
        for name, state in run.states.items():
            levels.add_row(Text(f"  {name}", style="cyan"), f"{state.steps} steps", _numbers(metrics, name))
        if run.validation:
            levels.add_row(Text("  validation", style="green"), "", _numbers(metrics, "validation"))
        return Group(head, levels)


def _numbers(metrics: Mapping[str, float], prefix: str) -> str:
    start = f"{prefix}/"
    return "  ".join(
        f"{name.removeprefix(start)} {value:.4g}" for name, value in metrics.items() if name.startswith(start)
    )
