"""The interface of a runtime, and the runtime of one process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nestor.errors.options import typed
from nestor.levels.evaluator import Evaluator


class Runtime(ABC):
    """Places a program on devices and processes.

    Attributes:
        rank: The number of this process among those that share each batch.
        size: The number of processes that share each batch.
        holds_variables: Whether the variables are outside the modules during a run, so that :meth:`begin` and
            :meth:`end` move them.

    Example:
        >>> class Announce(nestor.Runtime):
        ...     def place(self, evaluator):
        ...         print("levels:", *evaluator.levels)
        ...         return evaluator
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, runtime=Announce())
        levels: net
    """

    rank: int = 0
    size: int = 1
    holds_variables: bool = False

    @abstractmethod
    def place(self, evaluator: Evaluator) -> Evaluator:
        """Return the evaluator of the program as this process runs it. The engine calls it once."""

    def data(self, data: Any) -> Any:
        """Return the data from which this process draws, so that it loads its share of each batch only."""
        return data

    def share(self, batch: Any) -> Any:
        """Return this process's share of a batch that was loaded whole."""
        return batch

    def compare(self, what: str, description: Mapping[str, Any]) -> None:  # noqa: B027
        """Check that all processes are about to do the same.

        Args:
            what: What this process is about to do.
            description: What must be equal in all processes, by name.

        Raises:
            ProcessError: If a process differs or does not arrive; it names the process and the difference.
        """

    def agree(self, number: int) -> int:
        """Return the number that the first process holds."""
        return number

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""
        return flag

    def mean(self, numbers: list[float]) -> list[float]:
        """Average numbers over processes."""
        return numbers

    def begin(self) -> None:  # noqa: B027
        """Take the variables from the modules, at the start of a run."""

    def end(self) -> None:  # noqa: B027
        """Write the variables to the modules, at the end of a run."""

    def end_after(self, error: BaseException) -> None:  # noqa: B027
        """Write the variables to the modules after an error, if all processes can."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def as_in_a_run(self) -> AbstractContextManager[None]:
        """Return a context in which the variables are where they are during a run, for what changes them in place."""
        return nullcontext()

    def whole_modules(self) -> AbstractContextManager[None]:
        """Return a context in which the modules hold whole variables, for validation, saving and loading."""
        return nullcontext()


class SingleDevice(Runtime):
    """Moves the program's modules to one device; each batch is moved to the device of its level.

    Args:
        device: The device. None takes the accelerator if there is one and all modules are on the CPU; otherwise the
            modules are not moved.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> nestor.Engine(program, runtime=nestor.SingleDevice("cpu")).runtime
        SingleDevice('cpu')
    """

    @typed
    def __init__(self, device: torch.device | str | None = None) -> None:
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"SingleDevice(device={device!r}): {error}") from None

    def __repr__(self) -> str:
        return f"SingleDevice({'' if self.device is None else repr(str(self.device))})"

    def place(self, evaluator: Evaluator) -> Evaluator:
        """Move the modules in place, so that the optimizers keep their parameters."""
        device, modules = self.device, [level.problem.module for level in evaluator.levels.values()]
        if device is None and all(p.device.type == "cpu" for module in modules for p in module.parameters()):
            device = torch.accelerator.current_accelerator(check_available=True)
        if device is not None:
            for module in modules:
                module.to(device)
        return evaluator
