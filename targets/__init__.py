"""Devices described as data, and one lowering a kind of engine."""

if __name__ != "lingc.targets":
    raise ImportError(f"import lingc.targets, not {__name__}")
