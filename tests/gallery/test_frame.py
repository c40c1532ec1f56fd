"""The frame of the gallery: the measurements of a case, the files of a run, the gathering over seeds, the page."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nestor.callbacks import Callback
from shared import gallery, pages
from shared.experiment import NO_DATA, Case, Experiment, main

SOURCE = '''"""An example of the tests.

    min_w L(w)
"""

import torch

from shared.experiment import Case, Experiment, main


def run(case: Case):
    case.note(steps=3)
    with case.method("plain") as method:
        method.report(accuracy=0.5 + 0.01 * case.seed)
    with case.method("ours") as method:
        method.report(accuracy=0.6 + 0.01 * case.seed, AUC=torch.tensor(0.9))
    return [1, 2, 3]


def draw(figure, values):
    figure.subplots().plot(values)


if __name__ == "__main__":
    main(Experiment("A task", run, draw, "accuracy", "ours", ("plain",)))
'''


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one example; runs and results are written there."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "toy.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(gallery.ROOT / "examples"))
    monkeypatch.setattr(gallery, "RUNS", tmp_path / "runs" / "gallery")
    monkeypatch.setattr(gallery, "PAGES", tmp_path / "docs" / "gallery")
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "docs" / "gallery")
    monkeypatch.setattr(pages, "PAGE", tmp_path / "docs" / "gallery.md")
    monkeypatch.setattr(pages, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"# Toy\n\n{pages._BEGIN}\nold\n{pages._END}\n\nMore.\n")
    return tmp_path


def test_seeds_are_run_gathered_and_shown(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds become one JSON file, a picture and a section of the page; a second call runs nothing again."""
    monkeypatch.setattr(sys, "argv", ["gallery", "--seeds", "2", "--processes", "2"])
    assert gallery.main() == 0
    found = json.loads((places / "docs" / "gallery" / "toy.json").read_text())
    assert found["seeds"] == [0, 1]
    assert found["methods"]["ours"]["metrics"]["accuracy"] == pytest.approx([0.6, 0.61])
    assert found["config"] == {"steps": 3}
    assert (places / "docs" / "gallery" / "toy.png").read_bytes()[:4] == b"\x89PNG"
    page = (places / "docs" / "gallery.md").read_text()
    assert "| **ours** | 60.5&nbsp;±&nbsp;0.5&nbsp;% |" in page
    assert "ours beats plain (+10 ± " in page
    readme = (places / "README.md").read_text()
    row = "| [A task](docs/gallery.md#toy) | accuracy | 60.5 ± 0.5 % | plain: 50.5 ± 0.5 % | beats it |"
    assert row in readme.replace("&nbsp;", " ")
    assert readme.startswith("# Toy\n")
    assert readme.endswith("\nMore.\n")
    assert "old" not in readme
    log = places / "runs" / "gallery" / "toy" / "0" / "log.txt"
    before = log.stat().st_mtime_ns
    assert gallery.main() == 0
    assert log.stat().st_mtime_ns == before


def test_another_version_of_an_example_is_run_again(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery", "toy", "--seeds", "1", "--processes", "1"])
    assert gallery.main() == 0
    (places / "examples" / "toy.py").write_text(SOURCE.replace("0.6 ", "0.7 "))
    assert gallery.main() == 0
    found = json.loads((places / "docs" / "gallery" / "toy.json").read_text())
    assert found["methods"]["ours"]["metrics"]["accuracy"] == pytest.approx([0.7])


def test_a_run_that_fails_is_named(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "examples" / "toy.py").write_text(SOURCE.replace("case.note(steps=3)", "raise RuntimeError('broken')"))
    monkeypatch.setattr(sys, "argv", ["gallery", "--seeds", "1", "--processes", "1"])
    assert gallery.main() == 1
    assert "FAILED" in capsys.readouterr().out
    assert "broken" in (places / "runs" / "gallery" / "toy" / "0" / "log.txt").read_text()
    assert not (places / "docs" / "gallery" / "toy.json").exists()


def test_an_unknown_name_is_refused(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery", "unknown"])
    with pytest.raises(SystemExit):
        gallery.main()


def test_missing_data_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.data.places import DataMissing

    def run(case: Case) -> Any:
        raise DataMissing("MNIST is not there: make data")

    monkeypatch.setattr(sys, "argv", ["toy", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        main(Experiment("A task", run, lambda figure, picture: None, "accuracy", "ours", ()))
    torch.set_num_threads(threads)
    assert ended.value.code == NO_DATA
    assert capsys.readouterr().err.count("\n") == 1


def test_a_verdict_needs_more_than_a_standard_error() -> None:
    """Differences are paired by seed."""

    def result(ours: list[float], higher_is_better: bool = True) -> dict[str, Any]:
        metrics = {"ours": ours, "plain": [0.5, 0.6, 0.7]}
        return {
            "metric": "accuracy",
            "higher_is_better": higher_is_better,
            "percent": True,
            "ours": "ours",
            "baselines": ["plain"],
            "methods": {name: {"metrics": {"accuracy": values}} for name, values in metrics.items()},
        }

    assert pages.verdict(result([0.51, 0.62, 0.71])).startswith("ours beats plain (+1.33 ± 0.33 points)")
    assert pages.verdict(result([0.51, 0.62, 0.71], False)).startswith("ours is worse than plain")
    assert pages.verdict(result([0.40, 0.62, 0.77])).startswith("ours does not beat plain")


def test_p_values_are_corrected_by_holm() -> None:
    """The smallest times the number of tests; never smaller than a smaller one's, never above 1."""
    assert pages.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert pages.holm([0.9, 0.8]) == [1.0, 1.0]
    assert pages.holm([]) == []


def test_mean_and_standard_error() -> None:
    assert pages.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


def test_a_case_measures_its_methods(tmp_path: Path) -> None:
    """Seconds and peak memory of a method; the seed is set anew, so methods may be reordered."""
    case, drawn = Case(3, False, tmp_path, tmp_path), []
    for name in ("first", "second"):
        with case.method(name) as method:
            drawn.append(torch.rand(1).item())
            held = torch.ones(16 * 2**20)  # 64 MiB
            del held
        method.report(accuracy=torch.tensor(0.25))
    assert drawn[0] == drawn[1]
    assert case.methods["second"].metrics == {"accuracy": 0.25}
    assert all(method.seconds > 0 and method.peak_memory > 64 for method in case.methods.values())


def test_callbacks_of_an_example_run_beside_the_progress_bar(tmp_path: Path) -> None:
    import nestor

    class Noted(Callback):
        steps = 0

        def on_step(self, engine: Any) -> None:
            self.steps += 1

    net = torch.nn.Linear(2, 1)
    problem = nestor.Problem(
        net,
        lambda batch, net: net(batch).square().mean(),
        data=[torch.ones(3, 2)],
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
    )
    noted = Noted()
    engine = Case(0, True, tmp_path, tmp_path).train("net", nestor.Program(net=problem), 4, callbacks=[noted])
    assert (engine.step, noted.steps) == (4, 4)


@pytest.mark.parametrize(
    ("ours", "outcome"),
    [([0.71, 0.82, 0.91], "beats it"), ([0.60, 0.62, 0.57], "tie"), ([0.41, 0.42, 0.41], "**worse**")],
)
def test_outcomes_of_the_summary(
    places: Path, monkeypatch: pytest.MonkeyPatch, ours: list[float], outcome: str
) -> None:
    """Of a method against the strongest baseline, whose mean is 0.6."""
    methods = {"ours": ours, "plain": [0.58, 0.60, 0.62], "weak": [0.1, 0.1, 0.1]}
    result = {
        "title": "Toy",
        "metric": "accuracy",
        "higher_is_better": True,
        "percent": True,
        "ours": "ours",
        "baselines": ["weak", "plain"],
        "methods": {name: {"metrics": {"accuracy": values}} for name, values in methods.items()},
    }
    monkeypatch.setattr(pages, "results", lambda: {"toy": result})
    assert pages.summary("").splitlines()[-1].endswith(f"| {outcome} |")


def test_large_errors_are_no_powers_of_ten() -> None:
    assert pages.number([100.0, 120.0, 260.0], percent=False) == "160&nbsp;±&nbsp;50"
