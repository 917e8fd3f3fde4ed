"""moesim.policies."""

if __name__ != "moesim.policies":
    raise ImportError("import this folder as moesim.policies, not as policies")
