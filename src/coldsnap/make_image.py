"""Makes the process image of a worker: imports what a boot imports, writes the process down, and is where it goes on.

What a boot imports is found out by a rehearsal: a child boots and answers one job, and notes the names. Secrets and
the platform's variables are not in the environment of this process, and so not in the image.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from coldsnap import boot, processes, worker
from coldsnap.errors import BootError, ColdsnapError, ImageError
from coldsnap.image import arrival, noting
from coldsnap.image.arrival import Restored
from coldsnap.image.noting import Environment
from coldsnap.image.snap import Snap
from coldsnap.settings import ROOT, Settings
from coldsnap.timeline import Timeline
from coldsnap.vllm import release, start

FOLDER = ROOT / "build" / "image"
"""Where `image/build.sh` put its programs, and where the image lies."""
IMAGE = FOLDER / "worker.image"
HANDLER = ROOT / "handler.py"
_SECRET = re.compile(r"RUNPOD_|AWS_|.*(TOKEN|SECRET|PASSWORD|KEY|_URL)|COLDSNAP_IMAGE_")
_JOB = '{"input": {"messages": [{"role": "user", "content": "hi"}], "sampling_params": {"max_tokens": 2}}}'
_SECONDS = 300.0
_PROGRAM = "import sys; sys.path[:0] = sys.argv[1:3]; from coldsnap import make_image; make_image.main()"


def make(environ: Mapping[str, str], image: Path = IMAGE) -> None:
    """Make the `image` that boots in `environ` can use. Raises `ImageError` where there can be none."""
    library = FOLDER / "snap.so"
    if not release.is_cpu_build():
        raise ImageError("beside a GPU there is none: what CUDA keeps in a process cannot be written down")
    if not library.exists():
        raise ImageError("there is no C compiler that could build what writes it")
    own = {name: value for name, value in environ.items() if not _SECRET.match(name)}
    with tempfile.TemporaryDirectory(prefix="coldsnap-image-") as scratch:
        done = subprocess.run(  # noqa: S603 -- this module
            [sys.executable, "-P", "-c", _PROGRAM, str(ROOT / "src"), str(ROOT), scratch, str(image)],
            env=own | {"LD_PRELOAD": str(library)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ImageError(done.stdout.strip().rpartition("\n")[2] or f"its process ended with {done.returncode}")


def main() -> None:
    """Write this process, started by `make`; or, restored from it, run the worker."""
    scratch, image = map(Path, sys.argv[-2:])
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.pop("LD_PRELOAD")
    try:
        restored = _write(scratch, image)
    except ColdsnapError as error:
        print(error.message)  # noqa: T201
        processes.leave(1)
    if restored is None:
        processes.leave(0)
    timeline = Timeline()
    timeline.mark("restore")
    processes.end_at_signals()
    arrival.begin(restored)
    timeline.mark("take_over")
    processes.leave(worker.main(timeline=timeline))


def _write(scratch: Path, image: Path) -> Restored | None:
    begun = time.time()
    settings = Settings.read(os.environ)
    worker.prepare(os.environ, local=False)
    boot.prepare(settings, os.environ)
    before = dict(os.environ)
    noting.begin()
    snap = Snap(FOLDER / "snap.so")
    start.load(os.environ)
    worker.import_sdk()
    start.load_http()
    for name in _rehearsed(scratch):
        with contextlib.suppress(Exception):  # an import that failed in the rehearsal too, and was caught
            importlib.import_module(name)
    import setproctitle

    setproctitle.getproctitle()  # it looks for the arguments once, and they will lie elsewhere
    for name in [name for name in sys.modules if name.partition(".")[0] == "runpod"]:
        del sys.modules[name]  # its constants are the platform's addresses and keys: each process imports it anew
    noting.end()
    environment = Environment(before, dict(os.environ), snap.variables_read())
    depends = sorted({*_sources(), *(path for path in sys.path if Path(path).name == "site-packages")})
    if changed := changed_since(begun, depends):
        raise ImageError(f"{changed} was changed while the image was being made")
    gc.collect()
    gc.freeze()
    arrived = snap.write(image, depends)
    return None if arrived is None else Restored(arrived, environment)


def changed_since(begun: float, files: Iterable[str]) -> str | None:
    """Return a file that was changed after `begun`: what is imported of it may be what it was before."""
    return next((file for file in files if Path(file).stat().st_mtime >= int(begun)), None)


def _sources() -> Iterator[str]:
    """Yield the files that the modules of this process came from."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).is_absolute() and Path(file).is_file():
            yield file
    yield str(HANDLER)


def _rehearsed(scratch: Path) -> list[str]:
    """Return what a boot imports beyond what is imported here, in its order: a child boots and answers a job."""
    names = scratch / "names"
    pid = os.fork()
    if pid == 0:
        _rehearse(scratch, names)
    if os.waitpid(pid, 0)[1]:
        raise ImageError(f"the rehearsal of a boot failed: {_last_line(scratch / 'rehearsal')}")
    return list(dict.fromkeys(name for name in names.read_text().split() if not name.startswith("runpod")))


def _rehearse(scratch: Path, names: Path) -> None:
    """Boot in this child as `handler.py` does, noting each import in it and in its children; does not return."""
    log = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    output = os.open(scratch / "rehearsal", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.addaudithook(lambda event, args: os.write(log, f"{args[0]}\n".encode()) and None if event == "import" else None)
    os.environ.update({"COLDSNAP_LEDGER_DIR": str(scratch), "CACHE_URI": "off"})
    for name in ("LEDGER_S3_URI", "METRICS_PUSH_URL"):
        os.environ.pop(name, None)
    sys.argv[:] = [str(HANDLER), "--test_input", _JOB]
    try:
        processes.leave(worker.main())
    except BaseException as error:  # noqa: BLE001 -- a child must not go on as its parent
        print(repr(error), flush=True)  # noqa: T201
        os._exit(1)


def _last_line(file: Path) -> str:
    return file.read_text(errors="replace").strip().rpartition("\n")[2] if file.exists() else "it wrote nothing"


def command(argv: list[str] | None = None) -> int:
    """Make the image for the environment that this is run in, in the file that a boot looks for or `argv` names."""
    image = Path(argv[0]).absolute() if argv else IMAGE
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in image.parent.glob(f"{image.name}.*"):  # of a maker that was killed
                part.unlink()
            make(os.environ, image)
        except BlockingIOError:
            print("coldsnap: a process image is being made already", file=sys.stderr)  # noqa: T201
            return 1
        except BootError as error:
            print(f"coldsnap: no process image: {error.message}", file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
