"""NVIDIA GPUs.

Sources, by column:
    sms: H100, H200: NVIDIA H100 Tensor Core GPU Architecture white paper, table "H100 SXM5". H20,
        H20-3e: TensorRT-LLM pull request 4430, which keys tactics on 78 SMs, and reported device
        queries. Spark: the DGX Spark hardware guide prints 6,144 CUDA cores; a multiprocessor of
        compute capability 12.x has 128 (CUDA C++ Programming Guide, "Arithmetic Instructions").
    memory_bytes: product datasheets, in their decimal gigabytes. Drivers report a little more (an
        H200 143,771 MiB), so what fits by this column fits. H20: the LMSYS blog named below.
    hbm_bytes_per_s: product datasheets of H100, H200 and the DGX Spark. H20, H20-3e: "Together with
        SGLang: Best Practices for Serving DeepSeek-R1 on H20-96G", LMSYS, 2025-09-26.
    l2_bytes: H100: the architecture white paper. H200: as the device reports it. H20, H20-3e and
        Spark: no source that agrees with another, so not known.
    smem_per_block_bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
        Capability", maximum shared memory per thread block.
    dense_flops_per_s: product datasheets of H100 and H200. They print tensor-core rates with 2:4
        sparsity; dense is half of that. H20, H20-3e: the LMSYS blog, dense. Spark: the datasheet
        prints 1 PFLOP/s of FP4 with sparsity and no other dtype.

`rtx-89` and `rtx-120` are classes of parts that share a compute capability and little else: the
engine is for all of them, so it may rely only on what the capability guarantees.
"""

from lingc.targets.spec import KIB, MIB, Target

_GB = 10**9
_HOPPER_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12}
_H20_FLOPS = {"bf16": 148e12, "fp16": 148e12, "fp8": 296e12}

H20 = Target(
    name="h20",
    vendor="nvidia",
    title="NVIDIA H20, 96 GB",
    engines=("cuda", "tensorrt"),
    arch="sm_90a",
    sms=78,
    memory_bytes=96 * _GB,
    hbm_bytes_per_s=4.0e12,
    smem_per_block_bytes=227 * KIB,
    dense_flops_per_s=_H20_FLOPS,
    activations="bf16",
    fp8_activations=True,
)

H20_3E = Target(
    name="h20-3e",
    vendor="nvidia",
    title="NVIDIA H20-3e, 141 GB",
    engines=("cuda", "tensorrt"),
    arch="sm_90a",
    sms=78,
    memory_bytes=141 * _GB,
    hbm_bytes_per_s=4.8e12,
    smem_per_block_bytes=227 * KIB,
    dense_flops_per_s=_H20_FLOPS,
    activations="bf16",
    fp8_activations=True,
)

H100_SXM = Target(
    name="h100-sxm",
    vendor="nvidia",
    title="NVIDIA H100 SXM, 80 GB",
    engines=("cuda", "tensorrt"),
    arch="sm_90a",
    sms=132,
    memory_bytes=80 * _GB,
    hbm_bytes_per_s=3.35e12,
    l2_bytes=50 * MIB,
    smem_per_block_bytes=227 * KIB,
    dense_flops_per_s=_HOPPER_FLOPS,
    activations="bf16",
    fp8_activations=True,
)

H200_SXM = Target(
    name="h200-sxm",
    vendor="nvidia",
    title="NVIDIA H200 SXM, 141 GB",
    engines=("cuda", "tensorrt"),
    arch="sm_90a",
    sms=132,
    memory_bytes=141 * _GB,
    hbm_bytes_per_s=4.8e12,
    l2_bytes=60 * MIB,
    smem_per_block_bytes=227 * KIB,
    dense_flops_per_s=_HOPPER_FLOPS,
    activations="bf16",
    fp8_activations=True,
)

SPARK = Target(
    name="spark",
    vendor="nvidia",
    title="NVIDIA DGX Spark (GB10), 128 GB shared with the CPU",
    engines=("tensorrt",),
    arch="sm_121a",
    sms=48,
    memory_bytes=128 * _GB,
    hbm_bytes_per_s=273e9,
    smem_per_block_bytes=99 * KIB,
    dense_flops_per_s={"fp4": 500e12},
    activations="bf16",
    fp8_activations=True,
)

RTX_89 = Target(
    name="rtx-89",
    vendor="nvidia",
    title="any NVIDIA GPU of compute capability 8.9 (Ada)",
    engines=("tensorrt",),
    arch="sm_89",
    smem_per_block_bytes=99 * KIB,
    activations="bf16",
    fp8_activations=True,
)

RTX_120 = Target(
    name="rtx-120",
    vendor="nvidia",
    title="any NVIDIA GPU of compute capability 12.0 (RTX Blackwell)",
    engines=("tensorrt",),
    arch="sm_120a",
    smem_per_block_bytes=99 * KIB,
    activations="bf16",
    fp8_activations=True,
)

ALL = (H20, H20_3E, H100_SXM, H200_SXM, SPARK, RTX_89, RTX_120)
