"""The end of a script of several processes."""

import os
import sys

import torch.distributed as dist


def finish() -> None:
    """Leave together, and without the interpreter's tear-down, in which gloo's threads may still run."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
