"""The experiments of ``docs/evidence.md``: each is a grid of small trainings."""
