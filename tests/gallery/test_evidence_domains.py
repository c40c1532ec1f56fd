"""The evidence on domain adaptation: the parts of the emoji, the choices of the section, and one training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import domain_adaptation as task
from evidence.domain_adaptation import FIRST, LAST, METHODS, PAIRS, PLAIN, RATES, TOGETHER, WEIGHTED, like

from shared import emoji_domains
from shared.data.emoji import Emoji
from shared.data.places import DataMissing
from shared.evidence import Cell
from shared.evidence_domains import HEADING, at_best, section
from shared.experiment import ROOT

DIGITS, EMOJI = PAIRS
EXACT, IDENTITY = "three levels, CG, strength 1", "three levels, T1T2, strength 1"
Cells = dict[Cell, dict[str, Any]]


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Emoji:
    """Sixty emoji of random pixels; the last ten repeat a drawing, five of them in one style."""
    google, twitter = torch.rand(2, 60, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    google[50:55], twitter[55:] = google[:5], twitter[5:10]
    data = Emoji(google, twitter, torch.arange(60) % 9, [str(k) for k in range(9)], [""] * 60)
    monkeypatch.setattr(emoji_domains, "drawings", lambda folder: data)
    return data


def test_no_emoji_is_in_two_parts(invented: Emoji) -> None:
    kept = emoji_domains.distinct(invented)
    assert kept.tolist() == list(range(50))
    parts = emoji_domains.split(kept, 3, 20, 5, 10)
    assert [len(part) for part in parts] == [20, 5, 10, 15]
    assert torch.cat(parts).sort().values.tolist() == kept.tolist()
    assert not torch.equal(parts[0], emoji_domains.split(kept, 4, 20, 5, 10)[0])


def test_the_parts_are_those_of_the_vendors(invented: Emoji) -> None:
    """The source has Google's drawings, all other parts have Twitter's; the given part is both of the target's."""
    data = emoji_domains.domains(Path(), 3, 20, 5, 10, 0.5)
    source, target, validation, test = emoji_domains.split(emoji_domains.distinct(invented), 3, 20, 5, 10)
    images, labels, index = data.source.tensors
    assert torch.equal(images, invented.google[source])
    assert torch.equal(labels, (invented.labels[source] + data.wrong) % 9)
    assert index.tolist() == list(range(20))
    for part, where in ((data.target, target), (data.validation, validation)):
        assert torch.equal(part.tensors[0], invented.twitter[where])
        assert torch.equal(part.tensors[1], invented.labels[where])
    assert torch.equal(data.given.tensors[0], invented.twitter[torch.cat([target, validation])])
    assert torch.equal(data.test[0], invented.twitter[test])
    assert torch.equal(data.test[1], invented.labels[test])
    assert 0 < int(data.wrong.sum()) < 20


def test_the_share_of_wrong_labels(invented: Emoji) -> None:
    shares = [emoji_domains.domains(Path(), seed, 40, 2, 2, 0.4).wrong.float().mean() for seed in range(100)]
    assert float(torch.stack(shares).mean()) == pytest.approx(0.4, abs=0.03)


def test_the_held_out_part_is_not_the_test_part(monkeypatch: pytest.MonkeyPatch, invented: Emoji) -> None:
    monkeypatch.setattr(task, "HELD_OUT", 7)
    monkeypatch.setitem(task.PAIRS, "small", (emoji_domains, 10, 0.4))
    data, (images, labels) = task.load(Path(), "small", 3, 0)
    whole = emoji_domains.domains(Path(), 0, 10, task.TARGET, 3, 0.4).test
    assert torch.equal(torch.cat([images, data.test[0]]), whole[0])
    assert (len(images), len(labels), len(data.test[1])) == (7, 7, 0)


def cells(score: dict[str, float]) -> Cells:
    """All cells; the middle rate has the best validation accuracy, the largest has the best test accuracy."""
    found: Cells = {}
    for setting in PAIRS:
        for method in METHODS:
            cell = like(setting, method)
            for place, rate in enumerate(RATES[cell.unroll]):
                for seed in (*FIRST, *LAST) if place == 1 else FIRST:
                    value = score.get(method, 0.5) + 0.001 * (seed * (1 + len(method) % 3) % 5)
                    outcome = {"validation": value + 0.1 * (place == 1), "test": value + 0.1 * place, "seconds": 2.0}
                    auc = {"auc": 0.75} if method in WEIGHTED else {}
                    found[replace(cell, rate=rate, seed=seed)] = outcome | auc
    return found


def test_the_held_out_part_chooses() -> None:
    """The rate, from all rates of the first seeds, and then all seeds count; and the strongest plain method."""
    found = cells({TOGETHER: 0.7, EXACT: 0.8, IDENTITY: 0.6})
    chosen = at_best(found, DIGITS, EXACT)
    assert chosen is not None
    assert (chosen.cell.rate, set(chosen.outcomes)) == (RATES[1][1], {*FIRST, *LAST})
    assert set(chosen.rates) == set(RATES[1])
    text = section(found)
    assert text.startswith(HEADING)
    assert text.count(f"minus {TOGETHER}") == len(PAIRS)
    better, worse = text.splitlines()[-1].split("Worse: ")
    assert f"{EXACT}, {DIGITS}" in better
    assert f"{IDENTITY}, {EMOJI}" in worse
    (row, _) = [line for line in text.splitlines() if line.startswith(f"| {EXACT} |")]
    assert "| 0.75&nbsp;±&nbsp;0.00 |" in row
    assert "| +10." in row


def test_without_cells_the_section_says_so() -> None:
    assert section({}).count("No cell of this table has ended yet.") == len(PAIRS)


def test_failed_trainings_are_counted() -> None:
    cell = like(DIGITS, PLAIN[0])
    found: Cells = {replace(cell, rate=rate): {"failure": "NonFiniteError: no"} for rate in RATES[0]}
    assert f"| {PLAIN[0]} |  |  |  |  |  |  | 3 |  |" in section(found)


def test_each_method_gets_as_many_trials() -> None:
    first = task.GRID.blocks["rates, first two seeds"]({})
    assert len(first) == len(set(first)) == len(PAIRS) * len(METHODS) * 3 * len(FIRST)
    last = task.GRID.blocks["chosen rates, three more seeds"]
    assert last({}) == []
    assert {cell.seed for cell in last(cells({}))} == set(LAST)
    assert len(last(cells({}))) == len(PAIRS) * len(METHODS) * len(LAST)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, invented: Emoji, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps on invented emoji."""
    task.load.cache_clear()
    monkeypatch.setattr(task, "TARGET", 5)
    monkeypatch.setattr(task, "HELD_OUT", 5)
    monkeypatch.setitem(task.PAIRS, EMOJI, (emoji_domains, 20, 0.4))
    outcome = task.run(replace(like(EMOJI, method, steps=4), rate=0.01, guide=10), Path())
    task.load.cache_clear()
    assert set(outcome) == {"seconds", "validation", "test"} | ({"auc"} if method in WEIGHTED else set())
    assert all(0 <= outcome[name] <= 1 for name in outcome if name != "seconds")


def test_a_training_on_digits_runs() -> None:
    try:
        outcome = task.run(replace(like(DIGITS, EXACT, steps=2), rate=0.01), ROOT / "data")
    except DataMissing as error:
        pytest.skip(str(error))
    assert 0 <= outcome["test"] <= 1
