"""Any CPU.

No figures: the engine runs on whatever CPU it is carried to, and nothing is probed while it is
compiled. Activations stay FP32 because ONNX Runtime's CPU provider has no BF16 arithmetic, so a
precision with quantized activations keeps only its quantized weights here.
"""

from lingc.targets.spec import Target

CPU = Target(
    name="cpu",
    vendor="any",
    title="any CPU that ONNX Runtime supports",
    engines=("onnx",),
    arch="cpu",
    activations="f32",
    fp8_activations=False,
)

ALL = (CPU,)
