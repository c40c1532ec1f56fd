"""The trained modules as files that other libraries read."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from nestor.callbacks.ema import EMA
from nestor.errors.options import is_integer, typed
from nestor.levels.level import Level
from nestor.training.callback import Callback
from nestor.training.run import Run
from nestor.training.weight_files import check_weights, write_weights


class SaveWeights(Callback):
    """Write the modules of levels as safetensors, at the end of a run and during it.

    The file ``<level>.safetensors`` contains all entries of the module's ``state_dict``, under their own names. A
    module of transformers or peft, which has ``save_pretrained``, also gets the folder ``<level>`` that its
    ``from_pretrained`` reads. The variables of a level with tasks are stacked: each has a leading dimension of tasks.
    Files are replaced when the new ones are complete. Unlike :class:`Checkpoint`, the files hold no state of the run.

    Args:
        folder: The folder of the files; it is created if it does not exist.
        levels: The names of the levels to write, or one name; None writes all.
        every: Engine steps between two writings; 0 writes at the end of a run only. A run that an error ends writes
            nothing at its end.
        average: Writes the averages of this callback, for the levels that it averages.

    Raises:
        ValueError: If ``every`` is negative; in the run, if there is no such level, or an entry is no dense tensor of a
            type that safetensors knows.

    Example:
        >>> from safetensors.torch import load_file
        >>> net = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net.weight.square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[nestor.callbacks.SaveWeights("weights")], seed=0).run(2)
        >>> net.load_state_dict(load_file("weights/net.safetensors"))
        <All keys matched successfully>
    """

    @typed
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        levels: str | Sequence[str] | None = None,
        every: int = 0,
        average: EMA | None = None,
    ) -> None:
        if not is_integer(every) or every < 0:
            raise ValueError(f"SaveWeights(every={every!r}) must be an integer of at least 0.")
        self.folder, self.every, self.average = Path(folder), every, average
        self.levels = [levels] if isinstance(levels, str) else levels

    def is_due(self, engine: Run, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def on_start(self, engine: Run) -> None:
        if unknown := [name for name in self.levels or () if name not in engine.states]:
            known = ", ".join(engine.states)
            raise ValueError(f"SaveWeights(levels={unknown!r}): the levels of the program are {known}.")
        check_weights(self._chosen(engine).values(), engine.runtime)

    def on_step(self, engine: Run) -> None:
        if self.is_due(engine, engine.step):
            self.save(engine)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if error is None:
            self.save(engine)

    def save(self, engine: Run) -> None:
        """Write the files now. With several processes, all processes must call this method."""
        with nullcontext() if self.average is None else self.average.in_modules():
            write_weights(self.folder, self._chosen(engine), engine.runtime)

    def _chosen(self, engine: Run) -> Mapping[str, Level]:
        return {n: state.level for n, state in engine.states.items() if self.levels is None or n in self.levels}
