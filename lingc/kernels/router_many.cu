// Experts of many tokens from their logits, and the experts' lists: plugins/norm_router.py has the maths.
//
// Three launches. `choose_experts` has a token a warp and BLOCK tokens a block. It applies the row's factor of the norm,
// which the logits come without, and counts how often the block's tokens chose each expert. `add_counts` has an expert a block and turns its counts into places. `list_pairs` writes
// the pairs: a token has an expert once, so that within a block a pair's place follows from the tokens before it that
// chose the same, and the order depends on no race.
//
// Constants: WIDTH, EXPERTS, GROUPS, KEPT groups, TOP experts a token, NORMALIZE.
#include "device.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, BLOCK = 32;  // tokens: a bit each
constexpr int PER = EXPERTS < 32 ? 1 : EXPERTS / 32;            // consecutive experts of a lane
constexpr int SPAN = EXPERTS / GROUPS / PER;                    // lanes of a group

static_assert(WIDTH % 8 == 0 && EXPERTS <= THREADS && EXPERTS % PER == 0 && EXPERTS / GROUPS % PER == 0, "sizes");
static_assert((PER & (PER - 1)) == 0 && (SPAN & (SPAN - 1)) == 0 && TOP <= 32, "sizes");

#define INFINITE __int_as_float(0x7f800000)

// Larger floats have larger keys, and every key is larger than 0, which stands for none.
DEVICE u32 key_of(float v) {
  const u32 bits = __float_as_uint(v);
  const u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return key ? key : 1;
}
DEVICE float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// Descending, by Batcher's odd-even merge sort; N is a power of two. P is half of what is merged, K the step.
template <int N, int P = 1, int K = P>
DEVICE void sort(u64 (&v)[N]) {
  if constexpr (P < N) {
#pragma unroll
    for (int i = K % P; i + K < N; i++)
      if ((i - K % P) % (2 * K) < K && i / (2 * P) == (i + K) / (2 * P)) {
        const u64 a = v[i], b = v[i + K];
        v[i] = a > b ? a : b, v[i + K] = a > b ? b : a;
      }
    if constexpr (K > 1)
      sort<N, P, K / 2>(v);
    else
      sort<N, 2 * P>(v);
  }
}

// Sum of the values of the block's threads up to and with this one's.
DEVICE int sum_up_to(int value, int* totals) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int other = __shfl_up_sync(FULL_WARP, value, apart);
    if (lane >= apart) value += other;
  }
  if (lane == 31) totals[warp] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) value += i < warp ? totals[i] : 0;
  return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    choose_experts(const float* logits, const bf16* x, i64 pitch, const float* bias, int* ids, float* weights,
                   int* counts, int tokens, float scale, float eps) {
  __shared__ u32 chosen[EXPERTS];
  __shared__ __align__(16) float scores[WARPS][PER * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / SPAN;
  const bool live = EXPERTS >= 32 || lane < EXPERTS;
  launch_dependents();
  if (threadIdx.x < EXPERTS) chosen[threadIdx.x] = 0;
  float shift[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) shift[i] = live ? bias[lane * PER + i] : 0.0f;
  __syncthreads();
  wait_dependencies();
  for (int turn = warp; turn < BLOCK; turn += WARPS) {
    const int t = blockIdx.x * BLOCK + turn;
    if (t >= tokens) break;
    float square = 0;
#pragma unroll 4
    for (int k = lane * 8; k < WIDTH; k += 256) {
      float v[8];
      unpack_bf16(load_fresh((const uint4*)(x + t * pitch + k)), v);
#pragma unroll
      for (int i = 0; i < 8; i++) square += v[i] * v[i];
    }
    const float factor = rsqrtf(warp_sum(square) * (1.0f / WIDTH) + eps);
    u64 keys[PER] = {};
    if (live) {
      float logit[PER];
      const float* const from = logits + (i64)t * EXPERTS + lane * PER;
      if constexpr (PER % 4 == 0) {
#pragma unroll
        for (int i = 0; i < PER; i += 4) *(uint4*)(logit + i) = load_fresh((const uint4*)(from + i));
      } else {
#pragma unroll
        for (int i = 0; i < PER; i++) logit[i] = load_fresh(from + i);
      }
#pragma unroll
      for (int i = 0; i < PER; i++) {
        const float s = __fdividef(1.0f, 1.0f + expf(-factor * logit[i]));
        scores[warp][lane * PER + i] = s;
        keys[i] = (u64)key_of(s + shift[i] + 0.0f) << 32 | (u32)(PER - 1 - i);
      }
    }
    sort<PER>(keys);
    // The two best of the group, then its rank.
    float best = value_of((u32)(keys[0] >> 32)), second = -INFINITE;
    if constexpr (PER > 1) second = value_of((u32)(keys[PER > 1] >> 32));
#pragma unroll
    for (int apart = 1; apart < SPAN; apart *= 2) {
      const float b = __shfl_xor_sync(FULL_WARP, best, apart), s = __shfl_xor_sync(FULL_WARP, second, apart);
      second = fmaxf(fminf(best, b), fmaxf(second, s));
      best = fmaxf(best, b);
    }
    const float worth = EXPERTS == GROUPS ? best : best + second;
    int rank = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      const float other = __shfl_sync(FULL_WARP, worth, g * SPAN);
      rank += other > worth || (other == worth && g < group);
    }
    u32 head[PER], expert[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
      head[i] = live && rank < KEPT ? (u32)(keys[i] >> 32) : 0;
      expert[i] = lane * PER + PER - 1 - (u32)keys[i];
    }
    // Lanes are sorted and stand by rising expert, so the first of the lanes with the largest head is next.
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < TOP; i++) {
      const u32 next = __ffs(__ballot_sync(FULL_WARP, head[0] == __reduce_max_sync(FULL_WARP, head[0]))) - 1;
      const u32 found = __shfl_sync(FULL_WARP, expert[0], next);
      if (lane == i) mine = found;
      if (lane == next) {
#pragma unroll
        for (int j = 0; j + 1 < PER; j++) head[j] = head[j + 1], expert[j] = expert[j + 1];
        head[PER - 1] = 0;
      }
    }
    __syncwarp();
    constexpr int LANES = TOP <= 1 ? 1 : TOP <= 2 ? 2 : TOP <= 4 ? 4 : TOP <= 8 ? 8 : TOP <= 16 ? 16 : 32;
    const float s = lane < TOP ? scores[warp][mine] : 0.0f, sum = warp_sum<LANES>(s);
    if (lane < TOP) {
      const i64 at = (i64)t * TOP + lane;
      ids[at] = mine;
      weights[at] = NORMALIZE ? __fdividef(scale * s, sum + 1e-20f) : scale * s;
      atomicOr(&chosen[mine], 1u << turn);
    }
    __syncwarp();
  }
  __syncthreads();
  if (threadIdx.x < EXPERTS) counts[(i64)threadIdx.x * gridDim.x + blockIdx.x] = __popc(chosen[threadIdx.x]);
}

// Counts become the sums of those before them; totals, of all.
extern "C" __global__ void __launch_bounds__(THREADS) add_counts(int* counts, int* totals, int blocks) {
  __shared__ int sums[2][WARPS], carried[2];
  launch_dependents();
  wait_dependencies();
  int* const mine = counts + (i64)blockIdx.x * blocks;
  int before = 0;
  for (int first = 0, turn = 0; first < blocks; first += THREADS, turn ^= 1) {
    const int i = first + threadIdx.x, count = i < blocks ? load_fresh(mine + i) : 0;
    const int upto = before + sum_up_to(count, sums[turn]);
    if (i < blocks) mine[i] = upto - count;
    if (threadIdx.x == THREADS - 1) carried[turn] = upto;
    __syncthreads();
    before = carried[turn];
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    list_pairs(const int* ids, const int* counts, const int* totals, int* pairs, int* starts, int tokens) {
  __shared__ u32 chosen[EXPERTS];
  __shared__ int begins[EXPERTS], sums[WARPS];
  const int expert = threadIdx.x;
  launch_dependents();
  if (expert < EXPERTS) chosen[expert] = 0;
  wait_dependencies();
  const int total = expert < EXPERTS ? load_fresh(totals + expert) : 0, begin = sum_up_to(total, sums) - total;
  if (expert < EXPERTS) {
    begins[expert] = begin + load_fresh(counts + (i64)expert * gridDim.x + blockIdx.x);
    if (blockIdx.x == 0) starts[expert] = begin;
  }
  if (blockIdx.x == 0 && expert == EXPERTS - 1) starts[EXPERTS] = begin + total;
  const i64 first = (i64)blockIdx.x * BLOCK * TOP;
  const int count = min(BLOCK, tokens - (int)blockIdx.x * BLOCK) * TOP;
  for (int p = threadIdx.x; p < count; p += THREADS) atomicOr(&chosen[load_fresh(ids + first + p)], 1u << p / TOP);
  __syncthreads();
  for (int p = threadIdx.x; p < count; p += THREADS) {
    const int e = load_fresh(ids + first + p);
    pairs[begins[e] + __popc(chosen[e] & ((1u << p / TOP) - 1))] = (int)first + p;
  }
}
