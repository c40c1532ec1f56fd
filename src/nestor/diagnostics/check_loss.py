"""The check that the loss of one level is a function of its arguments."""

from collections.abc import Mapping
from typing import Any

from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.levels.function_check import check_function
from nestor.program import Program, evaluator_of


def check_loss(program: Program, level: str, batches: Mapping[str, Any] | None = None) -> None:
    """Check that the loss of a level is a function of its batch, its random numbers and its levels' variables.

    The loss is evaluated and differentiated at a displaced point twice, on the same batch and with the same random
    numbers of torch: once with other tensors in the modules, as responses do it, and once with the same values in the
    modules' own parameters. Nothing changes: not a parameter, a buffer, a ``.grad`` or a generator of torch. An engine
    does the same once for every level below another (``Engine(check=True)``). A level with tasks is not checked.

    Args:
        program: The program.
        level: Name of the level.
        batches: A batch of the level under its name, if its loss takes one; other entries are not read.

    Raises:
        NotAFunctionError: If the two values or the two gradients differ by more than rounding.
        ValueError: If there is no level of that name, or a batch is missing.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda batch, low, top: (low() - batch * top()) ** 2)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
        >>> program = nestor.Program(low=low, top=top)
        >>> nestor.diagnostics.check_loss(program, "low", {"low": torch.tensor(3.0)})  # no error: it is a function
    """
    found = evaluator_of(program).level(level)
    if found.loss.takes_batch and (batches is None or level not in batches):
        raise ValueError(
            f"The loss of level {level!r} takes a batch: check_loss(program, {level!r}, {{{level!r}: batch}})."
        )
    check_function(found, Draw((batches or {}).get(level), Captured.now()))
