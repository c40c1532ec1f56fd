"""Compilation of the steps of a run."""

from nestor.compilation.compiled_loop import CompiledLoop
from nestor.compilation.step_compiler import with_compiled_replays

__all__ = ["CompiledLoop", "with_compiled_replays"]
