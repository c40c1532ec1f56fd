"""Errors and warnings, with the level and the step at which they occurred."""

from typing import Self


class NestorError(RuntimeError):
    """A level could not be evaluated, differentiated or stepped.

    Code that raises the error may not know the level or the step. A caller that knows them adds them with
    :meth:`located`. The text of the error begins with what is known, and ends with the section of the page
    Troubleshooting that is about its class.

    Args:
        message: What happened, why, and how to correct it.
        level: Name of the level.
        where: The level's loss, as ``name (file:line)``.
        step: Engine step, counted from 1.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.zeros(2)), lambda low, top: (low() - top()) ** 2)  # no scalar
        >>> top = nestor.Problem(nestor.Variable(torch.zeros(2)), lambda low: low().sum())
        >>> try:
        ...     gradient = nestor.Program(low=low, top=top).hypergradient("top")
        ... except nestor.NestorError as error:
        ...     print(type(error).__name__, error.level)
        LossError low
    """

    def __init__(
        self, message: str, *, level: str | None = None, where: str | None = None, step: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.level, self.where, self.step = message, level, where, step

    def located(self, *, level: str | None = None, where: str | None = None, step: int | None = None) -> Self:
        """Set the attributes that are not set yet; return the same error. ``where`` is the loss of ``level``."""
        if level is None or self.level in (None, level):
            self.level, self.where = self.level or level, self.where or where
        self.step = self.step or step
        return self

    def __str__(self) -> str:
        place = {f"level {self.level!r}": self.level, f"loss {self.where}": self.where, f"step {self.step}": self.step}
        known = ", ".join(text for text, value in place.items() if value)
        return f"{f'[{known}] ' if known else ''}{self.message} (docs/troubleshooting.md#{self.section})"

    @property
    def section(self) -> str:
        """The section of the page Troubleshooting about errors of this class."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__).lower()


class LossError(NestorError):
    """A loss returned a value that cannot be minimised or differentiated.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> problem = nestor.Problem(net, lambda net: net(torch.ones(3, 2)), optimizer=sgd)  # three numbers
        >>> try:
        ...     metrics = nestor.Engine(nestor.Program(net=problem), seed=0).run(1)
        ... except nestor.LossError as error:
        ...     print(error.level, error.step)
        net 1
    """


class NotAFunctionError(LossError):
    """A loss is no function of its arguments: other tensors, or the same ones again, give a value that differs.

    The hypergradient of such a loss is not defined. Usual reasons: random numbers of a generator that nestor does not
    replay, hooks that change gradients, a module that changes its own parameters or reads a copy of them.

    Example:
        >>> generator = torch.Generator()
        >>> noisy = lambda low, top: (low() - top() - torch.randn((), generator=generator)) ** 2
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), noisy)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low())
        >>> try:
        ...     nestor.diagnostics.check_loss(nestor.Program(low=low, top=top), "low")
        ... except nestor.NotAFunctionError as error:
        ...     print("generator of its own" in str(error))
        True
    """


class ReplayError(NestorError):
    """A replayed step of a level differs from the step that was taken, so its derivative would be that of another step.

    Usual reasons: the step depends on something that changes along the run and that no level and no history contains.

    Example:
        >>> class Clamp(nestor.callbacks.Callback):  # a projection that the steps do not contain
        ...     def on_level_step(self, engine, level):
        ...         low.value.data.clamp_(max=0.5)
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.ones(()))
        >>> sgd, adam = torch.optim.SGD(low.parameters(), lr=0.4), torch.optim.Adam(top.parameters())
        >>> response, near = nestor.Unrolled(), lambda low, top: (low() - top()) ** 2
        >>> program = nestor.Program(
        ...     low=nestor.Problem(low, near, optimizer=sgd, unroll_steps=2, response=response),
        ...     top=nestor.Problem(top, lambda low: low(), optimizer=adam),
        ... )
        >>> try:
        ...     metrics = nestor.Engine(program, callbacks=[Clamp()], seed=0).run(2)
        ... except nestor.ReplayError as error:
        ...     print(error.level, top().item())  # nothing was learned from a wrong derivative
        low 1.0
    """


class UnsupportedError(NestorError, ValueError):
    """A program contains something that no response differentiates correctly; raised before the first step.

    Example:
        >>> net, scale = torch.nn.Linear(2, 1), nestor.Variable(torch.ones(()))
        >>> hook = net.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
        >>> low = nestor.Problem(net, lambda net, scale: (net.weight * scale()).square().sum())
        >>> try:
        ...     program = nestor.Program(net=low, scale=nestor.Problem(scale, lambda net: net.weight.sum()))
        ... except nestor.UnsupportedError as error:
        ...     print(error.message.partition(" (")[0])
        the variable 'weight' has a hook
    """


class CheckpointError(NestorError):
    """A checkpoint cannot be written, read, or loaded into this program. The run has not changed.

    Example:
        >>> import pathlib
        >>> folder = pathlib.Path("step-00000001")
        >>> folder.mkdir()
        >>> size = (folder / "manifest.json").write_text("{}")  # without its checksum
        >>> try:
        ...     state = nestor.load_checkpoint(folder)
        ... except nestor.CheckpointError as error:
        ...     print(error.section)
        checkpointerror
    """


class ProcessError(NestorError):
    """The processes that share a run disagree, or one of them does not answer.

    Example:
        >>> error = nestor.ProcessError("Process 1 does not answer.")
        >>> print(error.located(step=4))
        [step 4] Process 1 does not answer. (docs/troubleshooting.md#processerror)
    """


class NonFiniteError(NestorError):
    """A loss, a cotangent, a hypergradient or the result of a step is NaN or infinite.

    Attributes:
        lost: The names of the variables and the optimizer memory that the step has made not finite. It is empty if
            everything is as before the step.

    Example:
        >>> low = nestor.Variable(torch.zeros(()))
        >>> sgd = torch.optim.SGD(low.parameters(), lr=0.1)
        >>> program = nestor.Program(low=nestor.Problem(low, lambda low: low().log(), optimizer=sgd))
        >>> try:
        ...     metrics = nestor.Engine(program, seed=0).run(1)
        ... except nestor.NonFiniteError as error:
        ...     print(error.level, error.lost, low().item())
        low () 0.0
    """

    lost: tuple[str, ...] = ()


class SolverError(NestorError):
    """A linear solver failed: negative curvature, divergence, or a singular matrix.

    Example:
        >>> weight = torch.tensor(1.0, requires_grad=True)
        >>> strict = nestor.Implicit(strict=True)  # by conjugate gradients, at a maximum
        >>> best = nestor.best_response(lambda t, w: -((t - w) ** 2), weight.detach(), weight, strict)
        >>> try:
        ...     slope = torch.autograd.grad(best, weight)
        ... except nestor.SolverError as error:
        ...     print(error.message.partition(",")[0])
        ConjugateGradient met a direction of negative or vanishing curvature
    """


class SingularError(SolverError):
    """The matrix of a linear system is singular, and the right-hand side is not in its range.

    Example:
        >>> weight = torch.tensor(1.0, requires_grad=True)
        >>> dense = nestor.Implicit(solver=nestor.DenseSolve())
        >>> flat = lambda t, w: 0 * t**2 + t * 0 * w  # every t is a minimum
        >>> best = nestor.best_response(flat, weight.detach(), weight, dense)
        >>> try:
        ...     slope = torch.autograd.grad(best, weight)
        ... except nestor.SingularError as error:
        ...     print(error.message.partition(",")[0])
        DenseSolve met a matrix that is singular
    """


class NonFiniteSolveError(SolverError, NonFiniteError):
    """The input or an iterate of a linear solver is not finite.

    Example:
        >>> weight = torch.tensor(1.0, requires_grad=True)
        >>> dense = nestor.Implicit(solver=nestor.DenseSolve())
        >>> best = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, dense)
        >>> try:
        ...     slope = torch.autograd.grad(best, weight, torch.tensor(torch.nan))
        ... except nestor.NonFiniteError as error:  # its other base class, too
        ...     print(type(error).__name__)
        NonFiniteSolveError
    """


class NestorWarning(UserWarning):
    """A program runs, but something in it is probably not what its author means.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", nestor.NestorWarning)  # a run stops at a warning
    """


def note(error: BaseException, place: str) -> None:
    """Add to an exception of the user's code where it was raised; a :class:`NestorError` says so in its text."""
    if isinstance(error, Exception) and not isinstance(error, NestorError):
        error.add_note(f"[{place}]")
