"""How much a model needs, and what fits, without building it.

From config and recipe alone, so that it runs where nothing but the runtime is installed.
"""

from lingc.sizing.estimate import (
    MARGIN,
    Memory,
    Sizing,
    Traffic,
    distinct_experts,
    own_precision,
)
from lingc.sizing.memory import MAX_DRAFT, PAGE_SIZE, PREFILL_TOKENS

__all__ = [
    "MARGIN",
    "MAX_DRAFT",
    "PAGE_SIZE",
    "PREFILL_TOKENS",
    "Memory",
    "Sizing",
    "Traffic",
    "distinct_experts",
    "own_precision",
]
