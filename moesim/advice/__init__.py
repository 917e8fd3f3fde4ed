"""What should I set? Replays turned into one recommendation, and how sure it is.

``question`` is what is asked, ``room`` the device memory that experts can have, ``trust`` how far
simulated times may be off, ``curve`` latency against memory, ``verdict`` the answer in words.
"""

from moesim.advice.advisor import advise
from moesim.advice.question import Question, Target, parse_slo

__all__ = ["Question", "Target", "advise", "parse_slo"]
