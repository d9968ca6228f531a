// A token from a row of logits: plugins/sample.py has the maths, sampling.cuh how a cluster of blocks does it.
//
// Constants: WIDTH of a row, SLABS of it that a block has. Dynamic shared memory: 8 KiB a slab.
#include "sampling.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(const float* logits, const float* temperature, const int* top_k, const float* top_p, const u32* draws,
           int* tokens) {
  extern __shared__ __align__(16) float4 rows[];
  __shared__ Memory memory;
  const int t = blockIdx.x / BLOCKS;
  const Row row = {rows + threadIdx.x, ~(rank_of_block() * SLABS * SLAB + threadIdx.x * 4)};
  launch_dependents();
  wait_dependencies();
  load_row(row, logits + (i64)t * WIDTH);
  const float heat = load_fresh(temperature + t);
  const u32 some = load_fresh(top_k + t);
  const double share = load_fresh(top_p + t);
  u32 words[6];
#pragma unroll
  for (int i = 0; i < 6; i++) words[i] = load_fresh(draws + t * 6 + i);
  meet();  // all blocks have begun
  const u64 best = best_of_row(row, memory);
  const float peak = logit_of(best);
  if (!is_finite(peak) || !(heat > 0)) {
    if (threadIdx.x == 0 && rank_of_block() == 0) tokens[t] = is_finite(peak) ? (int)~(u32)best : -1;
    return;
  }
  weigh(row, peak, rate_of(heat));
  const Bounds bounds = kept_of<false>(row, some, share, memory);
  const u64 key0 = (u64)words[1] << 32 | words[0], key1 = (u64)words[3] << 32 | words[2];
  draw(row, bounds.low, uniform(key0, key1, words[5], words[4]), memory, tokens + t);
}
