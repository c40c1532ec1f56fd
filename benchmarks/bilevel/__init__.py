"""The problems of the public benchmark ``benchmark_bilevel``, solved by nestor and by published stochastic methods.

Reference: Dagreou, Ablin, Vaiter, Moreau, A framework for bilevel optimization that enables stochastic and global
variance reduction algorithms, NeurIPS 2022; benchmark of the Benchopt team, https://github.com/benchopt/benchmark_bilevel.
"""
