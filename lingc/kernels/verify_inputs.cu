// The inputs of a verify from the drafts that it judges: plugins/verify_inputs.py has the maths. One block.
//
// Constants: THREADS of the block, at least one a token.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    verify_inputs(int* token_ids, const int* drafts, const int* ahead_positions, const int* ahead_rows, int* positions,
                  int* cache_rows, int tokens, int each, int pitch) {
  launch_dependents();
  wait_dependencies();
  const int t = threadIdx.x, b = t / each, i = t % each, at = i * pitch + b;
  const bool mine = t < tokens;
  const int last = mine ? load_fresh(token_ids + b * each + each - 1) : -1;
  __syncthreads();  // before it is overwritten
  if (!mine) return;
  const bool is_padding = last < 0;
  token_ids[t] = is_padding || i == 0 ? last : load_fresh(drafts + at - pitch);
  positions[t] = is_padding ? 0 : load_fresh(ahead_positions + at);
  cache_rows[t] = is_padding ? -1 : load_fresh(ahead_rows + at);
}
