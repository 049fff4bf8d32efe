"""A fake of NVML, the driver's library: the few calls that the worker makes of `pynvml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass
class FakeNvml:
    """A machine with the given GPUs. `broken` names a call that fails."""

    free: list[int] = field(default_factory=lambda: [80 << 30])
    """Bytes free on each GPU."""
    cuda: int = 13000
    """The newest CUDA that the driver supports: 1000 times major plus 10 times minor."""
    millijoules: list[int | None] = field(default_factory=list)
    """Each GPU's energy counter, which a test moves; None is not supported."""
    broken: str = ""
    open: int = 0
    """How many `nvmlInit` have had no `nvmlShutdown`."""
    readings: int = 0
    """How often an energy counter was read."""

    class NVMLError(Exception):
        """What every call may raise."""

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's names
        """Open the library."""
        self._call("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        """Close it."""
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """Return how many GPUs there are."""
        self._call("nvmlDeviceGetCount")
        return len(self.free)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        """Return the driver's version."""
        return "535.104.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        """Return the newest CUDA that it supports."""
        return self.cuda

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        """Return the GPU's number as its handle."""
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: ARG002, N802
        """Return what the GPU is called."""
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: ARG002, N802
        """Return its compute capability."""
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        """Return the memory of a GPU."""
        return SimpleNamespace(free=self.free[handle], total=80 << 30)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        """Return the counter, in mJ."""
        reading = self.millijoules[handle]
        self.readings += 1
        if reading is None:
            raise self.NVMLError("Not Supported")
        return reading

    def _call(self, name: str) -> None:
        if name == self.broken:
            raise self.NVMLError("Driver Not Loaded")
