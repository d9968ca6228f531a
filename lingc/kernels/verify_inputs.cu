// The inputs of a verify from the drafts that it judges: plugins/verify_inputs.py has the maths. A warp has a sequence.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(32)
    verify_inputs(int* token_ids, const int* drafts, const int* ahead_positions, const int* ahead_rows, int* positions,
                  int* cache_rows, int each, int pitch) {
  launch_dependents();
  wait_dependencies();
  const int b = blockIdx.x, i = threadIdx.x, t = b * each + i, at = i * pitch + b;
  const int last = load_fresh(token_ids + b * each + each - 1);
  const bool is_padding = last < 0;
  __syncwarp();  // before it is overwritten
  if (i >= each) return;
  token_ids[t] = is_padding || i == 0 ? last : load_fresh(drafts + at - pitch);
  positions[t] = is_padding ? 0 : load_fresh(ahead_positions + at);
  cache_rows[t] = is_padding ? -1 : load_fresh(ahead_rows + at);
}
