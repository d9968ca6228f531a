// Experts of many tokens: which rows of gemm.cu's operand belong to whom, and the sum over a token's experts.
//
// The shared expert's rows come first in the operand, row t of token t. Then those of the other experts, each in the
// order of its pairs and from a multiple of 16 on. Tiles of at most TOKENS rows share an expert's rows evenly; in the
// list the shared expert is the last, as in the weights.
//
//   to    [T * slots]       row of each pair; -1 of a pair whose expert is none
//   rows  [operand rows]    row of the result that belongs to a row of the operand
//   work  i32               [0] number of entries; from [8] on, 8 for each: expert, first row, rows, number of the
//                           expert's first entry, how many the expert has
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

// Constants: EXPERTS without the shared one, TOKENS rows of a tile at most, STEP what all but an expert's last are a
// multiple of; WIDTH channels of a row of y. Pairs without an expert have rows of zeros in `blank`, `blank_bytes` each.
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const int* ids, const int* pairs, const int* starts, int* to, int* rows, int* work, u8* blank, int tokens, int slots,
          int shared, int blank_bytes) {
  __shared__ int begin[EXPERTS + 2], first[EXPERTS + 2], memory[THREADS / 32];
  launch_dependents();
  wait_dependencies();
  // Two scans over experts, a run of neighbours a thread: rows of the operand, and entries.
  constexpr int EACH = (EXPERTS + 1 + THREADS - 1) / THREADS;
  int counts[EACH], begins[EACH], all_rows = 0, all_entries = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = threadIdx.x * EACH + i;
    begins[i] = e < EXPERTS ? load_fresh(starts + e) : 0;
    counts[i] = e < EXPERTS ? load_fresh(starts + e + 1) - begins[i] : e == EXPERTS && shared ? tokens : 0;
    all_rows += e < EXPERTS ? (counts[i] + 15) / 16 * 16 : 0;
    all_entries += (counts[i] + TOKENS - 1) / TOKENS;
  }
  int total_rows, total_entries;
  int row = scan(all_rows, memory, total_rows), entry = scan(all_entries, memory, total_entries);
  row += shared ? (tokens + 15) / 16 * 16 : 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = threadIdx.x * EACH + i, entries = (counts[i] + TOKENS - 1) / TOKENS;
    if (e == EXPERTS) row = 0;
    if (e <= EXPERTS) {
      begin[e] = row;
      first[e] = begins[i];
    }
    if (blockIdx.x == 0 && entries > 0) {
      const int each = ((counts[i] + entries - 1) / entries + STEP - 1) / STEP * STEP;
      for (int j = 0; j < entries; j++) {
        int* made = work + 8 + (entry + j) * 8;
        made[0] = e, made[1] = row + j * each, made[2] = min(each, counts[i] - j * each), made[3] = entry, made[4] = entries;
      }
    }
    row += (counts[i] + 15) / 16 * 16, entry += entries;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) work[0] = total_entries;
  __syncthreads();

  const int given = load_fresh(starts), end = load_fresh(starts + EXPERTS), per = slots + shared;
  const int thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
  for (int p = given + thread; p < end; p += threads) {
    int low = 0, high = EXPERTS - 1;  // the last expert that begins at or before p has it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= p) low = middle;
      else high = middle - 1;
    }
    const int pair = load_fresh(pairs + p), at = begin[low] + p - first[low];
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

// y[t] = residual[t] + sum_i weights[t, i] z[t, i] + z[t, slots], in this order, 4 channels a thread; z f32
// [T, slots + shared, WIDTH].
extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const float* z, const float* weights, const int* ids, const bf16* residual, bf16* y, int tokens, int slots, int shared) {
  launch_dependents();
  wait_dependencies();
  const i64 at = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4;
  const i64 t = at / WIDTH;
  const int column = (int)(at - t * WIDTH);
  if (t >= tokens) return;
  const float* from = z + t * (slots + shared) * WIDTH + column;
  const uint2 r = load_fresh((const uint2*)(residual + at));
  float sum[4] = {low_bf16(r.x), high_bf16(r.x), low_bf16(r.y), high_bf16(r.y)};
  for (int i = 0; i < slots + shared; i++) {
    const i64 pair = t * slots + i;
    if (i < slots && load_fresh(ids + pair) < 0) continue;
    const float w = i < slots ? load_fresh(weights + pair) : 1.0f;
    const uint4 v = load_fresh((const uint4*)(from + (i64)i * WIDTH));
    sum[0] = fmaf(w, __uint_as_float(v.x), sum[0]), sum[1] = fmaf(w, __uint_as_float(v.y), sum[1]);
    sum[2] = fmaf(w, __uint_as_float(v.z), sum[2]), sum[3] = fmaf(w, __uint_as_float(v.w), sum[3]);
  }
  *(uint2*)(y + at) = uint2{pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3])};
}
