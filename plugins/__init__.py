"""One file an op: its maths, shapes, reference, limits, cost and cases."""

if __name__ != "lingc.plugins":
    raise ImportError(f"import lingc.plugins, not {__name__}")
