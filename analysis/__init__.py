"""moesim.analysis."""

if __name__ != "moesim.analysis":
    raise ImportError("import this folder as moesim.analysis, not as analysis")
