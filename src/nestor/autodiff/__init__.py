"""Automatic differentiation: reverse and forward passes, vmap, and the state of torch that an evaluation depends on."""
