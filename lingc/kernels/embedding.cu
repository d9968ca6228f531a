// Rows of the embedding table, a block a token: plugins/embedding.py has the maths. A row that the table does not have
// is padding and gives zeros.
//
// Constants: WIDTH, ROWS of the table, THREADS.
#include "device.cuh"

static_assert(WIDTH % 8 == 0, "sizes");

extern "C" __global__ void __launch_bounds__(THREADS) embedding(const int* token_ids, const bf16* weight, bf16* y) {
  launch_dependents();
  wait_dependencies();
  const int row = load_fresh(token_ids + blockIdx.x);
  const bool inside = row >= 0 && row < ROWS;
  const uint4* const from = (const uint4*)(weight + (i64)(inside ? row : 0) * WIDTH);
  uint4* const to = (uint4*)(y + (i64)blockIdx.x * WIDTH);
#pragma unroll 4
  for (int i = threadIdx.x; i < WIDTH / 8; i += THREADS) to[i] = inside ? from[i] : uint4{0, 0, 0, 0};
}
