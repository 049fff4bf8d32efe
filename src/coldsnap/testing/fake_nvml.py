"""What stands for NVML where there is no GPU: energy counters that a test moves."""

from __future__ import annotations

from collections.abc import Sequence


class NVMLError(Exception):
    """As NVML's: something is not supported, or gone."""


class FakeNvml:
    """The functions of `pynvml` that `energy` calls. `millijoules` has a GPU's counter each; None is not supported."""

    NVMLError = NVMLError

    def __init__(self, millijoules: Sequence[int | None]) -> None:
        self.millijoules = list(millijoules)
        self.readings = 0

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's name
        """Do nothing."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 -- NVML's name
        """Return the GPU's number as its handle."""
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802 -- NVML's name
        """Return the counter, in mJ."""
        found = self.millijoules[handle]
        self.readings += 1
        if found is None:
            raise NVMLError("Not Supported")
        return found
