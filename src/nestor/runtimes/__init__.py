"""Runtimes: where the tensors of a program live. Those of several processes are imported when they are used."""

from nestor.runtimes.runtime import Runtime
from nestor.runtimes.single_device import SingleDevice

__all__ = ["Runtime", "SingleDevice"]
