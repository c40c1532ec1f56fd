"""Vectors of parameter space: sequences of tensors, one for each parameter."""
