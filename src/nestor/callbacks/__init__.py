"""Callbacks: whatever watches a run."""

from nestor.callbacks.agreement import Agreement
from nestor.callbacks.callback import Callback
from nestor.callbacks.json_lines import JSONLines
from nestor.callbacks.progress import Progress

__all__ = ["Agreement", "Callback", "JSONLines", "Progress"]
