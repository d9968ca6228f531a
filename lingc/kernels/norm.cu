// RMS norm of few rows, a block a row: plugins/rms_norm.py has the maths. The weight is read before the wait.
//
// Constants: WIDTH, THREADS, PIECES of 8 channels a thread.
#include "device.cuh"

static_assert(WIDTH % 8 == 0 && WIDTH <= THREADS * PIECES * 8, "sizes");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    norm_few(const bf16* x, const bf16* weight, bf16* y, float eps) {
  __shared__ float parts[THREADS / 32];
  launch_dependents();
  uint4 scale[PIECES], row[PIECES];
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    const int k = (p * THREADS + threadIdx.x) * 8;
    scale[p] = uint4{0, 0, 0, 0};
    // Not by way of ld.global.nc, which ptxas moves behind the wait.
    if (k < WIDTH)
      asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(scale[p].x), "=r"(scale[p].y), "=r"(scale[p].z), "=r"(scale[p].w)
                   : "l"(weight + k)
                   : "memory");
  }
  wait_dependencies();
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    const int k = (p * THREADS + threadIdx.x) * 8;
    row[p] = uint4{0, 0, 0, 0};
    if (k < WIDTH) row[p] = load_fresh((const uint4*)(x + (i64)blockIdx.x * WIDTH + k));
  }
  float square = 0;
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    float v[8];
    unpack_bf16(row[p], v);
#pragma unroll
    for (int i = 0; i < 8; i++) square += v[i] * v[i];
  }
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) square += parts[i];
  const float factor = rsqrtf(square * (1.0f / WIDTH) + eps);
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    const int k = (p * THREADS + threadIdx.x) * 8;
    float v[8], w[8];
    unpack_bf16(row[p], v), unpack_bf16(scale[p], w);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= factor * w[i];
    if (k < WIDTH)
      *(uint4*)(y + (i64)blockIdx.x * WIDTH + k) =
          uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
  }
}
