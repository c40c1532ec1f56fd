"""What a program refuses when it is built: the error names level, loss, what was found and what to write instead."""

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, lr_scheduler

import nestor
from nestor import (
    ForwardMode,
    Identity,
    Implicit,
    NestorWarning,
    Problem,
    Program,
    Response,
    UnsupportedError,
    Variable,
)
from nestor.levels.refusals import OF_LEVELS, OF_PROBLEMS
from nestor.training.run import Run

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
Y = torch.tensor([0, 1, 1, 0])

STEPPED = [
    nestor.Unrolled(),
    nestor.Unrolled(checkpoint="none"),
    nestor.ForwardUnrolled(),
    nestor.EvolutionStrategies(),
    nestor.SAMA(),
    Implicit(condition=nestor.FixedPoint(), solver=nestor.GMRES()),
]
UNSTEPPED = [
    nestor.T1T2(),
    nestor.FiniteDifference(),
    nestor.FiniteDifference(reuse=True),
    Implicit(damping=1.0),
    Implicit(solver=nestor.LBFGSInverse(pairs=2, max_steps=3), damping=1.0),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def fit(net: nn.Module, w: Variable) -> Tensor:
    return (torch.sigmoid(w()) * F.cross_entropy(net(X), Y, reduction="none")).mean()


def judge(net: nn.Module, w: Variable) -> Tensor:
    return F.cross_entropy(net(X.flip(1)), Y) + w().square().sum()


def bilevel(
    net: nn.Module, response: Response | None = None, loss: Callable[..., Any] = fit, **options: Any
) -> Program:
    w = Variable(torch.zeros(4, dtype=torch.float64))
    optimizer = options.pop("optimizer", None) or SGD(net.parameters(), lr=0.1)
    return Program(
        net=Problem(net, loss, optimizer=optimizer, response=response, **options),
        w=Problem(w, judge, optimizer=SGD(w.parameters(), lr=0.1)),
    )


def refused(*patterns: str) -> Any:
    """Expect an error that names level and loss, and contains the patterns in order."""
    return pytest.raises(UnsupportedError, match="(?s)" + ".*".join([r"\[level 'net', loss .*\.py:\d+\)\]", *patterns]))


def test_the_error_is_a_value_error() -> None:
    """Whoever catches the errors of a construction catches this one."""
    net = network()
    net[0].weight.register_hook(torch.neg)
    with pytest.raises(ValueError, match="hook"):
        bilevel(net)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("response", [None, nestor.Unrolled(), nestor.FiniteDifference(), nestor.FirstOrder()], ids=str)
def test_hooks_on_variables(register: str, response: Response | None) -> None:
    """Under every response: the level's own steps are wrong too. Without the hook, the program is built."""
    net = network()
    hook = getattr(net[0].weight, register)(lambda tensor: None)
    with refused("'0.weight' has a hook", register, "parametrize", "update="):
        bilevel(net, response)
    hook.remove()
    bilevel(net, response)


def test_hooks_on_variables_above_and_on_constants() -> None:
    """The variables of an upper level count, and parameters that no level optimizes do not."""
    net, w = network(), Variable(torch.zeros(4, dtype=torch.float64))
    net[0].weight.register_hook(torch.neg)
    head = [*net[2].parameters()]
    Program(net=Problem(net, fit, variables=head), w=Problem(w, judge))
    w.value.register_hook(torch.neg)
    with pytest.raises(UnsupportedError, match=r"level 'w'.*'value' has a hook"):
        Program(net=Problem(net, fit, variables=head), w=Problem(w, judge))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_modules(register: str) -> None:
    """Backward hooks are refused; forward hooks are a part of the function."""
    net = network()
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    net[2].register_forward_pre_hook(lambda module, args: args)
    bilevel(net)
    getattr(net[1], register)(lambda *arguments: None)
    with refused("submodule '1' has a backward hook", register, "autograd.Function"):
        bilevel(net)


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
@pytest.mark.parametrize("response", STEPPED, ids=lambda r: r.describe())
def test_step_hooks_under_responses_that_take_steps(register: str, response: Response) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)
    getattr(optimizer, register)(lambda *arguments: None)
    with refused(register, "differentiates steps", "update=", "T1T2"):
        bilevel(net, response, optimizer=optimizer)


@pytest.mark.parametrize("response", UNSTEPPED, ids=lambda r: r.describe())
def test_step_hooks_under_other_responses(response: Response) -> None:
    """Allowed, and right: a run in which the hook bounds the weights equals one in which a callback does."""

    class Bound(nestor.callbacks.Callback):
        def on_level_step(self, engine: Run, level: str) -> None:
            if level == "net":
                bound(net)

    def bound(net: nn.Module) -> None:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.clamp_(-0.2, 0.2)

    found = []
    for by_hook in (True, False):
        net = network()
        optimizer = SGD(net.parameters(), lr=0.5)
        if by_hook:
            optimizer.register_step_post_hook(lambda *arguments, net=net: bound(net))
        program = bilevel(net, response, optimizer=optimizer)
        nestor.Engine(program, seed=0, callbacks=[] if by_hook else [Bound()]).run(5)
        found.append(program.levels["w"].problem.module.value.detach())
        assert max(p.abs().max() for p in net.parameters()) == 0.2
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_step_hooks_of_a_level_that_does_not_respond() -> None:
    """The highest level has a response by default, which nobody uses; stacked tasks never call the hook."""
    net, w = network(), Variable(torch.zeros(4, dtype=torch.float64))
    optimizer = SGD(w.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *arguments: None)
    Program(
        net=Problem(net, fit, response=nestor.Unrolled(), optimizer=SGD(net.parameters(), lr=0.1)),
        w=Problem(w, judge, optimizer=optimizer, response=nestor.Unrolled()),
    )
    hooked = SGD(net.parameters(), lr=0.1)
    hooked.register_step_post_hook(lambda *arguments: None)
    with refused("stacked tasks", "update="):
        bilevel(net, nestor.T1T2(), optimizer=hooked, tasks=2)


def test_step_hooks_in_a_compiled_engine() -> None:
    """A compiled step would leave the hook out: the level steps eagerly, and the hook is called at every step."""
    net, calls = network(), []
    optimizer = SGD(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *arguments: calls.append(arguments))
    with pytest.warns(NestorWarning, match="step hooks"):
        engine = nestor.Engine(bilevel(net, nestor.T1T2(), optimizer=optimizer), seed=0, compile=True)
    engine.run(4)
    assert len(calls) == 4


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP", "fully_shard"])
def test_wrapped_modules(wrapper: str, inside: bool, group: None) -> None:
    """The whole module or a part of it; a reformulation, which copies the module, is refused in the same way."""
    mesh = init_device_mesh("cpu", (1,))
    wrap: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DDP": DistributedDataParallel,
        "FSDP": functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True),
        "fully_shard": functools.partial(fully_shard, mesh=mesh),
    }
    net: nn.Module = network()
    try:
        net = nn.Sequential(wrap[wrapper](net)) if inside else wrap[wrapper](net)
    except RuntimeError as error:  # FSDP needs an accelerator
        pytest.skip(str(error))
    runtime = "DataParallel" if wrapper == "DDP" else "FullySharded"
    for options in ({}, {"reformulation": nestor.F2SA()}):
        with refused("'0'" if inside else "the module is wrapped", "plain module", rf"runtime=nestor\.{runtime}\(\)"):
            bilevel(net, **options)


def test_sharded_parameters(group: None) -> None:
    """Tensor parallelism leaves the class of the module as it is."""
    from torch.distributed.tensor import distribute_module

    net = distribute_module(network(), init_device_mesh("cpu", (1,)))
    with refused("'0.weight' is a DTensor", r"FullySharded\(\)"):
        bilevel(net)


# Compiled modules

TWICE = [
    nestor.T1T2(),
    Implicit(solver=Identity(), cross=ForwardMode()),
    nestor.SAMA(cross=ForwardMode()),
    Implicit(damping=1.0),
    nestor.Unrolled(),
    nestor.ForwardUnrolled(),
    Implicit(
        solver=nestor.DenseSolve(),
        condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian()),
        cross=nestor.ReverseMode(),
        damping=1.0,
    ),
]
ONCE = [
    nestor.FiniteDifference(),
    nestor.SAMA(),
    nestor.FirstOrder(),
    nestor.EvolutionStrategies(samples=2),
    Implicit(condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian()), damping=1.0),
]


def compile_whole(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="aot_eager")  # type: ignore[return-value]


def compile_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


def compile_part(net: nn.Module) -> nn.Module:
    net[0].compile(backend="aot_eager")  # type: ignore[operator]
    return net


def compile_forward(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="aot_eager")  # type: ignore[method-assign]
    return net


WAYS = [compile_whole, compile_in_place, compile_part, compile_forward]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("response", TWICE, ids=lambda r: r.describe())
def test_compiled_modules_and_second_derivatives(way: Callable[[nn.Module], nn.Module], response: Response) -> None:
    with refused("compiled by torch.compile", r"Engine\(program, compile=True\)", r"FiniteDifference\(\)"):
        bilevel(way(network()), response)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("response", ONCE, ids=lambda r: r.describe())
def test_compiled_modules_and_first_derivatives(response: Response) -> None:
    """They are right: the same hypergradient as that of the plain module."""
    found = []
    for way in (compile_whole, lambda net: net):
        net = way(network())
        w = Variable(torch.zeros(4, dtype=torch.float64))
        optimizer = SGD(net.parameters(), lr=0.1)
        program = Program(net=Problem(net, fit, response=response, optimizer=optimizer), w=Problem(w, judge))
        torch.manual_seed(3)
        found.append(program.hypergradient("w")["value"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_what_is_not_compiled() -> None:
    """A module that the compiler leaves out, and one whose level is a constant for the level above."""
    bilevel(torch.compiler.disable(network()), nestor.T1T2())  # type: ignore[arg-type]
    bilevel(compile_whole(network()), nestor.FirstOrder())


def test_compiled_losses_and_upper_modules() -> None:
    """The loss itself; a module above that the lower loss reads; a new response for a program."""
    compiled = torch.compile(fit, backend="aot_eager")
    with refused("the loss is compiled"):
        bilevel(network(), nestor.T1T2(), loss=compiled)
    w = compile_whole(Variable(torch.zeros(4, dtype=torch.float64)))
    with refused("'w' is compiled"):
        Program(net=Problem(network(), fit), w=Problem(w, judge))
    program = bilevel(compile_whole(network()), nestor.FiniteDifference())
    with refused("T1T2 of level 'net' needs second derivatives"):
        program.with_responses({"net": nestor.T1T2()})


def test_compiled_modules_under_exact_nesting() -> None:
    """A level in the middle that differentiates its objective twice also differentiates the responses inside it."""

    def trilevel(nesting: str, middle: Response) -> Program:
        a, b, c = (Variable(torch.ones(2)) for _ in range(3))
        return Program(
            nesting=nesting,
            a=Problem(compile_in_place(a), lambda a, b: (a() - b()).square().sum(), response=nestor.FiniteDifference()),
            b=Problem(b, lambda a, b, c: (a() * b() - c()).square().sum(), response=middle),
            c=Problem(c, lambda b, c: (b() + c()).square().sum()),
        )

    for nesting, middle in itertools.product(("exact", "frozen"), (nestor.T1T2(), nestor.FiniteDifference())):
        if nesting == "exact" and middle == nestor.T1T2():
            with pytest.raises(UnsupportedError, match=r"level 'a'.*T1T2 of level 'b' needs second"):
                trilevel(nesting, middle)
        elif nesting == "frozen" and middle == nestor.T1T2():
            with pytest.raises(UnsupportedError, match=r"level 'b'.*'a' is compiled.*T1T2 of level 'b' needs second"):
                trilevel(nesting, middle)
        else:
            trilevel(nesting, middle)


def test_the_compiler_is_not_imported() -> None:
    """A program is built without torch's compiler and without its distributed modules, which take seconds to import."""
    code = (
        "import sys, torch, nestor; v = nestor.Variable(torch.ones(1)); "
        "nestor.Program(v=nestor.Problem(v, lambda v: v().sum())); slow = ('_dynamo', 'distributed.fsdp'); "
        "print([name for name in slow if f'torch.{name}' in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Embeddings and schedules


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_rescale_themselves(kind: type[nn.Module]) -> None:
    """Refused as a variable, anywhere in the module; allowed as a constant and without max_norm."""
    ids = torch.tensor([[0, 1], [2, 0]])
    w = Variable(torch.zeros(1))

    def loss(net: nn.Module, w: Variable) -> Tensor:
        return (net(ids).square() * w().exp()).sum()

    def program(net: nn.Module, **options: Any) -> Program:
        return Program(net=Problem(net, loss, **options), w=Problem(w, lambda net: net(ids).sum()))

    program(kind(3, 2))
    with refused(rf"the module is an {kind.__name__}\(max_norm=1.0\)", "Leave out max_norm"):
        program(kind(3, 2, max_norm=1.0))
    net = nn.Sequential(kind(3, 2, max_norm=1.0), nn.Linear(2, 2))
    with refused("submodule '0'"):
        program(net)
    program(net, variables=list(net[1].parameters()))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_scale_their_gradient(kind: type[nn.Module]) -> None:
    """Refused as a variable that a level above differentiates; allowed as a constant, and above."""
    ids = torch.tensor([[0, 1], [2, 0]])
    net = nn.Sequential(kind(3, 2, scale_grad_by_freq=True), nn.Linear(2, 2))
    w = Variable(torch.zeros(1))

    def loss(net: nn.Module, w: Variable) -> Tensor:
        return (net(ids).square() * w().exp()).sum()

    with refused(rf"submodule '0' is an {kind.__name__}\(scale_grad_by_freq=True\)", "Leave out scale_grad_by_freq"):
        Program(net=Problem(net, loss), w=Problem(w, lambda net: net(ids).sum()))
    Program(net=Problem(net, loss, variables=list(net[1].parameters())), w=Problem(w, lambda net: net(ids).sum()))
    Program(
        w=Problem(w, lambda w, net: (w() - net(ids).sum()).square().sum()),
        net=Problem(net, lambda net, w: net(ids).sum() * w().sum()),
    )


def plateau(optimizer: SGD) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ReduceLROnPlateau(optimizer)


class ByName(lr_scheduler.ConstantLR):
    """A user's scheduler, which needs the name of a phase."""

    def step(self, phase: str) -> None:  # type: ignore[override]
        super().step()

    def _initial_step(self) -> None:
        self.last_epoch = 0


@pytest.mark.parametrize(("make", "argument"), [(plateau, "metrics"), (ByName, "phase")])
def test_schedulers_that_need_a_metric(make: Callable[[SGD], lr_scheduler.LRScheduler], argument: str) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)
    with refused(rf"\.step needs '{argument}'", "on_validation", r"scheduler\.step"):
        bilevel(net, optimizer=optimizer, scheduler=make(optimizer))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
        ),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], o),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    ],
    ids=["step", "one cycle", "sequential", "chained", "restarts"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_other_schedulers(make: Callable[[SGD], lr_scheduler.LRScheduler]) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)
    nestor.Engine(bilevel(net, optimizer=optimizer, scheduler=make(optimizer)), seed=0).run(2)


def test_a_plateau_is_stepped_by_a_callback() -> None:
    """What the error says to write: the rate falls, once the validation stops improving, as in a loop by hand."""
    net = network()
    optimizer = SGD(net.parameters(), lr=0.5)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    class Plateau(nestor.callbacks.Callback):
        def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
            scheduler.step(metrics["value"])

    program = bilevel(net, optimizer=optimizer)
    nestor.Engine(program, seed=0, callbacks=[Plateau()], validate=lambda net: 1.0, validate_every=1).run(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.Unrolled()], ids=lambda r: r.describe())
def test_differentiable_optimizers(response: Response) -> None:
    """An optimizer that cannot step parameters is named."""
    net = network()
    with refused(r"SGD\(differentiable=True\) cannot step", "Leave it out"):
        bilevel(net, response, optimizer=SGD(net.parameters(), 0.1, differentiable=True))


def test_lazy_modules() -> None:
    """A module without shapes is named; after its first evaluation it is like any other."""
    net = nn.Sequential(nn.Tanh(), nn.LazyLinear(2)).double()
    with refused(r"submodule '1' \(LazyLinear\) has parameters without a shape", r"module\(batch\)"):
        bilevel(net)
    net(X)
    bilevel(net).hypergradient("w")


def test_every_refusal_is_tested() -> None:
    """The lists of refusals, as this file knows them."""
    names = [refusal.__name__ for refusal in (*OF_PROBLEMS, *OF_LEVELS)]
    assert names == [
        "lazy_module",
        "wrapped_module",
        "differentiable_optimizer",
        "scheduler_with_arguments",
        "hooked_variable",
        "hooked_module",
        "hooked_optimizer",
        "compiled_module",
        "changing_embedding",
        "scaled_embedding",
    ]
