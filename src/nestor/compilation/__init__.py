"""Steps of a run as compiled graphs."""

from nestor.compilation.compiled_replay import CompiledReplay, with_graphs
from nestor.compilation.compiled_steps import CompiledSteps

__all__ = ["CompiledReplay", "CompiledSteps", "with_graphs"]
