"""Runs at the start of every Python of a test: notes its command, and writes its stack when the driver asks."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

if os.environ.get("PRETENDED_STACKS"):
    stacks = Path(os.environ["PRETENDED_STACKS"]).open("a", encoding="utf-8")  # noqa: SIM115 -- for this process's life
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    with Path(os.environ["PRETENDED_PYTHONS"]).open("a", encoding="utf-8") as pythons:
        pythons.write(f"{os.getpid()} {' '.join(sys.orig_argv)}\n")
