"""What a run did, in numbers."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Stats:
    """What a run did, and for how long.

    Attributes:
        prompt_tokens: Fed in prefill.
        prefill_s: Time in prefill, the draft layer's part included.
        decoded_tokens: Produced by decode steps or rounds.
        decode_s: Time in those.
        steps: Decode steps or rounds.
    """

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decoded_tokens: int = 0
    decode_s: float = 0.0
    steps: int = 0
