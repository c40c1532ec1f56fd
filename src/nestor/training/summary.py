"""A run in a few lines."""

from collections.abc import Sequence

from rich.table import Table

from nestor.training.callback import Callback
from nestor.training.level_state import LevelState
from nestor.training.run import Run


def summary(run: Run, seed: int, callbacks: Sequence[Callback], *, compiled: bool) -> str:
    """Describe a run: a line for its options, one for each level, and one for the callbacks.

    Args:
        run: The run.
        seed: Its seed.
        callbacks: Its callbacks.
        compiled: Whether steps are compiled where they can be.
    """
    steps = f"{run.step} of {run.last_step}" if run.last_step else f"{run.step}"
    options = [f"step {steps}", f"seed {seed}", repr(run.runtime), *(["compile=True"] if compiled else [])]
    rows = [(name, f"{state.steps} steps", _level(state)) for name, state in run.states.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"Engine({', '.join(options)})"]
    lines += [f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {text}" for name, count, text in rows]
    if callbacks:
        lines.append(f"  callbacks: {', '.join(type(callback).__name__ for callback in callbacks)}")
    return "\n".join(lines)


def level_table(run: Run) -> Table:
    """Tabulate the levels of a run, the highest first, with their last metrics; this waits for the device.

    The table does not check the steps: a number that is not finite stays for the run to report.
    """
    read = {name: state.read_metrics() for name, state in run.states.items()}
    names = list(dict.fromkeys(metric for metrics in read.values() for metric in metrics))
    table = Table("level", "steps", "what", *names, title=f"Engine, step {run.step}")
    for name, state in sorted(run.states.items(), key=lambda item: -item[1].level.index):
        values = (read[name].get(metric) for metric in names)
        shown = ("" if value is None else f"{value:.4g}" for value in values)
        table.add_row(name, f"{state.steps:,}", _level(state), *shown)
    return table


def _level(state: LevelState) -> str:
    level, problem = state.level, state.level.problem
    entries = sum(level.space.lengths(level.parameters))
    rule = problem.optimizer if problem.update is None else problem.update
    parts = [f"{type(problem.module).__name__} of {entries:,}", getattr(rule, "__name__", type(rule).__name__)]
    if level.links.upper_levels:
        parts.append(level.response.describe())
    if problem.unroll_steps > 1:
        parts.append(f"unroll_steps={problem.unroll_steps}")
    precision = level.loss.precision
    if precision is not None and precision.dtype is not None:
        parts.append(str(precision.dtype).removeprefix("torch."))
    return ", ".join(parts)
