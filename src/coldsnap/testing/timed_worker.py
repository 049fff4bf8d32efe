"""`handler.py` with an engine that keeps time: `coldsnap serve --handler src/coldsnap/testing/timed_worker.py`.

All but the engine is the worker's own: the SDK's loop, jobs, streams, ledger, books, drain. See `timed_engine`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from coldsnap.processes import end_at_signals, leave

    end_at_signals()
    from coldsnap.testing import timed_engine
    from coldsnap.worker import main

    leave(main(timed_engine.boot))
