"""The same emoji drawn by two vendors: a pair for domain adaptation."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from shared.data.places import Place

VENDORS = ("google", "twitter")
PLACES = {
    vendor: Place(
        title=f"The emoji of {vendor.title()}",
        fetched=f"emoji-{vendor}",
        advice=f"unpack npm's emoji-datasource-{vendor}@16.0.0 into FOLDER/emoji-{vendor} and pass `--data FOLDER`",
    )
    for vendor in VENDORS
}


@dataclass(frozen=True)
class Emoji:
    """Drawings in [0, 1], N x 3 x size x size, on white; row i of both vendors is the same emoji.

    Args:
        google: The drawings of Google.
        twitter: The drawings of Twitter.
        labels: The category of each, an index into `names`.
        names: The categories.
        subcategories: The finer category of each, by name.
    """

    google: Tensor
    twitter: Tensor
    labels: Tensor
    names: list[str]
    subcategories: list[str]


def emoji(folder: Path, size: int = 32) -> Emoji:
    """1,906 emoji by Google and by Twitter, 9 unbalanced categories, 98 subcategories.

    They are not shuffled. Split them by emoji, not by drawing, or a test emoji is seen in training.

    Source: npm `emoji-datasource-google` and `-twitter` 16.0.0 (MIT); the drawings are Apache-2.0 and CC BY 4.0.
    """
    roots = {vendor: place.find(folder, "emoji.json", f"img/{vendor}/64") for vendor, place in PLACES.items()}
    entries = json.loads((roots["google"] / "emoji.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["category"] != "Component" and _is_drawn(entry)]
    names = sorted({entry["category"] for entry in entries})
    drawings = {
        vendor: torch.stack([read_image(root / f"img/{vendor}/64" / entry["image"], size) for entry in entries])
        for vendor, root in roots.items()
    }
    labels = torch.tensor([names.index(entry["category"]) for entry in entries])
    return Emoji(**drawings, labels=labels, names=names, subcategories=[entry["subcategory"] for entry in entries])


def read_image(path: Path, size: int) -> Tensor:
    """An image on white, in [0, 1], 3 x size x size."""
    with Image.open(path) as file:
        drawing = file.convert("RGBA")
    image = Image.new("RGBA", drawing.size, "white")
    image.alpha_composite(drawing)
    pixels = image.convert("RGB").resize((size, size)).tobytes()
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float() / 255


def _is_drawn(entry: dict) -> bool:
    return all(entry[f"has_img_{vendor}"] for vendor in VENDORS)
