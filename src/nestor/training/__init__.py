"""A run: the schedule of a program and everything that changes."""
