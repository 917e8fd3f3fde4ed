"""moesim.traces."""

if __name__ != "moesim.traces":
    raise ImportError("import this folder as moesim.traces, not as traces")
