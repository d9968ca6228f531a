// What a verify's tokens make of its inputs: plugins/accept.py has the maths. A block has a sequence.
//
// Constants: WIDTH of a hidden state, a multiple of 8.
#include "device.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    accept_drafts(int* token_ids, int* positions, int* cache_rows, bf16* hidden, int* draws, const int* tokens,
                  const int* slots, const int* page_table, const int* rooms, const u32* forced, int* accepted,
                  int* logit_rows, int* ahead_positions, int* ahead_rows, int each, int pitch, int pages, int page_size) {
  __shared__ int shared_last;
  launch_dependents();
  wait_dependencies();
  const int b = blockIdx.x, i = threadIdx.x, first = b * each;
  const bool is_padding = load_fresh(slots + b) < 0;
  if (i < 32) {  // a lane has a place
    const bool mine = i < each;
    const int at = i * pitch + b;
    const int next = mine ? load_fresh(tokens + first + i) : -1;
    const int draft = i + 1 < each ? load_fresh(token_ids + first + i + 1) : -1;
    const int place = mine ? load_fresh(draws + (i64)at * 6 + 4) : 0;
    const int position = mine ? load_fresh(positions + first + i) : 0;
    const int row = mine ? load_fresh(cache_rows + first + i) : -1;
    const u32 marks = load_fresh(forced + b) >> (place & 15);
    const bool kept = i + 1 < each && ((marks >> 16 & 1) || (!(marks & 1) && next >= 0 && next == draft));
    const int last = __ffs(~__ballot_sync(FULL_WARP, kept)) - 1;
    const int chosen = __shfl_sync(FULL_WARP, next, last), there = __shfl_sync(FULL_WARP, position, last);
    const int ahead = __shfl_sync(FULL_WARP, position, 0) + last + 1 + i;
    if (mine && is_padding) {
      token_ids[first + i] = -1, positions[first + i] = 0, cache_rows[first + i] = -1;
      ahead_positions[at] = 0, ahead_rows[at] = -1;
    } else if (mine) {
      token_ids[first + i] = i < last ? draft : chosen;
      positions[first + i] = i <= last ? position : there;
      cache_rows[first + i] = i <= last ? row : -1;
      const int room = min(load_fresh(rooms + b), pages * page_size);
      const bool fits = ahead < room;
      ahead_positions[at] = max(min(ahead, room - 1), 0);
      ahead_rows[at] =
          fits ? load_fresh(page_table + (i64)b * pages + ahead / page_size) * page_size + ahead % page_size : -1;
      draws[(i64)at * 6 + 4] = place + last + 1;
    }
    if (mine && b + 1 == (int)gridDim.x)  // what makes the sequences whole fours
      for (int other = at + 1; other < (i + 1) * pitch; other++) ahead_positions[other] = 0, ahead_rows[other] = -1;
    if (i == 0) {
      shared_last = last;
      accepted[b] = is_padding ? 0 : last + 1;
      logit_rows[b] = is_padding ? -1 : first + last;
    }
  }
  __syncthreads();
  if (is_padding) return;
  const int last = shared_last;
  const uint4* const from = (const uint4*)(hidden + (i64)(first + last) * WIDTH);
  for (int chunk = i; chunk < WIDTH / 8; chunk += THREADS) {
    const uint4 kept = load_fresh(from + chunk);
    for (int t = first + last + 1; t < first + each; t++) ((uint4*)(hidden + (i64)t * WIDTH))[chunk] = kept;
  }
}
