"""A deep equilibrium on a graph: infinitely many layers in the memory of one.

Few digits are labelled, and the others are reached along a graph of nearest neighbours. The state of all digits is the
equilibrium of one layer, which averages neighbours (A), mixes channels (W) and adds the pixels (U x):

    min_{W, U, V}  CE(V Z*, y)   with   Z* = tanh(A Z* W^T + X U^T)

The forward pass iterates the layer without a graph until nothing changes. `nestor.fixed_point` attaches the result to
the parameters by the implicit function theorem; GMRES solves the linear system of the backward pass. W is scaled to a
spectral norm of at most 0.95 and A averages, so the equilibrium exists and is unique.

Beside it, with the same parameters, optimizer and steps: the same layer applied 2 times and 30 times, with ordinary
backpropagation, and the layer without the graph. `kept` is the largest memory in MiB of the tensors that autograd keeps
in one step. The learning rate of each method (0.003, 0.01) and its step are chosen on the validation digits; the
test digits are all the others.

Data: 3,000 images of MNIST, 10 labelled for each digit in training and 10 in validation; the graph joins a digit to its
10 nearest. Gu, Chang, Zhu, Sojoudi, El Ghaoui, Implicit graph neural networks, NeurIPS 2020, section 4; Bai, Kolter,
Koltun, Deep equilibrium models, NeurIPS 2019, section 3.1.
"""

from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam

import nestor
from shared.experiment import Case, Experiment, main
from shared.graphs import Accuracies, Digits, digit_graph
from shared.saved_tensors import SavedTensors

WIDTH, NEIGHBOURS, LABELLED, CONTRACTION, TOLERANCE, RATES = 32, 10, 10, 0.95, 1e-4, (0.003, 0.01)
EQUILIBRIUM, SHALLOW, DEEP, PIXELS = "equilibrium", "2 layers", "30 layers", "no graph"
LAYERS = {EQUILIBRIUM: None, SHALLOW: 2, DEEP: 30, PIXELS: 1}


class Layer(nn.Module):  # returns the next state of all digits
    def __init__(self, graph: Tensor, pixels: int) -> None:
        super().__init__()
        self.graph = graph
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.enter = nn.Linear(pixels, WIDTH)

    def forward(self, state: Tensor, inputs: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(self.mix, 2)
        mix = CONTRACTION * self.mix / norm.clamp(min=CONTRACTION)
        return torch.tanh(self.graph @ state @ mix.T + self.enter(inputs))


class Network(nn.Module):
    """A number of equal layers, or their equilibrium (``layers=None``), and a linear classifier."""

    def __init__(self, graph: Tensor, pixels: int, layers: int | None) -> None:
        super().__init__()
        self.layer, self.head, self.layers = Layer(graph, pixels), nn.Linear(WIDTH, 10), layers
        self.residuals: list[float] = []  # of the last forward pass
        self.history: list[list[float]] = []  # of the validations

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.equilibrium(inputs) if self.layers is None else self.unrolled(inputs, self.layers))

    def unrolled(self, inputs: Tensor, layers: int) -> Tensor:
        state = inputs.new_zeros(len(inputs), WIDTH)
        for _ in range(layers):
            state = self.layer(state, inputs)
        return state

    def equilibrium(self, inputs: Tensor) -> Tensor:
        state, self.residuals = inputs.new_zeros(len(inputs), WIDTH), []
        with torch.no_grad():
            while len(self.residuals) < 200 and (not self.residuals or self.residuals[-1] > TOLERANCE):
                following = self.layer(state, inputs)
                self.residuals.append(float((following - state).norm() / following.norm()))
                state = following
        return nestor.fixed_point(self.layer, state, inputs, nestor.GMRES(max_steps=40, rtol=1e-3))


def loss(network, digits):
    return F.cross_entropy(network(digits.inputs)[digits.train], digits.labels[digits.train])


def fit(case: Case, name: str, digits: Digits, rate: float, steps: int) -> tuple[Network, Accuracies, float]:
    torch.manual_seed(case.seed)
    graph = torch.eye(len(digits.labels)).to_sparse() if name == PIXELS else digits.graph
    network, accuracies = Network(graph, digits.inputs.shape[1], LAYERS[name]), Accuracies(digits)
    optimizer = Adam(network.parameters(), lr=rate, weight_decay=1e-4)
    objective = partial(loss, digits=digits)
    program = nestor.Program(network=nestor.Problem(network, objective, optimizer=optimizer))
    with SavedTensors() as kept:
        objective(network).backward()
    network.zero_grad()

    def validate(network):
        accuracies.note(network(digits.inputs).argmax(1))
        network.history.append(network.residuals)
        return {"validation": accuracies.validation[-1]}

    case.train(f"{name}, rate {rate}", program, steps, validate=validate, validate_every=5)
    return network, accuracies, kept.peak / 2**20


def run(case: Case):
    count, steps = (600, 20) if case.quick else (3_000, 100)
    digits = digit_graph(case.data, case.seed, count, LABELLED, NEIGHBOURS)
    rates = RATES[1:2] if case.quick else RATES
    case.note(steps=steps, rates=RATES, digits=count, labelled=LABELLED, width=WIDTH, contraction=CONTRACTION)
    best = {}
    for name in LAYERS:
        with case.method(name) as method:
            fits = [fit(case, name, digits, rate, steps) for rate in rates]
            network, accuracies, kept = max(fits, key=lambda fit: fit[1].best_validation)
            best[name] = network, accuracies.early_stopped, kept
            method.report(accuracy=accuracies.early_stopped, kept=kept)
    return best, digits


def draw(figure: Figure, picture) -> None:
    best, digits = picture
    left, middle, right = figure.subplots(1, 3)
    network = best[EQUILIBRIUM][0]
    curves = network.history
    for index in (0, len(curves) // 2, len(curves) - 1):
        left.semilogy(curves[index], label=f"after {5 * index + 5} steps")
    left.set(title="Forward iterations to the equilibrium", xlabel="iteration", ylabel="relative change")
    left.legend()
    with torch.no_grad():
        state = network.unrolled(digits.inputs, 60)
    axes = torch.pca_lowrank(state, 2)[2]
    points = (state - state.mean(0)) @ axes[:, :2]
    middle.scatter(*points.T, c=digits.labels, cmap="tab10", s=4, alpha=0.6)
    middle.scatter(*points[digits.train].T, c=digits.labels[digits.train], cmap="tab10", s=45, edgecolors="black")
    middle.set(title="Equilibrium states (circled: labelled)", xticks=[], yticks=[])
    for name, (_, accuracy, kept) in best.items():
        right.scatter(kept, 100 * accuracy, s=80)
        right.annotate(name, (kept, 100 * accuracy), xytext=(6, 6), textcoords="offset points")
    right.set(title="Accuracy and memory", xlabel="kept for the backward pass, MiB", ylabel="test accuracy, %")
    right.set_xscale("log")
    right.margins(0.25)


EXPERIMENT = Experiment(
    "A deep equilibrium on a graph of digits", run, draw, metric="accuracy", ours=EQUILIBRIUM, baselines=(SHALLOW, DEEP)
)

if __name__ == "__main__":
    main(EXPERIMENT)
