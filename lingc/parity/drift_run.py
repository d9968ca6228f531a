"""A measurement of drift from a directory: of its weights, or of its config where it has none."""

from pathlib import Path

from lingc.checkpoint import open_checkpoint, validate
from lingc.errors import DataError
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.parity.data import SAMPLE, read_rows
from lingc.parity.drift import Advance, Drift, StateDtype, of_config, of_model
from lingc.runtime.tokenizer import Tokenizer


def measure(
    path: Path,
    *,
    tokens: int,
    state_dtype: StateDtype,
    data: Path | None = None,
    advance: Advance = lambda _: None,
) -> Drift:
    """Hold the linear states of a checkpoint in a type, over so many tokens.

    Args:
        path: A checkpoint directory, or one with a `config.json` alone.
        data: JSONL rows, joined and repeated until there are enough tokens; for weights.

    Raises:
        ConfigError: There is no config that can be read.
        CheckpointError: Its weights are not whole.
        DataError: The rows are bad.
        UsageError: There is no linear layer, or there are too few tokens.
    """
    if not any(path.glob("*.safetensors")):
        config = ModelConfig.from_file(path)
        name = path.absolute().name
        return of_config(config, name, tokens=tokens, state_dtype=state_dtype, advance=advance)
    checkpoint = open_checkpoint(path)
    validate(checkpoint)
    rows = read_rows(
        data or SAMPLE,
        vocab=checkpoint.config.vocab_size,
        tokenizer=Tokenizer.from_directory(path),
        max_tokens=tokens,
    )
    joined = [token for row in rows for token in row.ids]
    if not joined:
        raise DataError(f"{str(data)!r} gives no tokens")
    row = (joined * -(-tokens // len(joined)))[:tokens]
    module = from_source(checkpoint)
    name = path.absolute().name
    return of_model(module, name, row, state_dtype=state_dtype, advance=advance)
