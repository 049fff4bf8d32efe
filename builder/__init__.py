"""Makes snapshots: runs in `.venv-bake`, imports `coldsnap`, and is imported by nothing that serves."""
