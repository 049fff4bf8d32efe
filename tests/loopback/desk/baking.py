"""Runs of `coldsnap bake` in processes of their own, and checkpoints for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coldsnap.settings import ROOT

PYTHON = ROOT / ".venv-bake" / "bin" / "python"
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 48}
_LOOK_SECONDS = 0.005
_LIMIT_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Baked:
    """A run that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that says what was wrong: no traceback, nothing after it."""
        *before, last = self.stderr.splitlines()
        assert self.code == 1, self
        assert last.startswith("coldsnap: "), self
        assert not any(line.startswith(("coldsnap: ", "Traceback")) for line in before), self
        return last.removeprefix("coldsnap: ")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return all variables of a bake: no token or endpoint of the environment that the tests happen to run in."""
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return kept | {"HF_HUB_OFFLINE": "1"} | more


async def bake(*arguments: object, home: Path, kill_at: Callable[[str], bool] | None = None, **environ: str) -> Baked:
    """Run the builder to its end, or kill it as soon as `kill_at` holds for what is on stderr."""
    return await run(PYTHON, ROOT / "builder" / "bake.py", *arguments, home=home, kill_at=kill_at, **environ)


async def run(*command: object, home: Path, kill_at: Callable[[str], bool] | None = None, **environ: str) -> Baked:
    """Run a command in the folder `home`."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), env=environment(home, **environ), cwd=home, process_group=0,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    seen = bytearray()

    async def read(stream: asyncio.StreamReader) -> None:
        while data := await stream.read(1 << 16):
            seen.extend(data)

    async def watch() -> None:
        while process.returncode is None:
            if kill_at is not None and kill_at(seen.decode(errors="replace")):
                os.killpg(process.pid, signal.SIGKILL)
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async with asyncio.timeout(_LIMIT_SECONDS):
        out, _, _ = await asyncio.gather(process.stdout.read(), read(process.stderr), watch())
        code = await process.wait()
    return Baked(code, out.decode(), seen.decode())


def checkpoint(folder: Path, tensors: Mapping[str, tuple[int, ...]] | None = None, **config: Any) -> Path:
    """Write a checkpoint of zeros that no engine could run: for what goes by names, shapes and sizes."""
    shapes = tensors or {"model.embed_tokens.weight": (48, 64), "model.layers.0.mlp.up_proj.weight": (128, 64)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder
