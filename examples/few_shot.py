"""Few-shot learning: MAML and its kin on letters of scripts that were not seen before.

A task is five letters: one drawing of each to learn from (5-way 1-shot), five others of each to be judged by. The lower
level adapts a network to the task by a few steps from a start; the upper level learns the start:

    min_theta  mean_i L_query(theta_i)   with   theta_i = T steps on L_support from theta

MAML differentiates the steps (`Unrolled`), FOMAML does not (`FirstOrder`). iMAML adds the squared distance to the start
to the lower loss and differentiates its minimum (`Implicit`). ANIL adapts the head only; all tasks share the body. The
same MAML is written by hand with torch.func (`shared/tasks.py`), on the same tasks: the two should agree. "Pretrained"
is an ordinary classifier of the letters of all training scripts; a new letter goes to the nearest drawing of the task,
by the angle of the features. It takes three steps of 160 images for an update of MAML, which needs about the same time.

MAML does not beat it: a classifier of 3,740 letters has good features early, and 80 updates are few for MAML.

Data: letters of 143 scripts drawn from the Noto fonts and distorted, which is easier than handwriting; 90 scripts for
training, 20 for validation, 33 for the test (300 tasks). The rate of MAML was chosen on the validation scripts from
0.05 and 0.2; the rates of the others were hardly searched (FOMAML 0.2, ANIL 0.4, iMAML 0.1, 0.2 and 0.4).
Finn, Abbeel, Levine, Model-agnostic meta-learning, ICML 2017, section 5.2; Rajeswaran et al., Meta-learning with
implicit gradients, NeurIPS 2019, section 3; Raghu et al., Rapid learning or feature reuse?, ICLR 2020; Chen et al.,
A closer look at few-shot classification, ICLR 2019.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD, Adam

import nestor
from shared.data.glyphs import glyphs
from shared.experiment import Case, Experiment, main
from shared.tasks import Batch, Letters, Network, Tasks, accuracy, maml_by_hand

STEPS, TASKS, UPDATES, META_RATE, STRENGTH = 3, 4, 80, 3e-3, 1.0
RATES = {"MAML": 0.2, "FOMAML": 0.2, "iMAML": 0.2, "ANIL": 0.4}


def fit(batch, fast):  # of the support: what a task is adapted by; of the query: what the start is judged by
    images, labels = batch
    return F.cross_entropy(fast(images), labels)


def fit_near(batch, fast, meta):  # iMAML: the adapted network depends on the start because it stays near
    distance = sum((p - q).square().sum() for p, q in zip(fast.parameters(), meta.parameters(), strict=True))
    return fit(batch, fast) + 0.5 * STRENGTH * distance


def fit_head(batch, fast, meta):  # ANIL: all tasks share the body
    images, labels = batch
    return F.cross_entropy(fast.head(meta.body(images)), labels)


IMPLICIT = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), damping=1.0)
METHODS = {  # loss of the support, loss of the query, derivative of the adaptation
    "MAML": (fit, fit, nestor.Unrolled()),
    "FOMAML": (fit, fit, nestor.FirstOrder()),
    "iMAML": (fit_near, fit, IMPLICIT),
    "ANIL": (fit_head, fit_head, nestor.Unrolled()),
}


def program_of(name: str, tasks: Tasks) -> nestor.Program:
    support_loss, query_loss, response = METHODS[name]
    meta = Network()
    fast = copy.deepcopy(meta)
    if name == "ANIL":
        fast.body = meta.body
    variables = list((fast.head if name == "ANIL" else fast).parameters())
    episodes = nestor.Episodes(tasks, steps=STEPS)  # both levels see the same tasks
    return nestor.Program(
        fast=nestor.Problem(fast, support_loss, data=episodes.support, optimizer=SGD(variables, lr=RATES[name]),
                            unroll_steps=STEPS, init="meta", tasks=TASKS, response=response),
        meta=nestor.Problem(meta, query_loss, data=episodes.query, optimizer=Adam(meta.parameters(), lr=META_RATE)),
    )  # fmt: skip


def pretrain(case: Case, classes: Tensor, steps: int) -> Network:
    network = Network(len(classes))
    optimizer, data = Adam(network.parameters(), lr=META_RATE), Letters(classes, 160)
    program = nestor.Program(fast=nestor.Problem(network, fit, data=data, optimizer=optimizer))
    case.train("pretrained", program, steps)
    return network


def run(case: Case) -> tuple[Batch, Tensor, dict[str, list[float]]]:
    updates, tests, curve_tests = (3, 5, 2) if case.quick else (UPDATES, 300, 40)
    classes, unseen = glyphs(case.data, "train"), glyphs(case.data, "test")
    programs = {}
    for name in (*METHODS, "untrained", "MAML by hand"):
        with case.method(name) as method:
            tasks = Tasks(classes, TASKS, seed=case.seed)
            program = programs[name] = program_of(name if name in METHODS else "MAML", tasks)
            if name in METHODS:
                case.train(name, program, updates * STEPS)
            elif name == "MAML by hand":
                maml_by_hand(program.levels["meta"].problem.module, tasks, updates, STEPS, RATES["MAML"], META_RATE)
            method.report(accuracy=accuracy(unseen, tests, partial(program.adapt, "fast")))
    with case.method("pretrained, nearest drawing") as method:
        network = pretrain(case, classes, 3 * updates)
        method.report(accuracy=accuracy(unseen, tests, network.nearest))
    steps = [0, 1, 2, 3, 5, 8]
    curves = {
        name: [accuracy(unseen, curve_tests, partial(programs[name].adapt, "fast", steps=count)) for count in steps]
        for name in ("MAML", "FOMAML", "iMAML", "ANIL", "untrained")
    }
    case.note(updates=updates, tasks=TASKS, steps=STEPS, rates=RATES, meta_rate=META_RATE, strength=STRENGTH)
    support, query = next(iter(Tasks(unseen, 1, seed=1_000_000)))
    with torch.no_grad():
        guesses = programs["ANIL"].adapt("fast", (support[0][0], support[1][0]))(query[0][0]).argmax(1)
    return (support[0][0], query[0][0]), guesses, {"steps": steps, **curves}


def draw(figure: Figure, picture: tuple[Batch, Tensor, dict[str, list[float]]]) -> None:
    (support, query), guesses, curves = picture
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    rows = torch.cat([support[:, None], query.view(5, 5, *query.shape[1:])], dim=1).transpose(0, 1)
    for row, axes in enumerate(left.subplots(6, 5)):
        for label, axis in enumerate(axes):
            axis.imshow(1 - rows[row, label, 0], cmap="gray")
            axis.set(xticks=[], yticks=[])
            is_right = row == 0 or guesses.view(5, 5)[label, row - 1] == label
            for spine in axis.spines.values():
                spine.set(visible=row > 0, color="tab:green" if is_right else "tab:red", linewidth=1.8)
        axes[0].set_ylabel("shown" if row == 0 else f"query {row}", rotation=0, ha="right", va="center")
    left.suptitle("A task of unseen letters (frames: right or wrong, ANIL)", fontsize=11)
    axis = right.subplots()
    for name in list(curves)[1:]:
        axis.plot(curves["steps"], curves[name], marker="o", ls="--" if name == "untrained" else "-", label=name)
    axis.set(xlabel="steps of adaptation", ylabel="accuracy on unseen letters", title="How fast they adapt (40 tasks)")
    axis.legend()


EXPERIMENT = Experiment(
    title="Few-shot learning of unseen letters",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="MAML",
    baselines=("pretrained, nearest drawing", "untrained", "MAML by hand"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
