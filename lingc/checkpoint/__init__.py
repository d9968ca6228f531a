"""Read and write safetensors checkpoints in the three release layouts; make synthetic ones."""

from lingc.checkpoint.expected import expected_tensors, matrix_modules
from lingc.checkpoint.reader import Checkpoint, open_checkpoint, validate
from lingc.checkpoint.source import Source

__all__ = [
    "Checkpoint",
    "Source",
    "expected_tensors",
    "matrix_modules",
    "open_checkpoint",
    "validate",
]
