"""Weak labels of 20 Newsgroups by keywords."""

from collections.abc import Sequence

import torch
from torch import Tensor

KEYWORDS = {
    "alt.atheism": "atheist atheists atheism religion belief",
    "comp.graphics": "graphics image images animation gif polygon",
    "comp.os.ms-windows.misc": "windows microsoft dos driver win",
    "comp.sys.ibm.pc.hardware": "pc motherboard ide bus controller bios",
    "comp.sys.mac.hardware": "mac apple macintosh powerbook",
    "comp.windows.x": "window motif xterm server widget",
    "misc.forsale": "sale sell offer price shipping",
    "rec.autos": "car cars ford toyota engine",
    "rec.motorcycles": "bike motorcycle ride riding honda",
    "rec.sport.baseball": "baseball pitcher pitching game season",
    "rec.sport.hockey": "hockey nhl team game playoff",
    "sci.crypt": "encryption key security clipper privacy",
    "sci.electronics": "circuit voltage electronics power radio",
    "sci.med": "doctor medical disease patients health",
    "sci.space": "space nasa orbit moon earth",
    "soc.religion.christian": "church christ christian god sin",
    "talk.politics.guns": "gun guns weapons firearms fire",
    "talk.politics.mideast": "israel arab jews turkish war",
    "talk.politics.misc": "government president clinton tax people",
    "talk.religion.misc": "god jesus bible religion lord",
}


def weak_labels(texts: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the newsgroup most of whose keywords occur in a post, and whether any keyword occurs in it.

    Equals are decided by lot.

    Args:
        texts: The posts, in lower case, words separated by spaces.
        names: The newsgroups in the order of the labels.
    """
    keywords = [set(KEYWORDS[name].split()) for name in names]
    votes = torch.tensor([[len(words & group) for group in keywords] for words in map(set, map(str.split, texts))])
    return (votes + 0.5 * torch.rand(votes.shape)).argmax(1), votes.sum(1) > 0
