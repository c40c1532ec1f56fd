"""The first layers of MiniLM as a classifier of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data import text


def classifier(folder: Path, classes: int) -> Any:
    """Return two layers of MiniLM with a new head; the embeddings and the first layer are frozen."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"num_labels": classes, "num_hidden_layers": 2, "attn_implementation": "eager", "local_files_only": True}
    net = AutoModelForSequenceClassification.from_pretrained(text.minilm(folder), **options)
    net.train()
    for frozen in (net.base_model.embeddings, net.base_model.encoder.layer[0]):
        frozen.requires_grad_(requires_grad=False)
    return net


def tokenize(folder: Path, length: int, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the tokens of texts, cut or padded to a length, and which of them are real."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text.minilm(folder), local_files_only=True)
    rows = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]


def predict(net: nn.Module, data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of each document, and the accuracy."""
    tokens, mask, labels = data
    with torch.no_grad():
        pairs = zip(tokens.split(100), mask.split(100), strict=True)
        logits = torch.cat([net(input_ids=ids, attention_mask=real).logits for ids, real in pairs])
    return F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).float().mean()
