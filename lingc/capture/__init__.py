"""Model and phase to a captured program, without weights.

Each distinct kind of block is exported once a phase with `torch.export` on the meta device, and the
blocks are stitched to one flat graph: 32 layers cost as much to capture as the three kinds of block
they are made of. What cannot be said in functional ATen is one of the structural ops, lightning
attention and expert dispatch; state is explicit, an input and a result.

Capture is in f32 whatever the target: the element type of the activations is a property of the
target and is set by `lingc.stages.retype`, where every op says what it rounds.
"""

from lingc.capture.capturer import Capturer
from lingc.capture.inputs import Sizes, input_types, state_types

__all__ = ["Capturer", "Sizes", "input_types", "state_types"]
