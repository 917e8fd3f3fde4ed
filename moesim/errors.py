"""The errors a user can cause. Each is one line: what is wrong, where, and the mend.

The command line prints the line and leaves with code 2; a traceback is a bug of moesim's.
"""

from __future__ import annotations


class MoesimError(Exception):
    """A mistake the user can mend; its text is one clear line."""


class UsageError(MoesimError):
    """A wrong option or a value out of its range."""


class TraceError(MoesimError):
    """A trace file that cannot be read, or breaks the format's rules."""


class ProfileError(MoesimError):
    """A model or hardware profile with an unknown, missing or impossible value."""


class PolicyError(MoesimError):
    """A policy that broke the protocol: an id out of range, a pinned or absent victim."""


class NotRunError(MoesimError):
    """A run that cannot be made: the policy needs what the trace lacks."""
