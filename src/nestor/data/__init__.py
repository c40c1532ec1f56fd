"""Data: endless batches, episodes."""
