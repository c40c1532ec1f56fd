"""A run of a program: the schedule, the optimizer steps, and the mutable state."""
