// y[n] = x[rows[n]], zeros where rows[n] is below 0; one block a row.
//
// Constants:
//   WIDTH    elements of a row, a multiple of 8
//   THREADS  of a block
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const bf16* x, const int* rows, bf16* y) {
  launch_dependents();
  wait_dependencies();
  const int row = load_fresh(rows + blockIdx.x);
  const uint4* from = (const uint4*)(x + (i64)row * WIDTH);
  uint4* to = (uint4*)(y + (i64)blockIdx.x * WIDTH);
#pragma unroll 4
  for (int i = threadIdx.x; i < WIDTH / 8; i += THREADS) to[i] = row < 0 ? uint4{0, 0, 0, 0} : load_fresh(from + i);
}
