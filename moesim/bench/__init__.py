"""How fast moesim is, beside named references that are measured in the same run."""
