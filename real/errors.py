"""What can go wrong while a machine works."""

from __future__ import annotations

from moesim.errors import MoesimError


class ExecutionError(MoesimError):
    """A lane died, hung, or worked on the wrong bytes; the line names the lane and its work."""
