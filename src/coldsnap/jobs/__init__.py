"""From what the platform delivers to what goes back: jobs are checked, run on an engine, streamed and recorded.

It may import `records` and `cost`. It knows the engine only by its border (`coldsnap.engine`), and nothing of vLLM,
snapshots or the boot.
"""
