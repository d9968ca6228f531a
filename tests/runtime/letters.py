"""A tokenizer for the toy's 24 tokens, which overlap and split characters."""

import json
from typing import Any

from lingc.runtime import Tokenizer
from tests.runtime.toy import VOCAB

# Bytes in the alphabet of byte-level tokenizers: "Ã©" is é, "ðŁĻĤ" an emoji of four bytes.
PIECES = ["a", "b", "c", "ab", "ca", "bc", "Ġ", "Ġa", "cb", "d", "da", "bd",
          "Ã", "©", "Ã©", "ð", "ŁĻ", "Ĥ", "e", "ea", "be", "eÃ", "<end>", "aa"]  # fmt: skip


def letters() -> Tokenizer:
    """A tokenizer of the toy's vocabulary whose tokens overlap and split characters."""
    assert len(PIECES) == VOCAB
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    added = {
        "id": vocab["<end>"], "content": "<end>", "special": True, "normalized": False,
        "single_word": False, "lstrip": False, "rstrip": False,
    }  # fmt: skip
    value: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    }  # fmt: skip
    config = {
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined %}{{ 'e' if enable_thinking else 'd' }}{% endif %}"
    }
    return Tokenizer(
        {
            "tokenizer.json": json.dumps(value).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )
