"""The grid of weakly labelled texts: the votes of keywords, the choice of rates, and the section that it writes."""

import ast
import re
from dataclasses import replace

import pytest
import torch
from evidence.weak_labels import (
    BLOCKS,
    BOTH,
    DIFFERENCES,
    FIRST,
    LAST,
    METHODS,
    RATES,
    UPPERS,
    WITH_GUIDE,
    like,
    program,
    run,
)

from shared import evidence_weak_labels as page
from shared.data.places import DataMissing
from shared.evidence import Cell, Outcome
from shared.experiment import ROOT
from shared.keywords import FILMS, KEYWORDS, REUTERS, plain_words, weak_labels
from shared.weak_labels import SETTINGS, Documents, load

DATA = ROOT / "data"


def test_the_most_keywords_win() -> None:
    """A word counts once, however often it occurs; a text without a keyword is not covered."""
    texts = [
        "a dull dull dull but charming and witty film",
        "Tedious, predictable - a MESS!",
        "a film of 1994",
        "goodness",
    ]
    weak, covered = weak_labels([plain_words(text) for text in texts], ["rotten", "fresh"], FILMS)
    assert weak[:2].tolist() == [1, 0]
    assert covered.tolist() == [True, True, False, False]
    names = list(REUTERS)
    news = ["the opec sells barrels of oil for dollar", "wheat and corn exports", "shr cts vs cts net dividend"]
    found, _ = weak_labels(news, names, REUTERS)
    assert [names[k] for k in found] == ["crude", "grain", "earn"]


def test_equals_are_decided_by_lot() -> None:
    weak, covered = weak_labels(["good and bad"] * 400, ["rotten", "fresh"], FILMS)
    assert covered.all()
    assert 100 < weak.sum() < 300


def test_the_newsgroups_are_the_default() -> None:
    """With the same draws: the example's labels do not depend on the other lists."""
    texts, names = ["god and church on the moon", "a windows driver for the pc", "nothing"] * 20, list(KEYWORDS)
    torch.manual_seed(0)
    default, _ = weak_labels(texts, names)
    torch.manual_seed(0)
    votes = torch.tensor([[len({*t.split()} & {*KEYWORDS[name].split()}) for name in names] for t in texts])
    assert torch.equal(default, (votes + 0.5 * torch.rand(votes.shape)).argmax(1))


def test_lists_do_not_share_words() -> None:
    for words in (REUTERS, FILMS):
        listed = [word for group in words.values() for word in group.split()]
        assert len(listed) == len(set(listed))
    assert plain_words("It's 3 p.m. - well-known!") == "it's p m well known"


def invented(best: float = 0.01) -> dict[Cell, Outcome]:
    """Cells whose validation chooses `best` for the weighted methods, and whose test accuracy is against it."""
    found: dict[Cell, Outcome] = {}
    for cell in BLOCKS["rates, first two seeds"]({}):
        good = cell.rate == (best if cell.unroll else 0.03)
        found[cell] = {"validation": 0.7 if good else 0.6, "test": 0.5 if good else 0.9}
    for cell in BLOCKS["chosen rates, three more seeds"](found):
        found[cell] = {"validation": 0.7, "test": 0.5}
    for cell, outcome in found.items():
        outcome["test"] += 0.001 * cell.seed**2 + (0.1 + 0.001 * cell.seed if cell.method == "correct" else 0)
        outcome |= {"seconds": 2.0, "covered": 0.4, "right": 0.75}
        if "reweight" in cell.method:
            outcome["auc"] = 0.5
        if "correct" in cell.method:
            outcome["corrected"] = 0.8
    return found


def test_all_methods_get_as_many_trials() -> None:
    cells = BLOCKS["rates, first two seeds"]({})
    assert len(cells) == len(set(cells)) == len(SETTINGS) * len(METHODS) * 3 * len(FIRST)
    assert BLOCKS["chosen rates, three more seeds"]({}) == []
    more = BLOCKS["chosen rates, three more seeds"](invented())
    assert len(more) == len(SETTINGS) * len(METHODS) * len(LAST)


@pytest.mark.parametrize("best", RATES[1])
def test_the_validation_part_chooses(best: float) -> None:
    """Of the first seeds only; the test accuracy of the other rates is higher."""
    found = invented(best)
    chosen = page.at_best(found, "Reuters R8", "reweight")
    assert chosen is not None
    assert chosen.cell.rate == best
    assert list(chosen.outcomes) == [*FIRST, *LAST]
    assert max(chosen.values("test")) < 0.6
    assert set(chosen.rates) == set(RATES[1])


def test_the_section_says_what_the_cells_say() -> None:
    text = page.section(invented())
    assert text.startswith("### Weak labels of three text sets\n")
    for setting in SETTINGS:
        assert f"**{setting}.** 40 % of the documents have a keyword, 75 % of their weak labels are right." in text
    assert text.count(f"Better than {WITH_GUIDE} (p < 5 %, 6 tests): correct. Worse: none.") == len(SETTINGS)
    assert f"Below: {'; '.join(f'{s}, minus correct' for s in list(SETTINGS)[:2])} and" in text
    assert "| correct | 60.8&nbsp;±&nbsp;0.4&nbsp;% | 0.01* | 5 | +10.2&nbsp;±&nbsp;0.1 |" in text
    assert "missing" not in text


def test_without_cells_everything_is_missing() -> None:
    text = page.section({})
    assert text.count("No cell of this table has ended yet.") == len(SETTINGS) + 1
    assert re.findall(r": (\d+) cells are missing", text) == ["126", "63"]
    half = {cell: outcome for cell, outcome in invented().items() if cell.seed != LAST[-1]}
    assert re.findall(r": (\d+) cells are missing", page.section(half)) == ["21"]


def test_errors_are_counted() -> None:
    found = invented()
    found[replace(like("Reuters R8", BOTH), rate=0.001, seed=1)] = {"failure": "SolverError: no"}
    assert f"| {BOTH} (1 errors) | 50.6" in page.section(found)


def test_no_result_is_typed() -> None:
    tree = ast.parse((ROOT / "examples" / "shared" / "evidence_weak_labels.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [number for text in texts for number in re.findall(r"\d+\.\d+", text)]


def test_upper_levels_are_peers_at_the_rate() -> None:
    part = (torch.randn(8, 5), torch.arange(8) % 2)
    data = Documents(part, part[1], 1.0, part, part, part, 2)
    for method in METHODS:
        cell = replace(like("Rotten Tomatoes", method), rate=0.01)
        problems = {name: level.problem for name, level in program(cell, data).levels.items()}
        uppers = UPPERS[method][1] if method in UPPERS else ()
        assert set(problems) == {"classifier", *uppers}
        rates = {name: problem.optimizer.param_groups[0]["lr"] for name, problem in problems.items()}
        assert rates == {"classifier": 0.05 if uppers else 0.01, **dict.fromkeys(uppers, 0.01)}


def test_a_cell_runs_and_the_parts_are_disjoint() -> None:
    """Ten steps on Reuters R8."""
    try:
        data = load(DATA, "Reuters R8", 0)
    except DataMissing as error:
        pytest.skip(str(error))
    assert [len(part[1]) for part in (data.guide, data.validation, data.test)] == [100, 500, 2_189]
    assert len(data.weak) == len(data.train[1]) == round(data.covered * (5_485 - 600))
    outcome = run(replace(like("Reuters R8", DIFFERENCES, steps=10), rate=3e-3), DATA)
    assert set(outcome) == {"seconds", "covered", "right", "validation", "test", "auc", "corrected"}
    assert outcome["right"] > 0.7
    assert all(0 <= outcome[name] <= 1 for name in outcome if name != "seconds")
