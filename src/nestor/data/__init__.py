"""Data of a level: endless streams of batches, and episodes of meta-learning."""
