"""A process image: what a worker's process is once everything is imported, in a file that a later boot becomes.

`format.h` describes the file, `snap.c` writes it from inside the process, `restore.c` becomes it, `snap.py` is Python's
way to both, `arrival.py` gives a restored process its own arguments, environment and random numbers. What is imported,
and what a worker does then, they don't know: `make_image.py` on the ground floor does. See docs/process-image.md.
"""
