"""The page of evidence: its grid, the choices and tests that it makes of it, and that it says what the results say."""

import ast
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evidence import grid, trusted
from evidence import meta_weight_net as task
from evidence.grid import like
from rich.console import Console

import nestor
from shared import evidence_grid, evidence_pages
from shared.data.places import DataMissing
from shared.evidence import Cell, Results, run_grid
from shared.evidence_short import in_short
from shared.evidence_tables import choose, compare, corrected
from shared.experiment import ROOT
from shared.weight_functions import WeightFunction

CELL = like("IF 100", "T1T2")
DATA = ROOT / "data"


def results(folder: Path, source: str = "one") -> Results:
    return Results(folder / "runs" / "cells.jsonl", folder / "cells.json", source, {"steps": 3})


class Trainings:
    """A training that takes no time; it notes what it ran."""

    def __init__(self) -> None:
        self.ran: list[Cell] = []

    def __call__(self, cell: Cell, folder: Path) -> dict[str, Any]:
        self.ran.append(cell)
        if cell.seed == 9:
            return {"failure": "SolverError: no"}
        return {"seconds": 0.6, "validation": cell.rate, "test": 0.5 + cell.seed / 100}


def run(found: Results, cells: list[Cell]) -> Trainings:
    trainings = Trainings()
    run_grid(found, {"block": lambda _: cells}, trainings, Path(), 1, Console(quiet=True))
    return trainings


def test_a_cell_runs_once(tmp_path: Path) -> None:
    """What has ended is read from the lines, or from the page's file where the lines are gone."""
    cells = [replace(CELL, rate=0.1, seed=seed) for seed in (0, 1, 9)]
    assert run(results(tmp_path), [*cells, cells[0]]).ran == cells
    assert run(results(tmp_path), cells).ran == []
    assert results(tmp_path).publish()
    results(tmp_path).lines.unlink()
    assert run(results(tmp_path), [*cells, replace(CELL, rate=0.2)]).ran == [replace(CELL, rate=0.2)]
    assert results(tmp_path).read()[cells[2]] == {"failure": "SolverError: no"}


def test_errors_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    found = results(tmp_path)
    found.append(CELL, {"failure": f"SolverError: [loss fit ({ROOT}/examples/one.py:3)] no"})
    assert found.read()[CELL] == {"failure": "SolverError: [loss fit (examples/one.py:3)] no"}
    for file in evidence_pages.FOLDER.glob("*.json"):
        assert "(/" not in file.read_text(encoding="utf-8")


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    cells = [replace(CELL, seed=0), replace(CELL, seed=1)]
    run(results(tmp_path), cells)
    lines = results(tmp_path).lines
    lines.write_text(lines.read_text()[:-20])
    assert run(results(tmp_path), cells).ran == cells[1:]
    assert set(results(tmp_path).read()) == set(cells)


def test_another_version_of_the_code_runs_again(tmp_path: Path) -> None:
    """The page's file stays as it is until the new version has a result."""
    run(results(tmp_path), [CELL])
    results(tmp_path).publish()
    assert not results(tmp_path, "two").publish()
    assert json.loads(results(tmp_path).page.read_text())["source"] == "one"
    assert run(results(tmp_path, "two"), [CELL]).ran == [CELL]


def outcomes(*rows: tuple[float, int, float, float]) -> dict[Cell, dict[str, Any]]:
    """Cells of rows ``rate, seed, validation, test``."""
    return {replace(CELL, rate=r, seed=s): {"validation": v, "test": t} for r, s, v, t in rows}


def test_the_validation_part_chooses_the_rate() -> None:
    """Not the test part; by seeds that all rates have; and not a rate at which a seed failed."""
    found = outcomes((0.1, 0, 0.7, 0.9), (0.2, 0, 0.8, 0.5), (0.3, 0, 0.9, 0.6), (0.1, 1, 0.99, 0.9))
    chosen = choose(found, CELL, (0.1, 0.2), (0, 1))
    assert chosen is not None
    assert (chosen.cell.rate, chosen.outcomes, chosen.at_the_edge) == (0.2, {0: {"validation": 0.8, "test": 0.5}}, True)
    chosen = choose(found, CELL, (0.1, 0.2, 0.3), (0, 1))
    assert chosen is not None
    assert chosen.cell.rate == 0.3
    found[replace(CELL, rate=0.3)] = {"failure": "no"}
    chosen = choose(found, CELL, (0.1, 0.2, 0.3), (0, 1))
    assert chosen is not None
    assert chosen.cell.rate == 0.2
    assert choose(found, CELL, (0.1, 0.4), (0, 1)) is None


def test_tests_are_paired_by_seed() -> None:
    """By hand: differences 0.01, 0.02, 0.03 have t = 2 sqrt(3), p = 0.0742 with two degrees of freedom."""
    ours = choose(outcomes(*((0.1, s, 0, t) for s, t in enumerate((0.51, 0.62, 0.73)))), CELL, (0.1,), range(3))
    theirs = choose(outcomes(*((0.1, s, 0, t) for s, t in enumerate((0.5, 0.6, 0.7, 0.1)))), CELL, (0.1,), range(4))
    assert ours is not None
    assert theirs is not None
    test = compare(ours, theirs)
    assert test is not None
    assert (test.difference, test.seeds) == (pytest.approx(0.02), 3)
    assert test.p == pytest.approx(0.0742, abs=1e-4)
    assert corrected({"a": test, "b": replace(test, p=0.5)}) == pytest.approx({"a": 2 * test.p, "b": 0.5})


def test_each_method_gets_as_many_trials() -> None:
    for name in ("exact and differences, three seeds", "solvers, three seeds", "unroll 5, three seeds"):
        cells = grid.BLOCKS[name]({})
        assert len(cells) == len(set(cells))
        for method in {cell.method for cell in cells if cell.unroll}:
            rates = {(c.setting, c.rate, c.seed) for c in cells if c.method == method}
            assert len(rates) == len(grid.MAIN) * 3 * len(grid.FIRST)


def test_equal_compute_is_equal_seconds() -> None:
    """Plain training takes a quarter of the seconds of T1T2, so it gets four times the steps."""
    found = {}
    for setting in grid.MAIN:
        for method, seconds in (("T1T2", 12.0), (task.PLAIN, 3.0)):
            cell = like(setting, method)
            for rate in grid.RATES[cell.unroll]:
                found[replace(cell, rate=rate)] = {"seconds": seconds, "validation": 0.5, "test": 0.5}
    assert grid.equal_steps(found, task.PLAIN, 0) == 4 * task.STEPS
    assert {cell.steps for cell in grid.equal_compute(found, (0,))} == {4 * task.STEPS}


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of the page, to be changed."""
    for file in evidence_pages.FOLDER.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(evidence_pages, "FOLDER", tmp_path)
    return tmp_path


def test_the_page_says_what_the_results_say() -> None:
    """``docs/evidence.md`` is what ``shared.evidence_pages`` writes."""
    assert evidence_pages.PAGE.read_text(encoding="utf-8") == evidence_pages.render()


def test_numbers_of_the_page_are_those_of_the_results(copied: Path) -> None:
    """With other accuracies in the files, no accuracy of the grid is left on the page."""
    before = evidence_pages.render().partition("## The other tables")[0]
    file = copied / "meta_weight_net.json"
    data = json.loads(file.read_text())
    for cell in data["cells"]:
        if "test" in cell:
            cell["test"] = 0.123
    file.write_text(json.dumps(data))
    after = evidence_pages.render().partition("## The other tables")[0].partition("## Why")[0]
    accuracy = re.compile(r"(\d+\.\d)(?:&nbsp;±&nbsp;\d+\.\d)?&nbsp;%")
    assert accuracy.search(before)
    assert set(accuracy.findall(after)) == {"12.3"}


def test_no_result_is_typed() -> None:
    """The texts of the page's code have no number with decimals but settings, rates and versions."""
    allowed = {"0.1", "0.2"}
    for name in ("pages", "grid", "short", "solvers", "text"):
        tree = ast.parse((ROOT / "examples" / "shared" / f"evidence_{name}.py").read_text(encoding="utf-8"))
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert {number for text in texts for number in re.findall(r"\d+\.\d+", text)} <= allowed


def test_what_is_missing_is_said(copied: Path) -> None:
    """Without any result the page is still written, and every block is missing."""
    for file in copied.glob("*.json"):
        file.unlink()
    text = evidence_pages.render()
    assert "No cell of this table has ended yet." in text
    for name in grid.BLOCKS:
        assert f"- {name}: " in text


def test_the_answers_come_first() -> None:
    """By hand: three seeds, of which the exact derivative gains one, two and three points against differences."""
    found = {}
    for setting, method, gain in product(grid.MAIN, ("T1T2", "FiniteDifference"), (0.01,)):
        for rate, seed in product(grid.RATES[1], (0, 1, 2)):
            test = 0.8 + (gain * (seed + 1) if method == "T1T2" else 0.0)
            cell = replace(like(setting, method), rate=rate, seed=seed)
            found[cell] = {"validation": 0.5, "test": test, "seconds": 1.0}
    text = in_short(found).replace("\xa0", " ").replace("&nbsp;", " ")
    assert "each at its best upper rate: IF 100 +2.0 ± 0.6 (3 seeds), noise 40 % +2.0 ± 0.6 (3 seeds)." in text
    assert "Conjugate" not in text  # of which nothing has ended


def test_errors_are_counted() -> None:
    cell = like("IF 100", "CG, no damping")
    found = {
        replace(cell, rate=3e-4): {"failure": "SingularError: [level 'classifier'] text"},
        replace(cell, rate=3e-4, seed=1): {"seconds": 1.0, "validation": 0.5, "test": 0.5},
    }
    assert "| IF 100, CG, no damping, unroll 1 | 1 of 2 | SingularError |" in evidence_grid.errors(found)


def test_the_parts_do_not_overlap() -> None:
    """The guide of 100 is a part of the guide of 1,000; validation and training parts do not depend on it."""
    try:
        large, small = (task.load(DATA, "IF 100", guide, 0) for guide in (1_000, 100))
    except DataMissing as error:
        pytest.skip(str(error))
    assert torch.equal(large.train[0], small.train[0])
    assert torch.equal(large.validation[0], small.validation[0])
    assert small.guide[1].bincount().tolist() == [10] * 10
    assert large.train[1].bincount().tolist() == task.SETTINGS["IF 100"].counts()
    images = torch.cat([large.train[0], large.guide[0], large.validation[0]]).flatten(1)
    assert len(images.unique(dim=0)) > 0.999 * len(images)  # Fashion-MNIST has a few duplicates of its own
    noisy = task.load(DATA, "noise 40 %", 1_000, 0)
    assert float(noisy.wrong.float().mean()) == pytest.approx(0.4, abs=0.02)


def tiny() -> tuple[torch.nn.Module, torch.nn.Module, Any, Any]:
    torch.manual_seed(0)
    network, weight = torch.nn.Linear(3, 2).double(), WeightFunction().double()
    parts = [(torch.randn(n, 3).double(), torch.randint(0, 2, (n,))) for n in (12, 6)]
    return network, weight, *parts


def test_the_derivative_of_a_continued_training_is_that_of_differences() -> None:
    """Of the training itself, whose weights follow the losses."""
    network, weight, train, guide = tiny()

    def loss_after(shift: torch.Tensor) -> float:
        v = [p.detach() + s.view_as(p) for p, s in zip(weight.parameters(), shift.split(sizes), strict=True)]
        theta, buffer = trusted.leaves(list(network.parameters())), [0.0, 0.0]
        for _ in range(5):
            gradient = trusted.direction(network, weight, theta, v, train)
            buffer = [0.9 * m + g.detach() for m, g in zip(buffer, gradient, strict=True)]
            theta = trusted.leaves([p - 0.5 * m for p, m in zip(theta, buffer, strict=True)])
        return float(F.cross_entropy(trusted.called(network, theta, guide[0]), guide[1]).detach())

    sizes = [p.numel() for p in weight.parameters()]
    along = torch.randn(sum(sizes), dtype=torch.float64)
    slope = (loss_after(1e-5 * along) - loss_after(-1e-5 * along)) / 2e-5
    found = trusted.continued(network, weight, train, guide, 5, 0.5, 0.9)
    assert float(found @ along) == pytest.approx(slope, rel=1e-5)


def test_the_exact_hypergradient_is_that_of_a_dense_solve_by_nestor() -> None:
    """With the damping that the function chooses for a convex level; the Hessian is that of the loss."""
    network, weight, train, guide = tiny()
    matrix = trusted.hessian(network, weight, train)
    shift = 1.5 * max(-float(torch.linalg.eigvalsh(matrix)[0]), 1e-3)
    program = nestor.Program(
        classifier=nestor.Problem(
            network, task.weighted_loss, response=nestor.Implicit(solver=nestor.DenseSolve(), damping=shift)
        ),
        weight=nestor.Problem(weight, lambda batch, classifier: F.cross_entropy(classifier(batch[0]), batch[1])),
    )
    expected = program.hypergradient("weight", {"classifier": train, "weight": guide})
    found = trusted.exact(matrix, network, weight, train, guide)
    torch.testing.assert_close(found, trusted.flat(list(expected.values())))


@pytest.mark.slow
def test_every_method_runs(tmp_path: Path) -> None:
    """Two steps of each method on both settings."""
    found = Results(tmp_path / "cells.jsonl", tmp_path / "cells.json", "one", {})
    try:
        run_grid(found, grid.QUICK, task.run, DATA, 1, Console(quiet=True))
    except DataMissing as error:
        pytest.skip(str(error))
    reached = found.read()
    assert {cell.method for cell in reached} == {task.PLAIN, task.WITH_GUIDE, *task.RESPONSES}
    assert all(0 <= outcome["test"] <= 1 for outcome in reached.values())
