"""Measured memory of a process: resident now, and its peak."""

import resource

import torch

from fireflyds.planner.memory import GIB


def resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes; before a model is loaded, that of the libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_peak(before: int = 0) -> str:
    """Describes the measured peak of this rank so far; on the CPU minus `before` bytes (see `resident_bytes`)."""
    if torch.cuda.is_available():
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return f"measured peak {peak / GIB:.2f} GiB per GPU ({reserved / GIB:.2f} GiB reserved)"
    return f"measured peak {(resident_bytes() - before) / GIB:.2f} GiB per rank, without libraries"
