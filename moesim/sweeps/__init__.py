"""Sweeps: many replays from one experiment file, on every core, to one table.

``experiment`` reads the file and spells the configurations out, ``passes`` joins those that one
pass over a trace can serve, ``execute`` runs passes on this machine or on Ray, ``table`` makes the
table.
"""

from moesim.sweeps.experiment import Configuration, Experiment, read_experiment
from moesim.sweeps.sweep import RESULTS, Sweep, run

__all__ = ["RESULTS", "Configuration", "Experiment", "Sweep", "read_experiment", "run"]
