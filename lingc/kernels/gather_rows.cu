// y[n] = x[rows[n]], zeros where x has no such row; one block a row.
//
// Constants:
//   WIDTH    elements of a row, a multiple of 8
//   THREADS  of a block
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const bf16* x, const int* rows, bf16* y, int tokens) {
  launch_dependents();
  wait_dependencies();
  const int row = load_fresh(rows + blockIdx.x);
  const bool there = (u32)row < (u32)tokens;
  const uint4* from = (const uint4*)(x + (i64)row * WIDTH);
  uint4* to = (uint4*)(y + (i64)blockIdx.x * WIDTH);
#pragma unroll 4
  for (int i = threadIdx.x; i < WIDTH / 8; i += THREADS) to[i] = there ? load_fresh(from + i) : uint4{0, 0, 0, 0};
}
