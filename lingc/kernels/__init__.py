"""Device code that several ops share, and the functions that make launches of it."""
