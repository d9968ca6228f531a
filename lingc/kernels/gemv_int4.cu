// y = after(W before(x)) for 1 to 4 tokens and weights of four bits, each read once.
//
// x is multiplied as integers (int4.cuh). The high and the low bytes of a token are two of the product's 8 columns, so four
// tokens take as many products as one.
//
// A block takes every gridDim.x-th stage: TILES tiles of 16 rows that lie next to each other, with all of K. A warp
// multiplies a slice of K of one tile. One warp asks for stages, with one copy for weights and one for scales; others make x
// integers together, then multiply. The slices' sums of a stage meet in shared memory, in a fixed order; warps take turns at
// adding them up, one stage behind, so that no one waits.
//
// Constants: K; GROUP of weights' scales; TOKENS, the most; BEFORE 0 none, 1 rms_norm, 2 group_norm_gate (GROUPS); AFTER 0
// none, 1 swiglu; RESIDUAL; WIDE 1: y is f32; TILES of a stage; WARPS that multiply; DEPTH stages in shared memory; SHARED
// bytes, which the host works out as this file does and rounds up to more than half of what there is (gemv.cu says why).
#include "int4.cuh"

constexpr int PIECES = K / 128;            // of a tile
constexpr int SLICES = WARPS / TILES;      // warps that share a tile
constexpr int MINE = PIECES / SLICES;      // pieces of a warp, of a stage
constexpr int SCALES = 128 / GROUP;        // of a row's weights in a piece
constexpr int TILE_BYTES = PIECES * PIECE;
constexpr int TILE_SCALES = PIECES * SCALES * 32;
constexpr int STAGE_BYTES = TILES * (TILE_BYTES + TILE_SCALES);
constexpr int THREADS = WARPS * 32;        // that make x and multiply
constexpr int CHUNKS = TOKENS * K / 8;     // of 8 channels
constexpr int EACH = (CHUNKS + THREADS - 1) / THREADS;
constexpr int BATCH = EACH < 4 ? EACH : 4; // chunks of a thread under way
constexpr int NORM_PIECES = PIECES / GROUPS;
constexpr int BUFFERS = 4;                 // stages whose sums are under way
constexpr int SUMS = TOKENS * 16;          // of one warp
constexpr int TURN = (TILES * SUMS + 31) / 32;  // results of a lane that adds up

constexpr int X_AT = DEPTH * STAGE_BYTES;
constexpr int FACTORS_AT = X_AT + TOKENS * K * 2;
constexpr int SQUARES_AT = FACTORS_AT + TOKENS * PIECES * 4;
constexpr int SUMS_AT = SQUARES_AT + TOKENS * PIECES * 4;
constexpr int BARS_AT = (SUMS_AT + BUFFERS * WARPS * SUMS * 4 + 7) / 8 * 8;
static_assert(BARS_AT + (2 * DEPTH + 2 * BUFFERS) * 8 <= SHARED, "the host and this file disagree about shared memory");
static_assert(MINE * SLICES == PIECES && SLICES * TILES == WARPS, "K does not suit the slices");
static_assert(BEFORE == 0 || (NORM_PIECES * GROUPS == PIECES && NORM_PIECES % MINE == 0), "a slice lies in one group");

template <typename T>
DEVICE void store(T* to, float v);
template <>
DEVICE void store<float>(float* to, float v) { *to = v; }
template <>
DEVICE void store<bf16>(bf16* to, float v) { *to = to_bf16(v); }

#if WIDE
typedef float Result;
#else
typedef bf16 Result;
#endif

extern "C" __global__ void __launch_bounds__(THREADS + 32)
    gemv(const u8* __restrict__ weight, const u8* __restrict__ scale, const bf16* __restrict__ x,
         const bf16* __restrict__ gate, const bf16* __restrict__ norm_weight, const bf16* __restrict__ residual,
         Result* __restrict__ y, int tokens, int tiles, int x_pitch, int gate_pitch, float eps) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (TOKENS == 1) tokens = 1;
  u64 *full = (u64*)(shared + BARS_AT), *empty = full + DEPTH, *added = empty + DEPTH, *taken = added + BUFFERS;
  float* factors = (float*)(shared + FACTORS_AT);  // [TOKENS][PIECES]
  float* squares = (float*)(shared + SQUARES_AT);  // [TOKENS][PIECES]
  float* sums = (float*)(shared + SUMS_AT);        // [BUFFERS][WARPS][TOKENS][16]
  auto stage_of = [&](int n) { return (int)(blockIdx.x + n * gridDim.x); };
  auto is_mine = [&](int n) { return stage_of(n) < tiles / TILES; };

  launch_dependents();

  if (warp == WARPS) {
    auto ask = [&](int n) {
      const int slot = n % DEPTH;
      const u64 tile = (u64)stage_of(n) * TILES;
      u8* to = shared + slot * STAGE_BYTES;
      barrier_expect(full + slot, STAGE_BYTES);
      bulk_load(to, weight + tile * TILE_BYTES, TILES * TILE_BYTES, full + slot);
      bulk_load(to + TILES * TILE_BYTES, scale + tile * TILE_SCALES, TILES * TILE_SCALES, full + slot);
    };
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < DEPTH; i++) barrier_init(full + i, 1);
      barrier_init_fence();
#pragma unroll
      for (int n = 0; n < DEPTH; n++)
        if (is_mine(n)) ask(n);
    }
    wait_dependencies();
    __syncthreads();
    if (lane == 0)
      for (int n = DEPTH; is_mine(n); n++) barrier_wait(empty + n % DEPTH, n / DEPTH - 1 & 1), ask(n);
    return;
  }

  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) barrier_init(empty + i, WARPS);
#pragma unroll
    for (int i = 0; i < BUFFERS; i++) barrier_init(added + i, WARPS), barrier_init(taken + i, 1);
    barrier_init_fence();
  }
  uint4 norm[BEFORE ? EACH : 1];
  if (BEFORE) {
#pragma unroll
    for (int i = 0; i < EACH; i++) norm[i] = load_early((const uint4*)norm_weight + (threadIdx.x + i * THREADS) % (K / 8));
  }
  wait_dependencies();

  // Residual of the stage that this warp adds up next: bits, since a conversion would await them. Results of a stage lie
  // over the lanes as [TILES][TOKENS][16].
  const int outputs = AFTER ? tiles * 8 : tiles * 16;
  bf16 kept[TURN] = {};
  auto column = [&](int n, int result) { return (stage_of(n) * TILES + result / SUMS) * (AFTER ? 8 : 16) + result % 16; };
  auto counts = [&](int result) {
    return (TILES * SUMS % 32 == 0 || result < TILES * SUMS) && result % 16 < (AFTER ? 8 : 16) && result % SUMS / 16 < tokens;
  };
  auto fetch_residual = [&](int n) {
    if (!RESIDUAL || !is_mine(n)) return;
#pragma unroll
    for (int i = 0; i < TURN; i++) {
      const int result = i * 32 + lane;
      if (counts(result)) kept[i] = load_fresh(residual + (i64)(result % SUMS / 16) * outputs + column(n, result));
    }
  };
  fetch_residual(warp);

#pragma unroll
  for (int base = 0; base < EACH; base += BATCH) {
    uint4 xs[BATCH], gates[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const u32 n = threadIdx.x + (base + b) * THREADS, token = TOKENS == 1 ? 0 : n / (K / 8), chunk = n - token * (K / 8);
      const bool live = base + b < EACH && n < CHUNKS && token < tokens;
      const uint4 zero = {0, 0, 0, 0};
      xs[b] = live ? load_fresh((const uint4*)(x + (i64)token * x_pitch) + chunk) : zero;
      if (BEFORE == 2) gates[b] = live ? load_fresh((const uint4*)(gate + (i64)token * gate_pitch + gate_pitch - K) + chunk) : zero;
    }
#pragma unroll
    for (int b = 0; b < BATCH && base + b < EACH; b++) {
      const u32 n = threadIdx.x + (base + b) * THREADS, token = TOKENS == 1 ? 0 : n / (K / 8), chunk = n - token * (K / 8);
      float v[8], w[8], square = 0, inverse;
      unpack_bf16(xs[b], v);
      if (BEFORE) {
        unpack_bf16(norm[base + b], w);
#pragma unroll
        for (int i = 0; i < 8; i++) square = fmaf(v[i], v[i], square), v[i] *= w[i];
      }
      if (BEFORE == 2) {
        unpack_bf16(gates[b], w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= sigmoid(w[i]);
      }
      const float s = s16_scale<16>(v, inverse);
      if (BEFORE) square = warp_sum<16>(square);
      if (CHUNKS % THREADS && n >= CHUNKS) continue;
      const Bytes made = to_s16(v, inverse);
      u8* to = shared + X_AT + token * K * 2 + s16_place<GROUP>(chunk);
      *(uint2*)to = made.high, *(uint2*)(to + 64) = made.low;
      if (lane % 16 == 0) {
        factors[token * PIECES + chunk / 16] = s * (1.0f / 16);
        if (BEFORE) squares[token * PIECES + chunk / 16] = square;
      }
    }
  }
  __syncthreads();

  const int tile = warp / SLICES, piece = warp % SLICES * MINE;
  const int token_of_row = g / 2 < TOKENS ? g / 2 : TOKENS - 1;  // whose bytes this lane brings; more columns than there are repeat one
  const int token = t < TOKENS ? t : TOKENS - 1;                 // whose sums it gets
  float root = 1;
  if (BEFORE) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      float square = 0;
#pragma unroll
      for (int p = 0; p < NORM_PIECES; p++) square += squares[i * PIECES + piece / NORM_PIECES * NORM_PIECES + p];
      if (i == token) root = rsqrtf(square * (1.0f / (NORM_PIECES * 128)) + eps);
    }
  }

  // Warp. Adds up the slices' sums of this block's n-th stage and stores them.
  auto finish = [&](int n) {
    const int buffer = n % BUFFERS;
    barrier_wait(added + buffer, n / BUFFERS & 1);
#pragma unroll
    for (int i = 0; i < TURN; i++) {
      const int result = i * 32 + lane;
      const float* from = sums + (buffer * WARPS + result / SUMS * SLICES) * SUMS + result % SUMS;
      float v = 0;
      if (TILES * SUMS % 32 == 0 || result < TILES * SUMS)
#pragma unroll
        for (int w = 0; w < SLICES; w++) v += from[w * SUMS];
      if (AFTER) {
        const float up = __shfl_down_sync(FULL_WARP, v, 8);
        v = silu(v) * up;
      }
      if (counts(result)) store(y + (i64)(result % SUMS / 16) * outputs + column(n, result), RESIDUAL ? v + from_bf16(kept[i]) : v);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(taken + buffer);
    fetch_residual(n + WARPS);
  };

  const u8* words_at = shared + (tile * PIECES + piece) * PIECE;
  const u8* scales_at = shared + TILES * TILE_BYTES + tile * TILE_SCALES + piece * SCALES * 32;
  const u8* x_at = shared + X_AT + token_of_row * K * 2 + piece * 256 + g % 2 * 64 + t * 16;
  const float* factors_at = factors + token * PIECES + piece;
  int slot = 0, parity = 0;
  int n = 0;
#pragma unroll 1
  for (; is_mine(n); n++) {
    float tops = 0, lows = 0;
    barrier_wait(full + slot, parity);
#pragma unroll(MINE <= 4 ? MINE : 3)
    for (int p = 0; p < MINE; p++) {
      Nibbles<GROUP> words;
      words.read(words_at + slot * STAGE_BYTES + p * PIECE, (const bf16*)(scales_at + slot * STAGE_BYTES + p * SCALES * 32), lane);
      const uint4* from = (const uint4*)(x_at + p * 256);
      words.multiply(tops, lows, from[0], from[8], factors_at[p]);
    }
    const int buffer = n % BUFFERS;
    if (n >= BUFFERS) barrier_wait(taken + buffer, n / BUFFERS - 1 & 1);
    if (t < TOKENS) {
      float* to = sums + (buffer * WARPS + warp) * SUMS + t * 16 + g;
      to[0] = tops * root, to[8] = lows * root;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + slot), barrier_arrive(added + buffer);
    if (++slot == DEPTH) slot = 0, parity ^= 1;
    if (n > 0 && (n - 1) % WARPS == warp) finish(n - 1);
  }
  if ((n - 1) % WARPS == warp) finish(n - 1);
}
