"""Runtimes: where the tensors of a program live. Those of several processes are imported when they are used."""

from nestor.distributed.runtime import Runtime
from nestor.distributed.single_device import SingleDevice

__all__ = ["Runtime", "SingleDevice"]
