"""The worker's entry point: boot the engine from its snapshot, then serve jobs.

On Runpod the jobs come from the endpoint; elsewhere one job comes from `--test_input` or test_input.json.
Read on in `src/coldsnap/boot.py`, `jobs/job.py` and `cost/shares.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if __name__ == "__main__":  # the engine's child processes may import this file
    from coldsnap.processes import end_at_signals, leave

    end_at_signals()
    from coldsnap.worker import main

    leave(main())
