"""NVML, the NVIDIA driver's own library. It needs no CUDA in this process, and is imported once somebody asks."""

from typing import Any


def driver() -> Any:
    """Return the module that speaks to the driver."""
    import pynvml

    return pynvml
