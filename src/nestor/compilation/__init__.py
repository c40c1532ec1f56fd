"""Compilation of the steps of a run."""

from nestor.compilation.compiled_loop import CompiledLoop
from nestor.compilation.make_loop import make_loop

__all__ = ["CompiledLoop", "make_loop"]
