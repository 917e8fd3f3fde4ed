"""``python -m moesim``."""

from moesim.cli import program

program()
