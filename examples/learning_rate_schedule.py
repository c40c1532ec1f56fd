"""A learning-rate schedule that is learned through whole training runs.

The upper level learns the logarithms of 20 learning rates, between which the schedule is linear, the momentum and the
weight decay. The lower level is a training of 300 steps. `Unrolled` differentiates all of them:

    min_s  L_validation(theta_T(s))
    v_t+1 = momentum v_t + grad L_train(theta_t) + decay theta_t;   theta_t+1 = theta_t - rate_t v_t+1
    s = (log rate at 20 knots, logit of the momentum, log decay)

The step is a function of its own, `Problem(update=sgd)`, that reads the schedule and the number of the step. Each upper
step is a new training from another initialisation. With `checkpoint="sqrt"` the response stores 35 states of 300.

Compared with a constant rate and a cosine schedule, both with momentum 0.9, the same step function, and as many
trainings as the learned schedule: peak and decay are the pair of PEAKS x DECAYS with the lowest validation loss. The
learned schedule starts from the constant rate 0.03; its final one is used. `loss` and `accuracy` are means over three
new initialisations, on test images. After 24 upper steps the schedule is not smooth and does not beat cosine (seed 0).

Data: Fashion-MNIST, 5,000 images for training and 2,000 for validation from its training part, 10,000 for test.

Maclaurin, Duvenaud and Adams, Gradient-based hyperparameter optimization through reversible learning, ICML 2015,
section 3.1.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import fmean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam

import nestor
from shared.clothes import Clothes, clothes, cross_entropy, perceptron
from shared.experiment import Case, Experiment, main

STEPS, TRAIN, VALIDATION, BATCH, KNOTS, TRAININGS, NEW = 300, 5_000, 2_000, 100, 20, 24, 3
PEAKS, DECAYS, UPPER_RATE = (0.01, 0.02, 0.04, 0.08, 0.12, 0.18, 0.27, 0.4), (1e-4, 1e-3, 1e-2), 0.15
Hyperparameters = Callable[[int], tuple]  # rate, momentum and decay of a step
SHAPES = {"cosine": lambda share: (1 + math.cos(math.pi * share)) / 2, "constant rate": lambda share: 1.0}


class Schedule(nn.Module):
    """Rate, momentum and decay of a step, from variables."""

    def __init__(self, steps: int, rate: float = 0.03, momentum: float = 0.9, decay: float = 1e-3) -> None:
        super().__init__()
        self.steps = steps
        self.log_rates = nn.Parameter(torch.full((KNOTS,), math.log(rate)))
        self.momentum = nn.Parameter(torch.tensor(math.log(momentum / (1 - momentum))))
        self.log_decay = nn.Parameter(torch.tensor(math.log(decay)))

    def forward(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        place = min(step / (self.steps - 1), 1.0) * (KNOTS - 1)
        knot = min(int(place), KNOTS - 2)
        rate = torch.lerp(self.log_rates[knot], self.log_rates[knot + 1], place - knot).exp()
        return rate, torch.sigmoid(self.momentum), self.log_decay.exp()


def sgd(params, grads, state, schedule, step):  # the step of the lower level, differentiable in the schedule
    rate, momentum, decay = schedule(step)
    grads = [g + decay * p for p, g in zip(params, grads, strict=True)]
    if state is not None:
        grads = [momentum * slot["velocity"] + g for slot, g in zip(state, grads, strict=True)]
    return [p - rate * g for p, g in zip(params, grads, strict=True)], [{"velocity": g} for g in grads]


def learned(case: Case, data: Clothes, trainings: int) -> Hyperparameters:
    """Learn the schedule: each training from a new initialisation is one upper step."""
    schedule, steps, losses = Schedule(len(data.train)), len(data.train), []
    optimizer = Adam(schedule.parameters(), lr=UPPER_RATE, betas=(0.8, 0.99))
    for training in range(trainings):
        program = nestor.Program(
            net=nestor.Problem(perceptron(1000 * case.seed + training), cross_entropy, data=data.train, update=sgd,
                               unroll_steps=steps, response=nestor.Unrolled(checkpoint="sqrt")),
            schedule=nestor.Problem(schedule, cross_entropy, data=[data.validation], optimizer=optimizer),
        )  # fmt: skip
        engine = case.train(f"training {training + 1} of {trainings}", program, steps, check=training == 0)
        losses.append(engine.read_metrics()["schedule/loss"])
    case.note(validation_losses=losses)
    return schedule.requires_grad_(False)


def trained(data: Clothes, schedule: Hyperparameters, seed: int) -> tuple[nn.Module, list[float]]:
    return data.train_with(lambda params, grads, state, step: sgd(params, grads, state, schedule, step), seed)


def searched(case: Case, data: Clothes, trainings: int, name: str) -> Hyperparameters:
    """Return the schedule of a shape with the peak and the decay that are best on the validation images."""

    def make(peak: float, decay: float) -> Hyperparameters:
        return lambda step: (peak * SHAPES[name](step / len(data.train)), 0.9, decay)

    found = {}
    for number, choice in enumerate(list(product(PEAKS, DECAYS))[:trainings]):
        net, _ = trained(data, make(*choice), 1000 * case.seed + number)
        found[choice] = float(cross_entropy(data.validation, net))
    best = min(found, key=found.__getitem__)
    case.note(**{f"{name}, peak and decay": best})
    return make(*best)


def run(case: Case):
    steps, trainings, new = (20, 2, 1) if case.quick else (STEPS, TRAININGS, NEW)
    case.note(steps=steps, trainings=trainings, upper_rate=UPPER_RATE, knots=KNOTS, peaks=PEAKS, decays=DECAYS)
    data = clothes(case.data, case.seed, steps, train=TRAIN, validation=VALIDATION, batch=BATCH)
    schedules, curves = {}, {}
    for name in ("learned", *SHAPES):
        find = learned if name == "learned" else partial(searched, name=name)
        with case.method(name) as method:
            schedules[name] = find(case, data, trainings)
            runs = [trained(data, schedules[name], 1000 * case.seed + 900 + number) for number in range(new)]
        logits, labels = [net(data.test[0]) for net, _ in runs], data.test[1]
        method.report(loss=fmean(float(F.cross_entropy(each, labels)) for each in logits))
        method.report(accuracy=fmean(float((each.argmax(1) == labels).float().mean()) for each in logits))
        curves[name] = [fmean(values) for values in zip(*(losses for _, losses in runs), strict=True)]
    return schedules, curves


def draw(figure: Figure, picture) -> None:
    schedules, curves = picture
    left, right = figure.subplots(1, 2)
    for name, schedule in schedules.items():
        steps = len(curves[name])
        rates, momenta, decays = zip(*(map(float, schedule(step)) for step in range(steps)), strict=True)
        left.plot(rates, label=f"{name}: momentum {momenta[0]:.2f}, decay {decays[0]:.1g}")
        right.plot([fmean(curves[name][max(0, step - 15) : step + 1]) for step in range(steps)], label=name)
    left.set(xlabel="step", ylabel="learning rate", yscale="log", ylim=(1e-4, None))
    right.set(xlabel="step", ylabel="training loss, mean of the last 16 steps", ylim=(None, 1.2))
    for axis in (left, right):
        axis.legend()


EXPERIMENT = Experiment(
    title="A learning-rate schedule learned through whole trainings",
    run=run,
    draw=draw,
    metric="loss",
    ours="learned",
    baselines=("cosine", "constant rate"),
    higher_is_better=False,
    percent=False,
)

if __name__ == "__main__":
    main(EXPERIMENT)
