"""Read and write safetensors checkpoints in the three release layouts; make synthetic ones."""

from lingc.checkpoint.expected import expected_tensors, matrix_modules
from lingc.checkpoint.reader import Checkpoint, open_checkpoint, validate
from lingc.checkpoint.source import Source
from lingc.checkpoint.synthetic import SyntheticCheckpoint
from lingc.checkpoint.write import make_twin, write_checkpoint

__all__ = [
    "Checkpoint",
    "Source",
    "SyntheticCheckpoint",
    "expected_tensors",
    "make_twin",
    "matrix_modules",
    "open_checkpoint",
    "validate",
    "write_checkpoint",
]
