"""Optimizer steps as functions."""

from nestor.optim.functional_step import functional_step, optimizer_state

__all__ = ["functional_step", "optimizer_state"]
