"""Automatic differentiation: reverse and forward passes, and what every evaluation inside them depends on."""
