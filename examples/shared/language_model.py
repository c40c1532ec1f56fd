"""A small transformer language model of words, and texts as blocks of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNKNOWN, END = 0, 1


class Vocabulary:
    """The most frequent words of some texts; all others are one unknown word.

    Args:
        texts: The texts, in lower case, words separated by spaces.
        size: How many words, the unknown one and the end of a text included.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        counts = Counter(word for text in texts for word in text.split())
        self.words = ["?", "."] + [word for word, _ in counts.most_common(size - 2)]
        self.index = {word: index for index, word in enumerate(self.words)}

    def blocks(self, texts: Sequence[str], length: int) -> Tensor:
        """Return texts, one after the other, as rows of ``length`` words; what is left over in the end is dropped."""
        words = [self.index.get(word, UNKNOWN) for text in texts for word in (*text.split(), self.words[END])]
        count = len(words) // length
        return torch.tensor(words[: count * length]).view(count, length)


class LanguageModel(nn.Module):
    """A causal transformer; the embeddings of the words are those of the output, too."""

    def __init__(self, words: int, length: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        nn.init.normal_(self.words.weight, std=0.05)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) + self.places[: words.shape[-1]]
        return F.linear(self.norm(self.blocks(hidden)), self.words.weight)


class Block(nn.Module):
    """Attention to the words before, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        parts = self.attend(self.norms[0](hidden)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        hidden = hidden + self.output(attended.transpose(1, 2).reshape(rows, length, width))
        return hidden + self.perceptron(self.norms[1](hidden))


def next_word_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the known words of each block but its first: one number a block."""
    targets = blocks[:, 1:]
    logits = model(blocks[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    known = (targets != UNKNOWN).float()
    return (losses * known).sum(1) / known.sum(1).clamp(min=1)
