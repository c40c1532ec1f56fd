"""Weak labels of three text sets by keywords: 20 Newsgroups, Reuters R8, Rotten Tomatoes."""

import re
from collections.abc import Mapping, Sequence

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
REUTERS = {
    "acq": "acquire acquisition merger stake bid takeover",
    "crude": "oil crude barrels opec petroleum",
    "earn": "shr net profit dividend qtr payout",
    "grain": "wheat corn grain crop tonnes",
    "interest": "interest rate rates prime lending",
    "money-fx": "dollar currency yen bank market",
    "ship": "ship ships shipping port vessel vessels",
    "trade": "trade exports imports tariffs deficit",
}
FILMS = {
    "rotten": "bad worst worse dull boring flat lacks fails mess tedious predictable silly stupid bland lame awful "
    "waste never nothing unfortunately disappointing plot too sadly hardly",
    "fresh": "good best great funny fun charming moving powerful beautiful beautifully brilliant wonderful delightful "
    "engaging fascinating touching compelling smart entertaining enjoyable witty fresh performances love heart",
}


def plain_words(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces, without punctuation and digits."""
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))


def weak_labels(
    texts: Sequence[str], names: Sequence[str], keywords: Mapping[str, str] = KEYWORDS
) -> tuple[Tensor, Tensor]:
    """Return the class most of whose keywords occur in a text, and whether any keyword occurs in it.

    Equals are decided by lot.

    Args:
        texts: The texts, in lower case, words separated by spaces.
        names: The classes in the order of the labels.
        keywords: The keywords of each class, separated by spaces.
    """
    groups = [set(keywords[name].split()) for name in names]
    votes = torch.tensor([[len(words & group) for group in groups] for words in map(set, map(str.split, texts))])
    return (votes + 0.5 * torch.rand(votes.shape)).argmax(1), votes.sum(1) > 0
