"""Steps of a run as compiled graphs."""

from nestor.compilation.compiled_loop import CompiledLoop
from nestor.compilation.step_compiler import with_compiled_replays

__all__ = ["CompiledLoop", "with_compiled_replays"]
