// RMS norms of two tensors, side by side; one block a row of either.
//
// Constants:
//   WIDTH    channels of a row, a multiple of 8
//   THREADS  of a block, a multiple of 32 and at most 1024
#include "device.cuh"

#define VECTORS ((WIDTH / 8 + THREADS - 1) / THREADS)  // of 8 channels, a thread

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_pair(const bf16* x, const bf16* x_weight, const bf16* hidden, const bf16* hidden_weight, bf16* y, float eps) {
  __shared__ float parts[THREADS / 32];
  launch_dependents();
  const int half = blockIdx.y, at = threadIdx.x;
  const uint4* scales = (const uint4*)(half ? hidden_weight : x_weight);
  const uint4* from = (const uint4*)((half ? hidden : x) + (i64)blockIdx.x * WIDTH);
  uint4* to = (uint4*)(y + ((i64)blockIdx.x * 2 + half) * WIDTH);

  uint4 scale[VECTORS], raw[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + at;
    scale[i] = vector < WIDTH / 8 ? __ldg(scales + vector) : uint4{0, 0, 0, 0};
  }
  wait_dependencies();
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + at;
    raw[i] = vector < WIDTH / 8 ? load_fresh(from + vector) : uint4{0, 0, 0, 0};
  }
  float square = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    float v[8];
    unpack_bf16(raw[i], v);
#pragma unroll
    for (int e = 0; e < 8; e++) square = fmaf(v[e], v[e], square);
  }
  square = warp_sum(square);
  if (at % 32 == 0) parts[at / 32] = square;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) sum += parts[i];
  const float factor = rsqrtf(sum / WIDTH + eps);
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + at;
    float v[8], w[8];
    unpack_bf16(raw[i], v);
    unpack_bf16(scale[i], w);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = v[e] * factor * w[e];
    if (vector < WIDTH / 8)
      to[vector] = uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
  }
}
