"""How each library computes it: one file a library, with ``CASES[workload][method](definition) -> Case``."""
