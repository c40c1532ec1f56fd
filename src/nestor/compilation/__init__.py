"""Steps of a run as compiled graphs."""

from nestor.compilation.compiled_steps import CompiledSteps

__all__ = ["CompiledSteps"]
