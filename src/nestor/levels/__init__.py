"""Levels: the validated graph of a program, the losses of its levels, and how their best responses are composed."""
