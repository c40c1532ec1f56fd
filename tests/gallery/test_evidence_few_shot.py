"""The section on few-shot learning: its choices and tests on invented cells, and its baselines against a few lines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from evidence import few_shot as task
from evidence.few_shot import LIKE, PROTOTYPES, RATES, SEEDS, SETTINGS, like

from shared.data.places import DataMissing
from shared.evidence import Cell
from shared.evidence_few_shot import at_best, section, strongest
from shared.experiment import ROOT
from shared.tasks import Network, Tasks

SETTING = "5-way 1-shot"


def outcome(validation: float, test: float) -> dict[str, Any]:
    return {"seconds": 2.0, "validation": validation, "test": test}


def invented() -> dict[Cell, dict[str, Any]]:
    """All cells of a setting: the second rate is the best in validation and the worst in test."""
    found = {}
    for cell in (cell for cell in LIKE if cell.setting == SETTING):
        level = {"MAML": 0.7, PROTOTYPES: 0.9}.get(cell.method, 0.5)
        for index, rate in enumerate(RATES[cell.method]):
            found[replace(cell, rate=rate)] = outcome(level if index == 1 else 0.1, level if index == 1 else 0.99)
        for seed in SEEDS[1:]:
            wave = 0.01 * (seed % 3) if cell.method == "MAML" else 0.0
            found[replace(cell, rate=RATES[cell.method][1], seed=seed)] = outcome(level, level + wave)
    return found


def test_no_cell_is_said() -> None:
    text = section({})
    assert text.startswith("### Few-shot learning: 5 and 20 ways, 1 and 5 shots\n")
    assert text.endswith("No cell of this grid has ended yet.\n")


def test_the_validation_tasks_of_the_first_seed_choose() -> None:
    """Not the test; and the other seeds do not change the choice, but count."""
    found = invented()
    chosen = at_best(found, like(SETTING, "MAML"))
    assert chosen is not None
    assert (chosen.cell.rate, list(chosen.outcomes), chosen.at_the_edge) == (RATES["MAML"][1], list(SEEDS), False)
    found[replace(like(SETTING, "MAML"), rate=RATES["MAML"][3])] = outcome(0.71, 0.0)
    chosen = at_best(found, like(SETTING, "MAML"))
    assert chosen is not None
    assert (chosen.cell.rate, list(chosen.outcomes), chosen.at_the_edge) == (RATES["MAML"][3], [0], True)


def test_the_section_says_what_the_cells_say() -> None:
    found = invented()
    text = section(found)
    row = next(line for line in text.splitlines() if line.startswith(f"| {PROTOTYPES} "))
    cells = [cell.strip().replace("&nbsp;", " ") for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["90.0 ± 0.0 %", f"{RATES[PROTOTYPES][1]:g}", "5", "-19.2 ± 0.4"]  # 0, 1, 2, 0 and 1 points
    assert float(cells[5]) < 0.05
    assert cells[6] == "2.0"
    assert f"{SETTING}: -19.2&nbsp;±&nbsp;0.4 points against `{PROTOTYPES}`" in text
    worse = text.partition("It is worse than: ")[2]
    assert worse.startswith(f"{PROTOTYPES}, {SETTING}.")
    assert "5-way 5-shot |" not in text  # the other settings have no table
    assert "Missing cells: rates, first seed: 72 of 96" in text


def test_an_error_is_said() -> None:
    cells = [replace(like(SETTING, "iMAML"), rate=rate) for rate in RATES["iMAML"]]
    found = invented() | {cell: {"failure": "SolverError: no"} for cell in cells}
    assert "| iMAML (4 errors) |" in section(found)


def test_the_strongest_baseline_is_that_of_validation() -> None:
    found = {cell: outcome(o["validation"], 1 - o["test"]) for cell, o in invented().items()}
    assert strongest({name: at_best(found, like(SETTING, name)) for name in RATES}) == PROTOTYPES
    assert strongest(dict.fromkeys(RATES)) is None


def test_each_method_gets_as_many_trials() -> None:
    """Four rates each; then four more seeds of the one that was chosen."""
    first, more = (block(invented()) for block in task.BLOCKS.values())
    assert len(first) == len(set(first)) == 4 * len(LIKE) == 4 * len(SETTINGS) * len(RATES)
    assert len(more) == 4 * len(RATES)
    assert {(cell.setting, cell.rate == RATES[cell.method][1]) for cell in more} == {(SETTING, True)}


def drawings() -> Tasks:
    classes = torch.randint(256, (6, 12, 28, 28), dtype=torch.uint8)
    return Tasks(classes, 2, ways=3, shots=4, queries=2)


def test_class_means_are_those_of_a_loop() -> None:
    """Labels in any order, for one task and for two."""
    torch.manual_seed(0)
    features, labels = torch.randn(2, 9, 4), torch.stack([torch.arange(9) % 3, torch.arange(9) // 3])
    means = task.class_means(features, labels)
    for t in range(2):
        torch.testing.assert_close(task.class_means(features[t], labels[t]), means[t])
        for k in range(3):
            torch.testing.assert_close(means[t, k], features[t][labels[t] == k].mean(0))


@pytest.mark.parametrize("angle", [True, False])
def test_the_nearest_class_is_that_of_a_loop(angle: bool) -> None:
    torch.manual_seed(0)
    network = Network(3, 16)
    (images, labels), (asked, _) = next(iter(drawings()))
    near = task.nearest(network, (images[0], labels[0]), angle=angle)(asked[0])
    with torch.no_grad():
        known, queries = network.body(images[0]), network.body(asked[0])
        if angle:
            known, queries = known / known.norm(dim=1, keepdim=True), queries / queries.norm(dim=1, keepdim=True)
        for row, query in zip(near, queries, strict=True):
            distances = [float((query - known[labels[0] == k].mean(0)).square().sum()) for k in range(3)]
            torch.testing.assert_close(-row.detach(), torch.tensor(distances), rtol=1e-4, atol=1e-5)


def test_one_drawing_of_a_class_is_the_nearest_of_the_example() -> None:
    """With one shot the order of the classes is that of the cosines of ``Network.nearest``."""
    torch.manual_seed(0)
    network, tasks = Network(3, 16), drawings()
    tasks.shots = 1
    (images, labels), (asked, _) = next(iter(tasks))
    support = images[0], labels[0]
    found = task.nearest(network, support, angle=True)(asked[0])
    assert torch.equal(found.argsort(1), network.nearest(support)(asked[0]).argsort(1))


def test_the_loss_of_prototypes_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    network = Network(3, 16)
    support, query = next(iter(drawings()))
    losses = []
    for t in range(2):
        scores = task.nearest(network, (support[0][t], support[1][t]), angle=False)(query[0][t])
        losses += [-scores[i].log_softmax(0)[label] for i, label in enumerate(query[1][t])]
    torch.testing.assert_close(task.fit_prototypes((support, query), network.body), torch.stack(losses).mean())


def run(methods: tuple[str, ...]) -> None:
    """Two updates, two tasks of validation and test."""
    for cell in task.GRID.quick["quick"]({}):
        if cell.method in methods:
            try:
                found = task.run(cell, ROOT / "data")
            except DataMissing as error:
                pytest.skip(str(error))
            assert set(found) == {"seconds", "validation", "test"}
            assert all(0 <= found[part] <= 1 for part in ("validation", "test"))


def test_a_cell_runs() -> None:
    run(("FOMAML", PROTOTYPES))


@pytest.mark.slow
def test_every_method_runs() -> None:
    run(tuple(RATES))
