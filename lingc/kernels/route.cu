// Experts of many tokens: which rows of gemm.cu's operand belong to whom, and the sum over a token's experts.
//
// The shared expert's rows come first in the operand, row t of token t. Then those of the other experts, each in the
// order of its pairs and from a multiple of 16 on. Tiles of at most TOKENS rows share an expert's rows evenly; in the
// list the shared expert is the last, as in the weights.
//
//   to    [T * slots]       row of each pair; -1 of a pair whose expert is none
//   rows  [operand rows]    row of the result that belongs to a row of the operand
//   work  i32               [0] number of entries; [1] 0, which gemm.cu counts up; from [8] on, 8 for each: expert, the
//                           expert's first row, its rows, rows of each of its entries but the last, number of its first
//                           entry, how many it has
//
// All numbers are those of a run of tokens: `tokens` from `from` on, of `all`. `ids` and results begin with the run's first
// token; `pairs` and `starts` are those of all, and an expert's pairs in the run are neighbours there.
#include "device.cuh"

#define THREADS 256

// Sums of all before us, in the order of threads; `total` of all.
DEVICE int scan(int value, int* memory, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(FULL_WARP, sum, i);
    if (lane >= i) sum += other;
  }
  if (lane == 31) memory[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) {
    if (i < warp) before += memory[i];
    total += memory[i];
  }
  __syncthreads();
  return before + sum - value;
}

// How many of the ascending pairs at [begin, end) are below `least`.
DEVICE int below(const int* pairs, int begin, int end, int least) {
  int low = begin, high = end;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (load_fresh(pairs + middle) < least) low = middle + 1;
    else high = middle;
  }
  return low - begin;
}

// Constants: EXPERTS without the shared one, TOKENS rows of a tile at most, STEP what all but an expert's last are a
// multiple of; WIDTH channels of a row of y. Pairs without an expert have rows of zeros in `blank`, `blank_bytes` each.
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const int* ids, const int* pairs, const int* starts, int* to, int* rows, int* work, u8* blank, int tokens, int slots,
          int shared, int blank_bytes, int from, int all) {
  // Of an expert: its first row of the operand, its first pair among those of the run, and in `pairs`.
  __shared__ int begin[EXPERTS + 2], first[EXPERTS + 2], source[EXPERTS + 2], memory[THREADS / 32];
  launch_dependents();
  wait_dependencies();
  // Scans over experts, a run of neighbours a thread: rows of the operand, entries, pairs.
  constexpr int EACH = (EXPERTS + 1 + THREADS - 1) / THREADS;
  int counts[EACH], sources[EACH], all_rows = 0, all_entries = 0, all_pairs = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = threadIdx.x * EACH + i;
    sources[i] = e < EXPERTS ? load_fresh(starts + e) : 0;
    counts[i] = e < EXPERTS ? load_fresh(starts + e + 1) - sources[i] : e == EXPERTS && shared ? tokens : 0;
    if (e < EXPERTS && tokens < all) {
      const int end = sources[i] + counts[i];
      sources[i] += below(pairs, sources[i], end, from * slots);
      counts[i] = below(pairs, sources[i], end, (from + tokens) * slots);
    }
    all_rows += e < EXPERTS ? (counts[i] + 15) / 16 * 16 : 0;
    all_entries += (counts[i] + TOKENS - 1) / TOKENS;
    all_pairs += e < EXPERTS ? counts[i] : 0;
  }
  int total_rows, total_entries, total_pairs;
  int row = scan(all_rows, memory, total_rows), entry = scan(all_entries, memory, total_entries);
  int pairs_before = scan(all_pairs, memory, total_pairs);
  row += shared ? (tokens + 15) / 16 * 16 : 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = threadIdx.x * EACH + i, entries = (counts[i] + TOKENS - 1) / TOKENS;
    if (e == EXPERTS) row = 0;
    if (e <= EXPERTS) begin[e] = row, first[e] = pairs_before, source[e] = sources[i];
    if (blockIdx.x == 0 && entries > 0) {
      const int each = ((counts[i] + entries - 1) / entries + STEP - 1) / STEP * STEP;
      for (int j = 0; j < entries; j++) {
        int* made = work + 8 + (entry + j) * 8;
        made[0] = e, made[1] = row, made[2] = counts[i], made[3] = each, made[4] = entry, made[5] = entries;
      }
    }
    row += (counts[i] + 15) / 16 * 16, entry += entries, pairs_before += counts[i];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) work[0] = total_entries, work[1] = 0;
  __syncthreads();

  const int per = slots + shared, thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
  for (int p = thread; p < total_pairs; p += threads) {
    int low = 0, high = EXPERTS - 1;  // the last expert that begins at or before p has it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= p) low = middle;
      else high = middle - 1;
    }
    const int pair = load_fresh(pairs + source[low] + p - first[low]) - from * slots, at = begin[low] + p - first[low];
    to[pair] = at;
    rows[at] = pair / slots * per + pair % slots;
  }
  for (int pair = thread; pair < tokens * slots; pair += threads)
    if (load_fresh(ids + pair) < 0) {
      to[pair] = -1;
      u8* row = blank + (i64)(pair / slots * per + pair % slots) * blank_bytes;
      if (blank != nullptr)
        for (int i = 0; i < blank_bytes; i += 16) *(uint4*)(row + i) = uint4{0, 0, 0, 0};
    }
  if (shared)
    for (int t = thread; t < tokens; t += threads) rows[t] = t * per + slots;
}

// y[t] = residual[t] + sum_i weights[t, i] z[t, i] + z[t, slots], in this order, 8 channels a thread; z bf16
// [T, slots + shared, WIDTH]. Terms are asked for some at a time.
extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const bf16* z, const float* weights, const int* ids, const bf16* residual, bf16* y, int tokens, int slots, int shared) {
  launch_dependents();
  wait_dependencies();
  const i64 at = ((i64)blockIdx.x * THREADS + threadIdx.x) * 8;
  const i64 t = at / WIDTH;
  const int column = (int)(at - t * WIDTH);
  if (t >= tokens) return;
  const bf16* from = z + t * (slots + shared) * WIDTH + column;
  const uint4 r = load_fresh((const uint4*)(residual + at));
  float sum[8], v[8];
  unpack_bf16(r, sum);
  constexpr int BATCH = 3;
  for (int first = 0; first < slots + shared; first += BATCH) {
    uint4 of[BATCH];
    float w[BATCH];
    bool live[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b;
      live[b] = i < slots + shared && (i >= slots || load_fresh(ids + t * slots + i) >= 0);
      if (!live[b]) continue;
      w[b] = i < slots ? load_fresh(weights + t * slots + i) : 1.0f;
      of[b] = load_fresh((const uint4*)(from + (i64)i * WIDTH));
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (!live[b]) continue;
      unpack_bf16(of[b], v);
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] = fmaf(w[b], v[e], sum[e]);
    }
  }
  *(uint4*)(y + at) =
      uint4{pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
}
