"""Iterative differentiation: responses that differentiate the steps of the lower level."""
