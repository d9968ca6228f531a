// Norm, router and expert lists of up to 512 tokens in one launch: plugins/norm_router.py has the maths.
//
// Three kinds of blocks. Scorers multiply a part of the weight. They take it, times the norm's weight,
// into registers before the wait; the row's factor is applied to the sum, so the norm costs no pass of
// its own. A chooser has one token: it gathers the scores and picks the experts. The last chooser also
// makes the lists.
//
// Of up to four tokens a scorer has whole rows of a few experts, in f32, in which the product of two
// bf16 is exact. Of more it has 16 experts and some of the channels for the tensor cores: the product
// of two bf16 has 16 bits, so it is a sum of two, high and low, exactly, and meets x as it is stored.
// Sums of squares are products of x with itself.
//
// A number travels between blocks through global memory as its own flag: a word of 0 has not been
// written, a sum of 0 is written as -0, and who reads a word puts the 0 back. That is one trip through
// L2, where a counter and fences are three. A chooser spins on the words that it needs. The scorers
// need nothing of the choosers and come first; blocks start in the order of their numbers, and no
// later launch can take their place, for that starts when all of this one's blocks have.
//
// Constants: WIDTH, EXPERTS, GROUPS, KEPT groups, TOP experts a token, NORMALIZE, TOKENS at the most.
// Up to four: ROWS experts a scorer. More: TILES of 8 tokens at a time, DEPTH units of 64 channels a
// warp.
#include "device.cuh"

#define WHOLE (TOKENS <= 4)

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SIZE = EXPERTS / GROUPS, OFFERED = SIZE < TOP ? SIZE : TOP;
static_assert(WIDTH % 64 == 0 && EXPERTS <= THREADS && EXPERTS % GROUPS == 0 && GROUPS <= 32, "sizes");
static_assert(KEPT * OFFERED <= 32 && KEPT * OFFERED >= TOP && TOKENS <= 512, "sizes");

#if WHOLE
constexpr int SLICES = 1, SCORERS = EXPERTS / ROWS;
static_assert(EXPERTS % ROWS == 0, "sizes");
#else
constexpr int UNITS = WIDTH / 64, BANDS = (EXPERTS + 15) / 16;
constexpr int SLICES = (UNITS + WARPS * DEPTH - 1) / (WARPS * DEPTH), SCORERS = BANDS * SLICES;
static_assert(TILES == 1 || TILES == 2 || TILES == 4 || TILES == 8, "sizes");
#endif

#define INFINITE __int_as_float(0x7f800000)
#define LEAST __int_as_float(0xff7fffff)

constexpr int MASKS = (TOKENS + 31) / 32;

// Which tokens chose an expert, and which experts a token chose.
struct Chosen {
  u32 tokens[EXPERTS][MASKS];
  int experts[TOKENS * TOP];
};

// Shared by the threads of a block, which is a scorer or a chooser.
union Memory {
  Chosen chosen;
#if !WHOLE
  float sums[TILES][WARPS][32][4];
#endif
};

struct Words {
  u32 sums[TOKENS][SLICES][EXPERTS];  // of whole rows the logits
  u32 squares[TOKENS][SLICES];
  u32 picks[TOKENS][TOP];  // expert + 1
};

DEVICE void publish(u32* word, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
DEVICE void publish(u32* word, float value) { publish(word, value == 0.0f ? 0x80000000u : __float_as_uint(value)); }

// Spins until the words have been written.
template <int N>
DEVICE void take(const u32* from, int stride, u32 (&words)[N]) {
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < N; i++)
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[i]) : "l"(from + i * stride) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) all = all && words[i] != 0;
  } while (!all);
}

// Not by way of ld.global.nc, which ptxas moves behind the wait.
DEVICE uint4 load_weight(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// Has a value made here: ptxas would make it after the wait, before the loads of x. Nobody reads the word.
DEVICE void make_now(u32 value) {
  __shared__ u32 unread[THREADS];
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_address(unread + threadIdx.x)), "r"(value) : "memory");
}

// ---------------------------------------------------------------- scorers of few tokens

#if WHOLE
// Adds up N values over the warp, in a fixed order; lane l has value l / (32 / N).
template <int N, int HALF = N / 2, int APART = 16>
DEVICE float transposed_sum(float (&v)[N]) {
  if constexpr (HALF > 0) {
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const bool upper = threadIdx.x & APART;
      const float sent = upper ? v[i] : v[i + HALF], kept = upper ? v[i + HALF] : v[i];
      v[i] = kept + __shfl_xor_sync(FULL_WARP, sent, APART);
    }
    return transposed_sum<N, HALF / 2, APART / 2>(v);
  } else if constexpr (APART > 0) {
    v[0] += __shfl_xor_sync(FULL_WARP, v[0], APART);
    return transposed_sum<N, 0, APART / 2>(v);
  } else {
    return v[0];
  }
}

DEVICE void score(const bf16* x, i64 pitch, const bf16* norm_weight, const bf16* weight, Words& words, int tokens,
                  float eps, Memory&) {
  constexpr int PIECES = (WIDTH + THREADS * 8 - 1) / (THREADS * 8);  // of 8 channels
  constexpr int EACH = ROWS + 1, VALUES = TOKENS * EACH <= 2 ? 2 : TOKENS * EACH <= 4 ? 4 : TOKENS * EACH <= 8 ? 8
                                      : TOKENS * EACH <= 16 ? 16 : 32;
  static_assert(TOKENS * EACH <= VALUES, "more values than lanes");
  __shared__ __align__(16) float parts[VALUES][WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, expert = blockIdx.x * ROWS, channel = threadIdx.x * 8;
  const auto inside = [&](int p) { return WIDTH % (THREADS * 8) == 0 || p * THREADS * 8 + channel < WIDTH; };
  float w[ROWS][PIECES * 8] = {};
  u32 all = 0;
#pragma unroll
  for (int p = 0; p < PIECES; p++)
    if (inside(p)) {
      float norm[8];
      unpack_bf16(load_weight(norm_weight + p * THREADS * 8 + channel), norm);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        unpack_bf16(load_weight(weight + (i64)(expert + r) * WIDTH + p * THREADS * 8 + channel), &w[r][p * 8]);
#pragma unroll
        for (int i = 0; i < 8; i++) w[r][p * 8 + i] *= norm[i], all ^= __float_as_uint(w[r][p * 8 + i]);
      }
    }
  make_now(all);
  wait_dependencies();
  uint4 raw[TOKENS][PIECES];
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      raw[t][p] = uint4{0, 0, 0, 0};
      if (t < tokens && inside(p)) raw[t][p] = load_fresh((const uint4*)(x + t * pitch + p * THREADS * 8 + channel));
    }
  float v[VALUES] = {};
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      float a[8];
      unpack_bf16(raw[t][p], a);
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) v[t * EACH + r] += a[i] * w[r][p * 8 + i];
        v[t * EACH + ROWS] += a[i] * a[i];
      }
    }
  const float part = transposed_sum(v);
  if (lane % (32 / VALUES) == 0) parts[lane / (32 / VALUES)][warp] = part;
  __syncthreads();
  const int t = threadIdx.x / ROWS, r = threadIdx.x % ROWS;
  if (t < tokens) {
    float sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[t * EACH + r][i], square += parts[t * EACH + ROWS][i];
    publish(&words.sums[t][0][expert + r], sum * rsqrtf(square * (1.0f / WIDTH) + eps));
  }
}

#else
// ---------------------------------------------------------------- scorers of more tokens

// Two weights times the norm's as a sum of two bf16 each, exactly.
DEVICE void split(u32 pair, u32 norm, u32& high, u32& low) {
  const float a = low_bf16(pair) * low_bf16(norm), b = high_bf16(pair) * high_bf16(norm);
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_bf16(high), b - high_bf16(high));
}

DEVICE void score(const bf16* x, i64 pitch, const bf16* norm_weight, const bf16* weight, Words& words, int tokens,
                  float, Memory& memory) {
  constexpr int AT_ONCE = DEPTH > 1 ? 1 : TILES < 4 ? TILES : 4;
  constexpr int CHAINS = TILES * DEPTH == 1 ? 2 : 1;  // of products that wait for each other
  auto& sums = memory.sums;
  __shared__ float squares[TILES][WARPS][8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int band = blockIdx.x % BANDS, slice = blockIdx.x / BANDS, unit = (slice * WARPS + warp) * DEPTH;
  const auto inside = [&](int u) { return UNITS % (WARPS * DEPTH) == 0 || unit + u < UNITS; };
  const int channel = unit * 64 + t * 8;
  u32 high[DEPTH][4][4], low[DEPTH][4][4], all = 0;  // of four steps of 16 channels
#pragma unroll
  for (int u = 0; u < DEPTH; u++)
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const int from = channel + u * 64 + p * 32;
      u32 norm[4] = {}, rows[2][4] = {};
      if (inside(u)) *(uint4*)norm = load_weight(norm_weight + from);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int expert = band * 16 + h * 8 + g;
        if (inside(u) && (EXPERTS % 16 == 0 || expert < EXPERTS))
          *(uint4*)rows[h] = load_weight(weight + (i64)expert * WIDTH + from);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int step = p * 2 + i / 4, at = i % 4;
        split(rows[at % 2][i / 4 * 2 + at / 2], norm[i / 4 * 2 + at / 2], high[u][step][at], low[u][step][at]);
        all ^= high[u][step][at] ^ low[u][step][at];
      }
    }
  make_now(all);
  wait_dependencies();
  for (int start = 0; start < tokens; start += TILES * 8) {
    const bf16* const mine = x + (start + g) * pitch + channel;
    const int left = tokens - start;
#pragma unroll
    for (int first = 0; first < TILES; first += AT_ONCE) {
      uint4 raw[AT_ONCE][DEPTH][2];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int u = 0; u < DEPTH; u++)
#pragma unroll
          for (int p = 0; p < 2; p++) {
            raw[j][u][p] = uint4{0, 0, 0, 0};
            const int token = (first + j) * 8;
            if (inside(u) && token + g < left)
              raw[j][u][p] = load_fresh((const uint4*)(mine + token * pitch + u * 64 + p * 32));
          }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int tile = first + j;
        const bool squaring = tile % BANDS == band;  // one of the bands that read these channels
        float c[CHAINS][4] = {}, d[CHAINS][4] = {}, e[CHAINS][4] = {};
#pragma unroll
        for (int s = 0; s < DEPTH * 4; s++) {
          const uint4 piece = raw[j][s / 4][s / 2 % 2];
          const u32 b0 = s % 2 ? piece.z : piece.x, b1 = s % 2 ? piece.w : piece.y;
          const u32(&a)[4] = high[s / 4][s % 4], (&f)[4] = low[s / 4][s % 4];
          mma_bf16(c[s % CHAINS], a[0], a[1], a[2], a[3], b0, b1);
          mma_bf16(d[s % CHAINS], f[0], f[1], f[2], f[3], b0, b1);
          if (TILES == 1 || squaring) mma_bf16(e[s % CHAINS], b0, 0, b1, 0, b0, b1);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (CHAINS == 2) c[0][i] += c[CHAINS - 1][i], d[0][i] += d[CHAINS - 1][i], e[0][i] += e[CHAINS - 1][i];
          c[0][i] += d[0][i];
        }
        *(float4*)sums[tile][warp][lane] = float4{c[0][0], c[0][1], c[0][2], c[0][3]};
        if (squaring && g / 2 == t) squares[tile][warp][g] = g % 2 ? e[0][1] : e[0][0];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < TILES * 128; i += THREADS) {
      const int tile = i / 128, at = i % 128, expert = band * 16 + at / 16 + at % 4 / 2 * 8;
      const int token = tile * 8 + at / 4 % 4 * 2 + at % 2;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += (&sums[tile][w][0][0])[at];
      if (token < left && (EXPERTS % 16 == 0 || expert < EXPERTS)) publish(&words.sums[start + token][slice][expert], sum);
    }
    const int token = threadIdx.x, tile = token / 8;
    if (token < min(left, TILES * 8) && tile % BANDS == band) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += squares[tile][w][token % 8];
      publish(&words.squares[start + token][slice], sum);
    }
    if (TOKENS > TILES * 8) __syncthreads();
  }
}

#endif
// ---------------------------------------------------------------- choosers

// 1 or 0.
DEVICE float greater(float a, float b) {
  float v;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// How many of the 32 values of the warp's lanes stand before this one's: larger ones, and equal ones of lower lanes.
DEVICE int rank_in_warp(float v, float* row) {
  const int lane = threadIdx.x % 32;
  row[lane] = v;
  __syncwarp();
  float larger[4] = {};
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const float4 other = *(const float4*)(row + i);
    larger[0] += greater(other.x, v), larger[1] += greater(other.y, v);
    larger[2] += greater(other.z, v), larger[3] += greater(other.w, v);
  }
  const int equal = __popc(__match_any_sync(FULL_WARP, __float_as_uint(v)) & ((1u << lane) - 1));
  return (int)((larger[0] + larger[1]) + (larger[2] + larger[3])) + equal;
}

struct Choice {
  float scores[TOP];
  int experts[TOP];
};

// One expert a thread. The ranks within groups leave KEPT * OFFERED candidates to one warp.
DEVICE void choose(Words& words, int token, float shift, float eps, Choice& choice) {
  __shared__ __align__(16) float biased[THREADS], two_best[2][GROUPS], best[GROUPS][OFFERED], scores[GROUPS][OFFERED];
  __shared__ int experts[GROUPS][OFFERED], order[GROUPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, expert = threadIdx.x;
  const int group = expert / SIZE, place = expert % SIZE;
  const bool live = EXPERTS == THREADS || expert < EXPERTS;
  float s = 0, v = -INFINITE;
  if (live) {
    u32 sums[SLICES], squares[SLICES];
    take<SLICES>(&words.sums[token][0][expert], EXPERTS, sums);
    if (!WHOLE) take<SLICES>(words.squares[token], 1, squares);
    float logit = 0, square = 0;
#pragma unroll
    for (int i = 0; i < SLICES; i++) {
      logit += __uint_as_float(sums[i]);
      if (!WHOLE) square += __uint_as_float(squares[i]);
      words.sums[token][i][expert] = 0;
    }
    if (!WHOLE) logit *= rsqrtf(square * (1.0f / WIDTH) + eps);
    s = __fdividef(1.0f, 1.0f + expf(-logit));
    v = fmaxf(s + shift + 0.0f, LEAST);  // no NaN and no -0
  }
  int rank;
  if constexpr (SIZE == 32) {
    rank = rank_in_warp(v, biased + warp * 32);
  } else {
    biased[expert] = v;
    __syncthreads();
    rank = 0;
    for (int i = 0; i < SIZE; i++) {
      const float other = biased[live ? group * SIZE + i : 0];
      rank += other > v || (other == v && i < place);
    }
  }
  if (live && rank < 2) two_best[rank][group] = v;
  if (live && rank < OFFERED) best[group][rank] = v, scores[group][rank] = s, experts[group][rank] = expert;
  __syncthreads();
  if (!WHOLE && threadIdx.x < SLICES) words.squares[token][threadIdx.x] = 0;  // all have read them
  if (warp > 0) return;
  float worth = -INFINITE;
  if (lane < GROUPS) worth = SIZE == 1 ? two_best[0][lane] : two_best[0][lane] + two_best[1][lane];
  int group_rank = 0;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    const float other = __shfl_sync(FULL_WARP, worth, i);
    group_rank += other > worth || (other == worth && i < lane);
  }
  const bool kept = lane < GROUPS && group_rank < KEPT;
  const u32 mask = __ballot_sync(FULL_WARP, kept);
  if (kept) order[__popc(mask & ((1u << lane) - 1))] = lane;
  __syncwarp();
  // Candidates stand by rising group, those of a group from the best on: of equals the lower lane has the lower expert.
  const bool offered = lane < KEPT * OFFERED;
  const int from = offered ? order[lane / OFFERED] : 0, at = lane % OFFERED;
  const int final_rank = rank_in_warp(offered ? best[from][at] : -INFINITE, biased);
  if (final_rank < TOP) choice.scores[final_rank] = scores[from][at], choice.experts[final_rank] = experts[from][at];
  __syncwarp();
}

// ---------------------------------------------------------------- lists

// An expert's pairs begin behind those of the experts before it, and a token has an expert once, so that a pair's
// place follows from the tokens before it that chose the same.
DEVICE void list(int* pairs, int* starts, int tokens, const Chosen& chosen) {
  __shared__ int begins[EXPERTS], totals[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, expert = threadIdx.x;
  int count = 0;
  if (expert < EXPERTS)
#pragma unroll
    for (int i = 0; i < MASKS; i++) count += __popc(chosen.tokens[expert][i]);
  int upto = count;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int other = __shfl_up_sync(FULL_WARP, upto, apart);
    if (lane >= apart) upto += other;
  }
  if (lane == 31) totals[warp] = upto;
  __syncthreads();
  int begin = upto - count;
#pragma unroll
  for (int i = 0; i < WARPS; i++) begin += i < warp ? totals[i] : 0;
  if (expert < EXPERTS) begins[expert] = starts[expert] = begin;
  if (expert == EXPERTS - 1) starts[EXPERTS] = begin + count;
  __syncthreads();
  for (int p = threadIdx.x; p < tokens * TOP; p += THREADS) {
    const int t = p / TOP, e = chosen.experts[p];
    int before = begins[e] + __popc(chosen.tokens[e][t / 32] & ((1u << t % 32) - 1));
    for (int i = 0; i < t / 32; i++) before += __popc(chosen.tokens[e][i]);
    pairs[before] = p;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    norm_router(const bf16* x, i64 pitch, const bf16* norm_weight, const bf16* weight, const float* bias, Words* words,
                int* ids, float* weights, int* pairs, int* starts, int tokens, float scale, float eps) {
  launch_dependents();
  __shared__ __align__(16) Memory memory;
  if (blockIdx.x < SCORERS) {
    score(x, pitch, norm_weight, weight, *words, tokens, eps, memory);
    return;
  }
  Chosen& chosen = memory.chosen;
  __shared__ Choice choice;
  const int token = blockIdx.x - SCORERS, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < EXPERTS * MASKS; i += THREADS) (&chosen.tokens[0][0])[i] = 0;
  const float shift = threadIdx.x < EXPERTS ? bias[threadIdx.x] : 0.0f;
  __syncthreads();
  wait_dependencies();
  choose(*words, token, shift, eps, choice);
  const auto choosing = [&](int t, int i, int expert) {
    chosen.experts[t * TOP + i] = expert;
    atomicOr(&chosen.tokens[expert][t / 32], 1u << t % 32);
  };
  const bool last = token == tokens - 1;
  if (threadIdx.x < 32) {
    constexpr int LANES = TOP <= 1 ? 1 : TOP <= 2 ? 2 : TOP <= 4 ? 4 : TOP <= 8 ? 8 : TOP <= 16 ? 16 : 32;
    const float s = lane < TOP ? choice.scores[lane] : 0.0f, sum = warp_sum<LANES>(s);
    if (lane < TOP) {
      const int expert = choice.experts[lane];
      if (last)
        choosing(token, lane, expert);
      else
        publish(&words->picks[token][lane], (u32)expert + 1);
      ids[token * TOP + lane] = expert;
      weights[token * TOP + lane] = NORMALIZE ? __fdividef(scale * s, sum + 1e-20f) : scale * s;
    }
  }
  if (!last) return;
  for (int p = threadIdx.x; p < token * TOP; p += THREADS) {
    u32 pick[1], *from = &words->picks[0][p];
    take<1>(from, 1, pick);
    *from = 0;
    choosing(p / TOP, p % TOP, (int)pick[0] - 1);
  }
  __syncthreads();
  list(pairs, starts, tokens, chosen);
}
