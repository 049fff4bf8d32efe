"""`handler.py` without the patches that UNPATCHED names, as with a release that nobody tried."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

if __name__ == "__main__":
    from coldsnap import patches
    from coldsnap.processes import end_at_signals, leave

    end_at_signals()
    refused = os.environ["UNPATCHED"].split(",")
    allowed = patches.allowed
    patches.allowed = lambda name, unlike=None: allowed(name, unlike="refused" if name in refused else unlike)
    from coldsnap.worker import main

    leave(main())
