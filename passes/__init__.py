"""One file a pass: what it matches, when it applies, what it puts there."""

if __name__ != "lingc.passes":
    raise ImportError(f"import lingc.passes, not {__name__}")
