"""Tests with programs that are not Python's, such as a browser. `make desk-check` installs them and runs these."""
