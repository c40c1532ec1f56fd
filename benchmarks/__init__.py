"""Side by side with hand-written loops and with other libraries: speed, memory, and what is learned.

``python -m benchmarks --help``; the results are kept in ``docs/benchmarks.md``.
"""
