// Rows of logits as distributions, for kernels that draw from them: plugins/sample.py has the maths.
//
// A cluster of blocks has a row, and holds it in shared memory: first the logits, then the weights exp((l - best) / t).
// An element's key is its weight's bits above its complemented number, so that keys are distinct and descend as the
// tokens do: likelier first, of equals the lower id. What top-k and top-p keep are the elements from some key on; it
// is searched by thresholds, seven at a time between bounds, until one element is left between them. All blocks see
// the same sums, added up in the order of threads, warps and blocks, so that each takes the same steps.
//
// Constants: WIDTH of a row, SLABS of it that a block has. Shared memory of a row: 8 KiB a slab.
#pragma once
#include "device.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32, BLOCKS = 8, SLAB = THREADS * 4, SPLIT = 8;
static_assert(WIDTH % 4 == 0 && WIDTH <= BLOCKS * SLAB * SLABS, "sizes");

// ---------------------------------------------------------------- clusters

DEVICE u32 rank_of_block() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes to what is at this place of another block's shared memory.
DEVICE u32 address_in(const void* here, u32 block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(block));
  return there;
}
DEVICE void put(u32* here, u32 block, u32 value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in(here, block)), "r"(value) : "memory");
}
DEVICE void put(u64* here, u32 block, u64 value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address_in(here, block)), "l"(value) : "memory");
}
DEVICE void put(double* here, u32 block, double value) { put((u64*)here, block, __double_as_longlong(value)); }

// ---------------------------------------------------------------- random numbers

// The first 53 bits, as a number in [0, 1), of Philox-4x64-10 with this key and this counter's successor.
DEVICE double uniform(u64 key0, u64 key1, u64 purpose, u64 position) {
  u64 c0 = 1, c1 = 0, c2 = purpose, c3 = position;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
    const u64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
    c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
    key0 += 0x9E3779B97F4A7C15ull, key1 += 0xBB67AE8584CAA73Bull;
  }
  return (double)(c0 >> 11) * (1.0 / 9007199254740992.0);
}

// ---------------------------------------------------------------- sums over the cluster

constexpr int FIRST = 2;  // the turn of the first thresholds, whose sums are used twice

struct Memory {
  u64 best[BLOCKS], warps[WARPS];
  u32 counts[3][BLOCKS][SPLIT];  // by turn and block
  double masses[3][BLOCKS][SPLIT], kept[BLOCKS];
  u32 warp_counts[WARPS][SPLIT];
  double warp_masses[WARPS][SPLIT], parts[SLABS][WARPS];
};

// What a thread has of the row: four neighbours of each slab.
struct Row {
  float4* mine;
  u32 last;  // complement of the number of its first element

  DEVICE float4& at(int slab) const { return mine[slab * THREADS]; }
  // The key of a slab's i-th element of this weight.
  DEVICE u64 key(float weight, int slab, int i) const {
    return (u64)__float_as_uint(weight) << 32 | (last - slab * SLAB - i);
  }
};

DEVICE float part(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Elements beyond the row have no weight and a key below those of all others.
constexpr u64 LEAST = (u32)~(WIDTH - 1);

// How many elements there are, and their weight, of keys from `low` to below `high` at the first place of this turn's
// sums, from thresholds[i - 1] to below `high` at the i-th.
DEVICE void measure(const Row& row, u64 low, u64 high, const u64 (&thresholds)[SPLIT - 1], Memory& memory, int turn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 counts[SPLIT] = {};
  double masses[SPLIT] = {};
#pragma unroll 1
  for (int s = 0; s < SLABS; s++) {
    const float4 four = row.at(s);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float weight = part(four, i);
      const u64 key = row.key(weight, s, i);
      if (key >= low && key < high) {
        counts[0]++, masses[0] += weight;
        if (key >= thresholds[0]) {  // they rise
#pragma unroll
          for (int j = 1; j < SPLIT; j++)
            if (key >= thresholds[j - 1]) counts[j]++, masses[j] += weight;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < SPLIT; j++) {
    const u32 count = __reduce_add_sync(FULL_WARP, counts[j]);
    double mass = masses[j];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) mass += __shfl_xor_sync(FULL_WARP, mass, apart);
    if (lane == j) memory.warp_counts[warp][j] = count, memory.warp_masses[warp][j] = mass;
  }
  __syncthreads();
  if (threadIdx.x < SPLIT * BLOCKS) {
    const int j = threadIdx.x % SPLIT, block = threadIdx.x / SPLIT, mine = rank_of_block();
    u32 count = 0;
    double mass = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) count += memory.warp_counts[w][j], mass += memory.warp_masses[w][j];
    put(&memory.counts[turn][mine][j], block, count);
    put(&memory.masses[turn][mine][j], block, mass);
  }
  meet();  // after it, nobody writes to this turn before all have been through the next
}

// Bounds of the key that parts what is kept from what is not, and what lies above them.
struct Bounds {
  u64 low, high;
  u32 count_low, count_high;
  double mass_low, mass_high;
};

// Narrows bounds to those of the thresholds that are next to the key. Enough is kept by count, or by mass.
DEVICE void narrow(Bounds& bounds, const u64 (&thresholds)[SPLIT - 1], const Memory& memory, int turn, u32 enough,
                   double enough_mass) {
  const u32 above = bounds.count_high;
  const double mass_above = bounds.mass_high;
#pragma unroll
  for (int j = 1; j < SPLIT; j++) {
    const u64 at = thresholds[j - 1];
    if (at <= bounds.low || at >= bounds.high) continue;
    u32 count = above;
    double mass = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) count += memory.counts[turn][b][j], mass += memory.masses[turn][b][j];
    mass += mass_above;
    if (enough ? count >= enough : mass >= enough_mass)
      bounds.low = at, bounds.count_low = count, bounds.mass_low = mass;
    else
      bounds.high = at, bounds.count_high = count, bounds.mass_high = mass;
  }
}

// Powers of two, close together where the likely tokens are.
DEVICE void first_thresholds(u64 (&thresholds)[SPLIT - 1]) {
  const int exponents[SPLIT - 1] = {-16, -12, -9, -6, -4, -2, -1};
#pragma unroll
  for (int j = 0; j < SPLIT - 1; j++) thresholds[j] = (u64)(127 + exponents[j]) << 55;
}

// ---------------------------------------------------------------- steps of a kernel

// The largest key of the row: a larger logit has a larger one, of equals the lower id.
DEVICE u64 best_of_row(const Row& row, Memory& memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64 best = 0;
#pragma unroll
  for (int s = 0; s < SLABS; s++) {
    const float4 four = row.at(s);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 bits = __float_as_uint(part(four, i) + 0.0f), left = row.last - s * SLAB - i;
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      const u64 key = (u64)(nan ? FULL_WARP : bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | left;
      if (left >= LEAST && key > best) best = key;
    }
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    const u64 other = __shfl_xor_sync(FULL_WARP, best, apart);
    best = other > best ? other : best;
  }
  if (lane == 0) memory.warps[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = lane < WARPS ? memory.warps[lane] : 0;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
      const u64 other = __shfl_xor_sync(FULL_WARP, best, apart);
      best = other > best ? other : best;
    }
    if (lane < BLOCKS) put(&memory.best[rank_of_block()], lane, best);
  }
  meet();
  best = 0;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) best = memory.best[b] > best ? memory.best[b] : best;
  return best;
}

// The first element, in the order of ids, at which the weights kept add up to more than `share` of all. False, in
// every thread of the cluster, where no element has a weight.
DEVICE bool draw(const Row& row, u64 low, double share, Memory& memory, int* token) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 mine = rank_of_block();
  const auto kept = [&](const float4& four, int s, int i) {
    return row.key(part(four, i), s, i) >= low ? (double)part(four, i) : 0.0;
  };
#pragma unroll 2
  for (int s = 0; s < SLABS; s++) {
    const float4 four = row.at(s);
    double sum = (kept(four, s, 0) + kept(four, s, 1)) + (kept(four, s, 2) + kept(four, s, 3));
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, apart);
    if (lane == 0) memory.parts[s][warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < BLOCKS) {
    double sum = 0;
    for (int p = 0; p < SLABS * WARPS; p++) sum += (&memory.parts[0][0])[p];
    put(&memory.kept[mine], threadIdx.x, sum);
  }
  meet();
  // Every block knows every block's sum, and the one in which the share is reached goes on. Where rounding leaves it
  // unreached, the last element that has a weight is taken, here and below.
  double whole = 0, before = 0;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) whole += memory.kept[b];
  if (!(whole > 0)) return false;
  const double reach = share * whole;
  int block = -1;
  double sum = 0;
  for (int b = 0; b < BLOCKS; b++) {
    if (memory.kept[b] > 0 && (block < 0 || sum <= reach)) block = b, before = sum;
    sum += memory.kept[b];
  }
  if (block != (int)mine) return true;
  int place = -1;
  sum = before;
  for (int p = 0; p < SLABS * WARPS; p++) {
    const double here = (&memory.parts[0][0])[p];
    if (here > 0 && (place < 0 || sum <= reach)) place = p, before = sum;
    sum += here;
  }
  if (place % WARPS != warp) return true;
  const int s = place / WARPS;
  const float4 four = row.at(s);
  double own[4], upto = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) own[i] = kept(four, s, i), upto += own[i];
  const double all = upto;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const double other = __shfl_up_sync(FULL_WARP, upto, apart);
    if (lane >= apart) upto += other;
  }
  double at = before + (upto - all);
  int last = -1, found = -1;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    at += own[i];
    if (own[i] > 0) last = i;
    if (own[i] > 0 && found < 0 && at > reach) found = i;
  }
  const u32 reached = __ballot_sync(FULL_WARP, found >= 0), some = __ballot_sync(FULL_WARP, last >= 0);
  const int who = reached ? __ffs(reached) - 1 : 31 - __clz(some);
  if (lane == who) *token = (int)~(row.last - s * SLAB - (reached ? found : last));
  return true;
}

// Copies a row of logits to shared memory; beyond its end stands minus infinity.
DEVICE void load_row(const Row& row, const float* logits) {
  const u32 first = ~row.last;
  uint4 raw[SLABS];
#pragma unroll
  for (int s = 0; s < SLABS; s++) {
    raw[s] = uint4{0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
    if (first + s * SLAB < WIDTH) raw[s] = load_fresh((const uint4*)(logits + first + s * SLAB));
  }
#pragma unroll
  for (int s = 0; s < SLABS; s++) *(uint4*)&row.at(s) = raw[s];
}

// The largest logit of a row, from its key.
DEVICE float logit_of(u64 best) {
  const u32 bits = (u32)(best >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}
DEVICE bool is_finite(float v) { return (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u; }

// exp((logit - peak) / heat) as 2^(whole + rest) with the exponent in f64: in f32 its rounding would show in the
// weights of unlikely tokens.
DEVICE float weight_of(float logit, double peak, double rate) {
  const double exponent = ((double)logit - peak) * rate, whole = rint(exponent);
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"((float)(exponent - whole)));
  return exponent > -125.0 ? power * __int_as_float((127 + (int)whole) << 23) : 0.0f;
}

// What `weight_of` takes for a temperature.
DEVICE double rate_of(float heat) { return 1.4426950408889634 / heat; }

// Turns a row's logits into weights.
DEVICE void weigh(const Row& row, double peak, double rate) {
#pragma unroll 2
  for (int s = 0; s < SLABS; s++) {
    const float4 four = row.at(s);
    row.at(s) = float4{weight_of(four.x, peak, rate), weight_of(four.y, peak, rate), weight_of(four.z, peak, rate),
                       weight_of(four.w, peak, rate)};
  }
}

// The key from which on elements are kept, as `low`. MEASURED: `mass_low` is what those weigh together; otherwise it
// is so only where something is not kept.
template <bool MEASURED>
DEVICE Bounds kept_of(const Row& row, u32 some, double share, Memory& memory) {
  const bool limited[2] = {some > 0 && some < WIDTH, share < 1};
  const u64 end = ~0ull;
  Bounds bounds = {LEAST, end, WIDTH, 0, 0, 0};
  if (MEASURED || limited[0] || limited[1]) {
    u64 thresholds[SPLIT - 1];
    first_thresholds(thresholds);
    measure(row, LEAST, end, thresholds, memory, FIRST);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) bounds.mass_low += memory.masses[FIRST][b][0];
  }
  int turn = 0;
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; by_mass++) {
    if (!(by_mass ? limited[1] : limited[0])) continue;
    bounds.high = end, bounds.count_high = 0, bounds.mass_high = 0;
    const u32 enough = by_mass ? 0 : some;
    const double enough_mass = share * bounds.mass_low;
    u64 thresholds[SPLIT - 1];
    first_thresholds(thresholds);
    narrow(bounds, thresholds, memory, FIRST, enough, enough_mass);
#pragma unroll 1
    while (bounds.count_low - bounds.count_high > 1) {
      const u64 step = (bounds.high - bounds.low) / SPLIT;
#pragma unroll
      for (int j = 0; j < SPLIT - 1; j++) {
        const u64 at = bounds.low + (step ? step * (j + 1) : j + 1);
        thresholds[j] = at < bounds.high ? at : bounds.high;
      }
      measure(row, bounds.low, bounds.high, thresholds, memory, turn);
      narrow(bounds, thresholds, memory, turn, enough, enough_mass);
      turn ^= 1;
    }
  }
  return bounds;
}
