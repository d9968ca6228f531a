"""An ahead-of-time compiler for Ling-2.6-flash and smaller models of its architecture."""

__version__ = "0.1.0"
