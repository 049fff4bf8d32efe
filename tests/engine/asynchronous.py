"""`handler.py` with vLLM's asynchronous scheduling, which a GPU has by default and vLLM's CPU platform switches off."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

if __name__ == "__main__":
    from coldsnap.processes import end_at_signals, leave
    from coldsnap.vllm import start

    end_at_signals()
    configure = start.configure

    def asynchronous(**named: Any) -> Any:
        parsed, config = configure(**named)
        config.scheduler_config.async_scheduling = True
        name = config.scheduler_config.get_scheduler_cls().__name__
        if name != "AsyncScheduler":
            raise RuntimeError(f"expected vLLM's AsyncScheduler, found {name}")
        return parsed, config

    start.configure = asynchronous
    from coldsnap.worker import main

    leave(main())
