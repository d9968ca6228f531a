// Tokens that a verify settles on: plugins/judge.py has the maths, sampling.cuh how a cluster of blocks has a row.
//
// A cluster has a row of the model's logits, and where it must judge a draft that was drawn the draft layer's row
// that it was drawn from. What of the two differs then takes the place of the latter.
//
// Constants: WIDTH of a row, SLABS of it that a block has. Dynamic shared memory: 16 KiB a slab, for two rows.
#include "sampling.cuh"

constexpr u64 DRAW = 0, ACCEPT = 2;  // purposes of random numbers, as in lingc.runtime.sampling

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    judge(const float* logits, const int* drafts, const float* draft_logits, const float* temperature, const int* top_k,
          const float* top_p, const u32* draws, const u32* forced, int* tokens, int sequences, int each, int pitch) {
  extern __shared__ __align__(16) float4 rows[];
  __shared__ Memory memory;
  const int t = blockIdx.x / BLOCKS, b = t / each, place = t % each, at = place * pitch + b;
  const u32 last = ~(rank_of_block() * SLABS * SLAB + threadIdx.x * 4);
  const Row row = {rows + threadIdx.x, last}, other = {rows + SLABS * THREADS + threadIdx.x, last};
  const float *const wanted = logits + (i64)t * WIDTH, *const drafted = draft_logits + (i64)(place * sequences + b) * WIDTH;
  launch_dependents();
  wait_dependencies();
  load_row(row, wanted);
  const float heat = load_fresh(temperature + b);
  const u32 some = load_fresh(top_k + b);
  const double share = load_fresh(top_p + b);
  u32 words[5];
#pragma unroll
  for (int i = 0; i < 5; i++) words[i] = load_fresh(draws + (i64)at * 6 + i);
  const bool has_draft = place + 1 < each;
  const int draft = has_draft ? load_fresh(drafts + at) : 0;
  const bool rejected = load_fresh(forced + b) >> (words[4] & 15) & 1;
  meet();  // all blocks have begun
  const u64 best = best_of_row(row, memory);
  const float peak = logit_of(best);
  const bool there = is_finite(peak) && (u32)draft < WIDTH;
  if (!there || !(heat > 0)) {
    if (threadIdx.x == 0 && rank_of_block() == 0) tokens[t] = there ? (int)~(u32)best : -1;
    return;
  }
  const double rate = rate_of(heat);
  const u64 key0 = (u64)words[1] << 32 | words[0], key1 = (u64)words[3] << 32 | words[2];
  const double again = uniform(key0, key1, DRAW, words[4]);
  weigh(row, peak, rate);
  const Bounds bounds = kept_of<true>(row, some, share, memory);
  if (!has_draft || rejected) {
    draw(row, bounds.low, again, memory, tokens + t);
    return;
  }
  load_row(other, drafted);
  meet();  // all blocks have left the sums of the first row
  const float summit = logit_of(best_of_row(other, memory));
  weigh(other, summit, rate);
  const Bounds edges = kept_of<true>(other, some, share, memory);
  // Every block weighs the draft for itself.
  const auto share_of = [&](const float* from, float top, const Bounds& limits) {
    const float weight = weight_of(load_fresh(from + draft), top, rate);
    const u64 key = (u64)__float_as_uint(weight) << 32 | (u32)~draft;
    return key >= limits.low ? weight / limits.mass_low : 0.0;
  };
  if (uniform(key0, key1, ACCEPT, words[4]) * share_of(drafted, summit, edges) < share_of(wanted, peak, bounds)) {
    if (threadIdx.x == 0 && rank_of_block() == 0) tokens[t] = draft;
    return;
  }
#pragma unroll 1
  for (int s = 0; s < SLABS; s++) {
    const float4 p = row.at(s), q = other.at(s);
    float rest[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const double more = row.key(part(p, i), s, i) >= bounds.low ? part(p, i) / bounds.mass_low : 0.0;
      const double less = other.key(part(q, i), s, i) >= edges.low ? part(q, i) / edges.mass_low : 0.0;
      rest[i] = more > less ? (float)(more - less) : 0.0f;
    }
    other.at(s) = float4{rest[0], rest[1], rest[2], rest[3]};
  }
  meet();
  if (draw(other, LEAST, again, memory, tokens + t)) return;
  meet();  // the two rows are equal but for rounding
  draw(row, bounds.low, again, memory, tokens + t);
}
