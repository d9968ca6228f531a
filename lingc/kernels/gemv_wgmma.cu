// y = after(W before(x)) for few tokens on Hopper: weights go from memory to the tensor cores untouched.
//
// A block owns every gridDim.x-th tile of 16 rows and all of K. Four pieces of a tile, 16 rows by 256 bytes of K that
// lie one after the other, are one stage: to wgmma a matrix of 64 rows by 64 bytes, rows 16 i to 16 i + 15 of which are
// piece i. The other operand has four columns a token, column i being the channels of piece i. So warp i of a warpgroup
// finds W x of piece i in column i of its rows; the other columns are products that nobody asked for, and
// free. No weight passes through a register.
//
// WGS warpgroups share K, each with a contiguous part for the block's whole life: it norms and quantizes its
// channels of x once. One more warp asks for weights, SLOTS stages ahead of each warpgroup. It never waits for the
// kernels before: weights depend on nobody.
// Sums of a tile meet in shared memory, in a fixed order; warps take turns at adding them up, one tile behind.
//
// A row's rsqrt(mean square) multiplies the sum at the end: nothing stands between x and the first product but
// the quantization. FP8 products are added in f32 after every 64 channels, since the tensor core's own sum of FP8
// products is short.
//
// Constants: FORMAT 0 BF16, 1 FP8; K; WGS; SLOTS; TOKENS, the most; BEFORE 0 none, 1 rms_norm,
// 2 group_norm_gate (GROUPS); AFTER 0 none, 1 swiglu; RESIDUAL; WIDE 1: y is f32; BUFFERS; FIT blocks a
// multiprocessor; SHARED bytes, which the host works out as this file does
// and rounds up to more than half of what there is: two blocks of one launch on a multiprocessor would leave another idle.
#include "wgmma.cuh"

#define R4_0 "%0,%1,%2,%3"
WGMMA(8, R4_0, D4(0), 4, 5, 6, 7, 8, 9)

constexpr int ROWS = 16;
constexpr int STAGE = 4096;
constexpr int STAGE_K = FORMAT == 0 ? 128 : 256;
constexpr int STAGES = K / STAGE_K;             // of a tile
constexpr int MOST = (STAGES + WGS - 1) / WGS;  // of a warpgroup
constexpr int WARPS = 4 * WGS;                  // that multiply
constexpr int PAIRS = (TOKENS + 1) / 2;         // of tokens: eight columns
constexpr int PADDED = 2 * PAIRS;
constexpr int COLUMNS = 8 * PAIRS;
constexpr int X_STAGE = PADDED * 256;       // bytes of x of a stage
constexpr int PARTIAL = PADDED * ROWS;      // floats of one warp's tile
constexpr int GROUP_WARPS = WARPS / GROUPS;  // that share a group of channels
constexpr int TASKS = TOKENS == 1 ? 1 : PAIRS;  // of adding up a tile
constexpr int LAG = WARPS >= 2 * TASKS ? 1 : 0;
constexpr int WANTED = FORMAT == 0 || PAIRS <= 1 ? 4 : PAIRS <= 4 ? 2 : 1;
constexpr int BATCH = WANTED < SLOTS ? WANTED : SLOTS;  // stages multiplied at once

constexpr int RING_AT = 0;
constexpr int X_AT = RING_AT + WGS * SLOTS * STAGE;
constexpr int X_SCALE_AT = X_AT + WGS * MOST * X_STAGE;
constexpr int SQUARES_AT = X_SCALE_AT + (FORMAT == 1 ? WGS * MOST * 2 * PADDED * 4 : 0);
constexpr int PARTIAL_AT = SQUARES_AT + TOKENS * WARPS * 4;
constexpr int BARS_AT = PARTIAL_AT + BUFFERS * WARPS * PARTIAL * 4;
constexpr int TOTAL = BARS_AT + (WGS * SLOTS * 2 + 2 * BUFFERS) * 8;
static_assert(TOTAL <= SHARED, "the host and this file disagree about shared memory");
static_assert(K % STAGE_K == 0 && STAGES >= WGS && 2 * MOST <= 32, "K does not suit the warpgroups");
static_assert(WGS % GROUPS == 0 && STAGES % GROUPS == 0, "a warpgroup's channels lie in one group");
static_assert(WARPS >= TASKS, "too few warps");

#if WIDE
typedef float Result;
DEVICE void store(float* to, float v) { *to = v; }
#else
typedef bf16 Result;
DEVICE void store(bf16* to, float v) { *to = to_bf16(v); }
#endif

// Where byte `at` of a token's 256 of a stage stands in x: rows of 64 bytes under the 64-byte swizzle.
DEVICE int x_place(int stage, int token, int at) {
  const int piece = at >> 6, row = (token & 1) * 4 + piece;
  return stage * X_STAGE + token * 256 + piece * 64 + ((at >> 4 & 3) ^ (row >> 1)) * 16 + (at & 15);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, FIT)
    gemv(const u8* __restrict__ weight, const float* __restrict__ scale, const bf16* __restrict__ x,
         const bf16* __restrict__ gate, const bf16* __restrict__ norm_weight, const bf16* __restrict__ residual,
         Result* __restrict__ y, int tokens, int tiles, int x_pitch, int gate_pitch, float eps) {
  extern __shared__ __align__(1024) u8 shared[];
  u64* filled = (u64*)(shared + BARS_AT);  // [WGS][SLOTS]
  u64* freed = filled + WGS * SLOTS;
  u64 *added = freed + WGS * SLOTS, *taken = added + BUFFERS;  // sums there, sums read
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int grid = gridDim.x, mine = (tiles - (int)blockIdx.x + grid - 1) / grid;

  launch_dependents();

  if (warp == WARPS) {  // the one that asks for weights
    if (lane == 0) {
      for (int i = 0; i < WGS * SLOTS; i++) barrier_init(filled + i, 1), barrier_init(freed + i, 4);
      for (int i = 0; i < BUFFERS; i++) barrier_init(added + i, WARPS), barrier_init(taken + i, TASKS);
      barrier_init_fence();
    }
    __syncwarp();
    asm volatile("bar.arrive 0, %0;" ::"n"(WARPS * 32 + 32) : "memory");
    if (lane == 0) {
      int slots[WGS] = {}, run = 0;
      u32 rounds[WGS] = {};
      const u8* at = weight + (u64)blockIdx.x * STAGES * STAGE;
#pragma unroll 1
      for (int i = 0; i < mine * MOST; i++) {
#pragma unroll
        for (int w = 0; w < WGS; w++) {
          const int first = w * STAGES / WGS, count = (w + 1) * STAGES / WGS - first;
          if (count < MOST && run >= count) continue;
          int& slot = slots[w];
          u32& round = rounds[w];
          if (round > 0) barrier_wait(freed + w * SLOTS + slot, (round - 1) & 1);
          u64* bar = filled + w * SLOTS + slot;
          barrier_expect(bar, STAGE);
          bulk_load(shared + RING_AT + (w * SLOTS + slot) * STAGE, at + (u64)(first + run) * STAGE, STAGE, bar);
          if (++slot == SLOTS) slot = 0, round++;
        }
        if (++run == MOST) run = 0, at += (u64)grid * STAGES * STAGE;
      }
    }
    return;
  }

  const int wg = warp / 4, piece = warp % 4, thread = threadIdx.x % 128;
  const int first = wg * STAGES / WGS, stages = (wg + 1) * STAGES / WGS - first;

  // Weights but for the matrix: the norm's, and the scales of a tile, of which lane 2 i + b has block b of stage i.
  constexpr int CHUNKS = (MOST * STAGE_K / 8 + 127) / 128;
  const int limit = stages * (STAGE_K / 8);
  uint4 norm[BEFORE ? CHUNKS : 1];
  if (BEFORE) {
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
      norm[j] = j * 128 + thread < limit ? load_early((const uint4*)(norm_weight + first * STAGE_K) + j * 128 + thread)
                                         : uint4{0, 0, 0, 0};
  }
  auto block_scale = [&](int tile, int half) {
    if (FORMAT != 1 || lane >= 2 * stages || tile >= tiles) return 0.0f;
    const int row = AFTER ? tile / 16 + half * (tiles / 16) : tile / 8;
    return load_early(scale + (i64)row * (K / 128) + 2 * first + lane);
  };
  float soon0 = block_scale(blockIdx.x, 0), soon1 = AFTER ? block_scale(blockIdx.x, 1) : 0;
  asm volatile("bar.sync 0, %0;" ::"n"(WARPS * 32 + 32) : "memory");  // the barriers are there

  wait_dependencies();

  // This warpgroup's channels of x, as columns of wgmma.
  u8* my_x = shared + X_AT + wg * MOST * X_STAGE;
  float* x_scales = (float*)(shared + X_SCALE_AT) + wg * MOST * 2 * PADDED;  // [stage][block][token]
  float* squares = (float*)(shared + SQUARES_AT);                           // [token][warp]
  float my_squares = 0;
  {
    constexpr int EACH = BEFORE == 2 ? 2 * CHUNKS : CHUNKS;
    constexpr int GO = TOKENS == 1 ? 1 : EACH >= 4 ? 1 : TOKENS < 4 / EACH ? TOKENS : 4 / EACH;  // tokens at once
    const bf16* from = x + first * STAGE_K;
    const bf16* gates = BEFORE == 2 ? gate + gate_pitch - K + first * STAGE_K : nullptr;
#pragma unroll 1
    for (int base = 0; base < (TOKENS == 1 ? 1 : tokens); base += GO) {
      uint4 xs[GO][CHUNKS], zs[GO][BEFORE == 2 ? CHUNKS : 1];
#pragma unroll
      for (int b = 0; b < GO; b++)
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
          const bool live = j * 128 + thread < limit && (TOKENS == 1 || base + b < tokens);
          xs[b][j] = live ? load_fresh((const uint4*)(from + (i64)(base + b) * x_pitch) + j * 128 + thread) : uint4{0, 0, 0, 0};
          if (BEFORE == 2)
            zs[b][j] = live ? load_fresh((const uint4*)(gates + (i64)(base + b) * gate_pitch) + j * 128 + thread) : uint4{0, 0, 0, 0};
        }
#pragma unroll
      for (int b = 0; b < GO; b++) {
        const int token = base + b;
        if (TOKENS > 1 && token >= tokens) break;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
          const int chunk = j * 128 + thread;
          float v[8];
          unpack_bf16(xs[b][j], v);
          if (BEFORE) {
            float w[8];
            unpack_bf16(norm[j], w);
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum), v[i] *= w[i];
          }
          if (BEFORE == 2) {
            float z[8];
            unpack_bf16(zs[b][j], z);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] *= sigmoid(z[i]);
          }
          if (FORMAT == 1) {
            float most = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
            most = warp_max<16>(most);
            float inverse, s = e4m3_scale(most, inverse);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = e4m3_ratio(v[i], s, inverse);
            if (chunk < limit) {
              *(uint2*)(my_x + x_place(chunk / 32, token, chunk % 32 * 8)) =
                  uint2{to_e4m3(v[0], v[1], v[2], v[3]), to_e4m3(v[4], v[5], v[6], v[7])};
              if (lane % 16 == 0) x_scales[chunk / 16 * PADDED + token] = s;
            }
          } else if (chunk < limit) {
            *(uint4*)(my_x + x_place(chunk / 16, token, chunk % 16 * 16)) =
                uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
          }
        }
        if (TOKENS == 1) {
          my_squares = sum;
        } else if (BEFORE) {
          sum = warp_sum(sum);
          if (lane == 0) squares[token * WARPS + warp] = sum;
        }
      }
    }
  }
  fence_async();
  asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory");

  const int outputs = AFTER ? tiles * 8 : tiles * ROWS;
  constexpr int MADE = AFTER ? 8 : ROWS;  // results of a tile and token
  // Adding up: a lane has one row of one of two tokens; of a single token, half of the warps' sums.
  const int row = lane % 16, half = lane / 16;
  bf16 kept = 0;  // residual of the tile that this warp adds up
  auto fetch_residual = [&](int tile, int pair) {
    const int token = TOKENS == 1 ? 0 : 2 * pair + half;
    if (RESIDUAL && row < MADE && token < tokens) kept = load_fresh(residual + (i64)token * outputs + MADE * tile + row);
  };
  float* partial = (float*)(shared + PARTIAL_AT);
  auto finish = [&](int i, int pair) {
    const int buffer = i % BUFFERS, tile = blockIdx.x + i * grid;
    const int token = TOKENS == 1 ? 0 : 2 * pair + half;
    const float* sums = partial + buffer * WARPS * PARTIAL + token * ROWS + row;
    barrier_wait(added + buffer, i / BUFFERS & 1);
    float v = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      float part = 0, square = 0;
#pragma unroll
      for (int j = 0; j < GROUP_WARPS; j++) {
        const int w = group * GROUP_WARPS + j;
        if (TOKENS > 1 || (w & 1) == half) part += sums[w * PARTIAL];
        if (BEFORE && (TOKENS == 1 || token < tokens)) square += squares[token * WARPS + w];
      }
      v += BEFORE ? part * rsqrtf(square * (1.0f / (K / GROUPS)) + eps) : part;
    }
    if (TOKENS == 1) v += __shfl_xor_sync(FULL_WARP, v, 16);
    if (AFTER) {
      const float up = __shfl_down_sync(FULL_WARP, v, 8);
      v = silu(v) * up;
    }
    if (row < MADE && (TOKENS == 1 ? half == 0 : token < tokens))
      store(y + (i64)token * outputs + MADE * tile + row, RESIDUAL ? v + from_bf16(kept) : v);
    __syncwarp();
    if (lane == 0) barrier_arrive(taken + buffer);
  };

  const u8* ring = shared + RING_AT + wg * SLOTS * STAGE;
  u64 *my_filled = filled + wg * SLOTS, *my_freed = freed + wg * SLOTS;
  const u64 x_operand = operand_at(shared_address(my_x));
  const bool odd = piece & 1;
  const bool useful = t % 2 == piece / 2;
  int slot = 0;
  u32 parity = 0;
#pragma unroll 1
  for (int i = 0; i < mine; i++) {
    const int tile = blockIdx.x + i * grid;
    const float scales0 = soon0, scales1 = AFTER ? soon1 : soon0;
    soon0 = block_scale(tile + grid, 0);
    if (AFTER) soon1 = block_scale(tile + grid, 1);
#pragma unroll
    for (int n = 0; n < TASKS; n++)
      if ((i * TASKS + n) % WARPS == warp) fetch_residual(tile, n);

    float acc[PAIRS][2] = {};
    float d[FORMAT == 0 ? 1 : BATCH][PAIRS * 4];
#pragma unroll(MOST <= 4 ? MOST : 1)
    for (int s = 0; s < MOST; s += BATCH) {
      const int begin = slot;
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if ((MOST % BATCH || STAGES % WGS) && s + b >= stages) break;
        barrier_wait(my_filled + slot, parity);
        wgmma_fence();
        const u64 a = operand_at(shared_address(ring + slot * STAGE)), o = x_operand + (s + b) * (X_STAGE / 16);
        if (FORMAT == 1) {
          Wgmma<COLUMNS>::e4m3(d[b], a, o, 0);
          Wgmma<COLUMNS>::e4m3(d[b], a + 2, o + 2, 1);
        } else {
          Wgmma<COLUMNS>::b16(d[0], a, o, s + b > 0);
          Wgmma<COLUMNS>::b16(d[0], a + 2, o + 2, 1);
        }
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
      wgmma_commit();
      wgmma_wait<0>();
      int done = begin;
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if ((MOST % BATCH || STAGES % WGS) && s + b >= stages) break;
        if (lane == 0) barrier_arrive(my_freed + done);
        if (++done == SLOTS) done = 0;
        if (FORMAT == 1) {
          pin<PAIRS * 4>(d[b]);
          const float s0 = __shfl_sync(FULL_WARP, scales0, 2 * (s + b) + piece / 2);
          const float s1 = AFTER ? __shfl_sync(FULL_WARP, scales1, 2 * (s + b) + piece / 2) : s0;
#pragma unroll
          for (int j = 0; j < PAIRS; j++) {
            const float f = x_scales[(2 * (s + b) + piece / 2) * PADDED + 2 * j + t / 2];
            acc[j][0] += (odd ? d[b][4 * j + 1] : d[b][4 * j]) * (f * s0);
            acc[j][1] += (odd ? d[b][4 * j + 3] : d[b][4 * j + 2]) * (f * s1);
          }
        }
      }
    }
    if (FORMAT == 0) {
      pin<PAIRS * 4>(d[0]);
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        acc[j][0] = odd ? d[0][4 * j + 1] : d[0][4 * j];
        acc[j][1] = odd ? d[0][4 * j + 3] : d[0][4 * j + 2];
      }
    }

    const int buffer = i % BUFFERS;
    if (i >= BUFFERS) barrier_wait(taken + buffer, i / BUFFERS - 1 & 1);
    float* sums = partial + (buffer * WARPS + warp) * PARTIAL;
    if (useful && (TOKENS > 1 || t < 2)) {
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        sums[(2 * j + t / 2) * ROWS + g] = acc[j][0];
        sums[(2 * j + t / 2) * ROWS + g + 8] = acc[j][1];
      }
    }
    if (TOKENS == 1 && BEFORE && i == 0) {
      my_squares = warp_sum(my_squares);
      if (lane == 0) squares[warp] = my_squares;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(added + buffer);
#pragma unroll
    for (int n = 0; n < TASKS; n++)
      if (i >= LAG && ((i - LAG) * TASKS + n) % WARPS == warp) finish(i - LAG, n);
  }
#pragma unroll
  for (int n = 0; n < TASKS; n++)
    if (LAG && ((mine - 1) * TASKS + n) % WARPS == warp) finish(mine - 1, n);
}
