"""Programs, engines and tables in a terminal and in a notebook."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import nestor
from nestor.explain.display import WIDTH, broken


def program(depth: int = 3) -> nestor.Program:
    """A chain in which every level reads every other."""

    def loss(name: str, others: list[str]) -> str:
        total = " + ".join(f"({name}() * {other}()).sum()" for other in others)
        return f"lambda {', '.join([name, *others])}: ({name}() ** 2).sum() + {total}"

    names = [f"level{i}" for i in range(depth)]
    problems = {}
    for name in names:
        variable = nestor.Variable(torch.ones(2))
        problems[name] = nestor.Problem(
            variable,
            eval(loss(name, [other for other in names if other != name])),
            optimizer=torch.optim.SGD(variable.parameters(), 0.01),
            response=nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3)),
        )
    return nestor.Program(**problems)


@pytest.mark.parametrize("depth", [2, 4])
def test_tables_fit_a_hundred_columns(depth: int) -> None:
    made = program(depth)
    texts = [str(made.explain()), str(made.explain({}, seconds=True))]
    texts.append(str(nestor.check_hypergradient(made, f"level{depth - 1}", {})))
    for text in texts:
        assert max(map(len, text.splitlines())) <= WIDTH
        assert all(name in text for name in made.levels) or "Hypergradient" in text


def test_tables_are_html_in_a_notebook() -> None:
    """Each cell of the text is in the table."""
    made = program(2)
    for shown in (made.explain(), nestor.check_hypergradient(made, "level1", {})):
        bundle = shown._repr_mimebundle_()
        assert bundle["text/plain"] == str(shown)
        tree = ElementTree.fromstring(f"<div>{bundle['text/html'].replace('<br>', '<br/>')}</div>")
        rows = tree.findall("./table/tbody/tr")
        assert len(rows) >= 2
        assert len({len(row) for row in rows}) == 1
        assert len(rows[0]) == len(tree.findall("./table/thead/tr/th"))


def test_a_program_is_a_picture_in_a_notebook() -> None:
    """Boxes and arrows lie inside of the picture; nothing refers to a network."""
    made = program(4)
    bundle = made._repr_mimebundle_()
    assert bundle["text/plain"] == repr(made)
    picture = ElementTree.fromstring(bundle["image/svg+xml"])
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    boxes = [box.attrib for box in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(boxes) == 4
    for box in boxes:
        assert 0 <= float(box["x"]) <= width - float(box["width"])
        assert 0 <= float(box["y"]) <= height - float(box["height"])
    assert len({box["y"] for box in boxes}) == 4  # a chain: one above the other
    paths = [path for path in picture.iter("{http://www.w3.org/2000/svg}path") if "marker-end" in path.attrib]
    assert len(paths) == 12
    assert "href" not in bundle["image/svg+xml"]


def test_peers_stand_beside_each_other() -> None:
    net, a, b = nn.Linear(2, 1), nestor.Variable(torch.ones(1)), nestor.Variable(torch.ones(1))
    made = nestor.Program(
        net=nestor.Problem(net, lambda net, a, b: (net.weight * a() * b()).sum()),
        a=nestor.Problem(a, lambda a, net: (net.weight * a()).sum()),
        b=nestor.Problem(b, lambda b, net: (net.weight * b()).sum()),
    )
    picture = ElementTree.fromstring(made._repr_mimebundle_()["image/svg+xml"])
    low, first, second = (box.attrib["y"] for box in picture.iter("{http://www.w3.org/2000/svg}rect"))
    assert first == second != low


def test_a_name_is_escaped() -> None:
    """Names of levels are identifiers, but classes of modules may be called anything."""
    odd = type("<b>", (nn.Linear,), {})(2, 1)
    made = nestor.Program(
        net=nestor.Problem(
            odd, lambda net: net.weight.square().sum(), optimizer=torch.optim.SGD(odd.parameters(), lr=0.1)
        )
    )
    assert "<b>" not in nestor.Engine(made)._repr_mimebundle_()["text/html"]


def test_an_engine_shows_its_levels_and_metrics() -> None:
    engine = nestor.Engine(program(2), seed=0)
    engine.run(3)
    bundle = engine._repr_mimebundle_()
    assert bundle["text/plain"] == repr(engine)
    html = bundle["text/html"]
    assert "Engine, step 3" in html
    assert html.index(">level1<") < html.index(">level0<")
    assert f"{engine.read_metrics()['level0/loss']:.4g}" in html


def test_long_names_of_responses_take_two_lines() -> None:
    assert broken("T1T2") == "T1T2"
    assert broken("Implicit(ConjugateGradient(max_steps=5))").splitlines()[0] == "Implicit("
