"""Implicit differentiation: condition x solver x cross derivative."""
