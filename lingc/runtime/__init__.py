"""Run an engine: verify and load it, keep its state, turn prompts into tokens.

Imports neither torch nor triton nor onnx: an engine kind's backend is imported when an engine of
that kind is started. `lingc.runtime.load` reads packages; what is exported here works on any
backend.
"""

from lingc.runtime.backend import Backend, Limits
from lingc.runtime.generate import Event, Generator, Run
from lingc.runtime.sampling import Sampling
from lingc.runtime.saved import Prefix
from lingc.runtime.sequence import (
    Acceptance,
    Completion,
    Finish,
    Parked,
    Request,
    Token,
    TokenLogprob,
)
from lingc.runtime.stats import Stats
from lingc.runtime.tokenizer import Tokenizer

__all__ = [
    "Acceptance",
    "Backend",
    "Completion",
    "Event",
    "Finish",
    "Generator",
    "Limits",
    "Parked",
    "Prefix",
    "Request",
    "Run",
    "Sampling",
    "Stats",
    "Token",
    "TokenLogprob",
    "Tokenizer",
]
