"""The run protocol: what a callback may read and change of a running engine."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nestor.distributed import Runtime
from nestor.responses import Response
from nestor.training.level_state import LevelState


class Run(Protocol):
    """A run, as callbacks see it; :class:`nestor.Engine` implements the protocol.

    Attributes:
        step: Engine steps taken.
        first_step: The value of ``step`` when the current ``engine.run`` began. A resumed run has the ``first_step`` of
            the interrupted run.
        last_step: The value of ``step`` at which the current ``engine.run`` ends. A callback ends the run early by
            setting ``last_step`` to ``step``.
        is_resuming: True if the current ``engine.run`` was called with ``resume=...``.
        states: The state of each level, by level name; ``states[name].level`` is the level.
        validation: The metrics of the last validation.
        validate_every: Engine steps between two validations; 0 if there is none before the end of the run.
        signal: The number of the signal that ends the run after the present step, such as ``signal.SIGTERM``; it is
            equal in all processes. None if no signal was received.
        runtime: The runtime; ``runtime.rank`` is the number of this process.

    Example:
        >>> class StopEarly(nestor.callbacks.Callback):
        ...     def on_step(self, engine: nestor.callbacks.Run) -> None:
        ...         if engine.read_metrics()["net/loss"] < 0.1:
        ...             engine.last_step = engine.step
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, callbacks=[StopEarly()], seed=0)
        >>> metrics = engine.run(100)
        >>> engine.step
        4
    """

    last_step: int

    @property
    def step(self) -> int: ...

    @property
    def first_step(self) -> int: ...

    @property
    def is_resuming(self) -> bool: ...

    @property
    def states(self) -> Mapping[str, LevelState]: ...

    @property
    def validation(self) -> Mapping[str, float]: ...

    @property
    def validate_every(self) -> int: ...

    @property
    def signal(self) -> int | None: ...

    @property
    def runtime(self) -> Runtime: ...

    def read_metrics(self) -> dict[str, float]:
        """Read the last metrics of every level, as ``level/name``; this waits for the device.

        Raises:
            NonFiniteError: If a step since the last reading was not finite.
        """

    def read_all_metrics(self) -> dict[str, float]:
        """Read the last metrics of every level and the measurements of every callback."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""

    def keep_histories(self) -> None:
        """Keep the step histories of the levels after the steps of the levels above; call it in ``on_start``.

        A callback that evaluates hypergradients needs it. Without the call, an upper step may free the gradients that
        its lower levels have recorded.
        """

    def hypergradient(self, level: str, *, response: Response | None = None) -> list[Tensor]:
        """Evaluate the hypergradient of a level at the current point, on the last batches; nothing changes.

        Args:
            level: The level.
            response: The response of all levels below; None uses the response of each level.

        Returns:
            One tensor for each variable of the level; with ``FullySharded``, this process's shard.

        Raises:
            NestorError: If a history was freed; see :meth:`keep_histories`.
        """
