"""A machine with GPUs that are not there, for vLLM's CUDA build up to the first call that needs one.

Its two driver libraries are built from the C beside this file: `pretended_cuda.c` notes every call and has no device,
`pretended_nvml.c` describes the GPUs. `GPUS` has what the driver of a real one says of it.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_SOURCES = Path(__file__).parent
_LIBRARIES = {"libcuda.so.1": "pretended_cuda.c", "libnvidia-ml.so.1": "pretended_nvml.c"}
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    capability: str
    memory: int
    """Bytes."""


GPUS = {
    "L4": Gpu("NVIDIA L4", "8.9", 23034 * _MIB),
    "4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 * _MIB),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 81920 * _MIB),
    "H100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 * _MIB),
    "H200": Gpu("NVIDIA H200", "9.0", 143771 * _MIB),
    "B200": Gpu("NVIDIA B200", "10.0", 183359 * _MIB),
}


def build(folder: Path) -> None:
    """Compile the driver's libraries into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, source in _LIBRARIES.items():
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-o",
            str(folder / library),
            str(_SOURCES / source),
            "-ldl",
        ]
        subprocess.run(command, check=True)  # noqa: S603 -- our own sources


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` GPUs of one kind. `libraries` is what `build` filled; the driver's calls are noted in `log`."""

    gpu: Gpu
    count: int
    libraries: Path
    log: Path

    def environ(self) -> dict[str, str]:
        """Return the variables that a process on this machine has."""
        return {
            "LD_LIBRARY_PATH": str(self.libraries),
            "PRETENDED_CALLS": str(self.log),
            "PRETENDED_GPUS": str(self.count),
            "PRETENDED_GPU": self.gpu.name,
            "PRETENDED_CAPABILITY": self.gpu.capability,
            "PRETENDED_MEMORY": str(self.gpu.memory),
        }

    def calls(self) -> dict[int, list[str]]:
        """Return what was called of the CUDA driver so far, by process."""
        calls: dict[int, list[str]] = {}
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else ():
            process, _, function = line.partition(" ")
            calls.setdefault(int(process), []).append(function)
        return calls
