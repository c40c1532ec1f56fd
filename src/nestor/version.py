"""The version of nestor."""

__version__ = "0.1.0"
