"""The rows of the table."""

from collections.abc import Callable

from kinds import KINDS as HAZARDS
from kinds_of_losses import LOSSES
from kinds_of_models import MODELS
from setups import Setup

KINDS: dict[str, Callable[[], Setup]] = {**HAZARDS, **MODELS, **LOSSES}
