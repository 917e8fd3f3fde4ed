"""moesim.real."""

if __name__ != "moesim.real":
    raise ImportError("import this folder as moesim.real, not as real")
