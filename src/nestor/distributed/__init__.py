"""Runtimes: where the tensors of a program live. The runtimes of several processes are imported at first use."""

from nestor.distributed.runtime import Runtime, SingleDevice

__all__ = ["Runtime", "SingleDevice"]
