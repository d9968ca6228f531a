// y = after(W before(x)) for few tokens: every weight is read once, at the rate of the memory.
//
// A block owns every gridDim.x-th tile of 16 rows and all of K; each of its WARPS warps owns a slice
// of K for the block's whole life. So a warp reads its slice of x once, norms and quantizes it
// by itself, and its weights come through its own ring without a pause from one tile to the next.
// Weights are the 16-row operand of mma.sync, tokens the 8 columns. The warps' sums of a tile meet in
// shared memory, in a fixed order; warps take turns at adding them up, one tile behind, so that
// no one waits.
//
// A row's rsqrt(mean square) multiplies the sum at the end: nothing stands between x and the first
// product but the quantization. Before the wait on preceding kernels the ring is filled and AHEAD more
// stages of each warp are brought into L2.
//
// Constants: FORMAT 0 BF16, 1 FP8, 2 INT4 (GROUP along K); K; PIECES of a stage; WARPS; DEPTH stages a ring; AHEAD; TOKENS,
// the most; BEFORE 0 none, 1 rms_norm, 2 group_norm_gate (GROUPS); AFTER 0 none, 1 swiglu; RESIDUAL;
// WIDE 1: y is f32; SHARED bytes, which the host works out as this file does
// and rounds up to more than half of what there is: two blocks of one launch on a multiprocessor would leave another idle.
#include "stream.cuh"

constexpr int ROWS = 16;
constexpr int PIECE_K = FORMAT == 0 ? 32 : FORMAT == 1 ? 64 : 128;  // channels of a piece
constexpr int STAGE_K = PIECES * PIECE_K;
constexpr int STAGES = K / STAGE_K;  // of a tile
constexpr int CODE_BYTES = PIECES * PIECE;
constexpr int SCALE_BYTES = FORMAT == 2 ? STAGE_K / GROUP * ROWS * 2 : 0;
constexpr int STAGE_BYTES = CODE_BYTES + SCALE_BYTES;
constexpr int MOST = (STAGES + WARPS - 1) / WARPS;  // stages of a warp's slice
constexpr int SLICE_K = MOST * STAGE_K;
constexpr int COLUMNS = (TOKENS + 7) / 8;  // n-tiles of 8 tokens
constexpr bool CODES = FORMAT == 1 && TOKENS > 8;  // x in shared memory as codes, else as what mma takes
constexpr int PAD = CODES ? 64 : FORMAT == 1 ? 16 : FORMAT == 0 || GROUP == 32 ? 64 : 32;
constexpr int PITCH = SLICE_K * (CODES ? 1 : 2) + (TOKENS > 1 ? PAD : 0);  // bytes of a token's slice
constexpr int BUFFERS = 4;                                                // tiles whose sums are under way
constexpr int PARTIAL = TOKENS == 1 ? ROWS : COLUMNS * 128;               // floats of one warp's tile
constexpr int LAG = WARPS >= 2 * COLUMNS ? 1 : 0;  // tiles between a sum's parts and their sum
constexpr int GROUP_WARPS = WARPS / (BEFORE == 2 ? GROUPS : 1);

constexpr int RING_AT = 0;
constexpr int X_AT = RING_AT + WARPS * DEPTH * STAGE_BYTES;
constexpr int X_SCALE_AT = X_AT + WARPS * TOKENS * PITCH;
constexpr int SQUARES_AT = X_SCALE_AT + (FORMAT == 1 ? WARPS * MOST * COLUMNS * 8 * 4 : 0);
constexpr int PARTIAL_AT = (SQUARES_AT + TOKENS * WARPS * 4 + 15) / 16 * 16;
constexpr int BARS_AT = PARTIAL_AT + BUFFERS * WARPS * PARTIAL * 4;
constexpr int TOTAL = BARS_AT + (WARPS * DEPTH + 2 * BUFFERS) * 8;
static_assert(TOTAL <= SHARED, "the host and this file disagree about shared memory");
static_assert(K % STAGE_K == 0 && STAGES >= WARPS && MOST <= 32, "K does not suit the slices");
static_assert(FORMAT != 1 || PIECES == 2, "a block of scales is a stage");
static_assert(WARPS >= COLUMNS, "a warp adds up one tile at a time");
static_assert(BEFORE != 2 || (WARPS % GROUPS == 0 && STAGES % GROUPS == 0), "a slice lies in one group");

// x of a warp's slice, ready for mma, with its scales and the sums of its squares.
struct Slice {
  u8* x;         // [TOKENS][PITCH]
  float* scales;  // FP8: [MOST][COLUMNS * 8]
  float* squares;  // [TOKENS][WARPS], this warp's
};

// Where 8 channels of x stand in a token's slice. INT4 with wide groups reads 64 bytes a lane: two of four lanes
// would meet in the same banks.
DEVICE int chunk_place(int chunk) { return FORMAT == 2 && GROUP != 32 ? chunk ^ (chunk >> 3 & 1) : chunk; }

// Warp. Norms, gates and quantizes the slice [first, first + STAGE_K * stages) of K.
// `weight` are the norm's for this lane's chunks; `squares` is this lane's part for one token.
template <int CHUNKS>
DEVICE void load_x(const Slice& slice, const bf16* __restrict__ x, const bf16* __restrict__ gate,
                   const uint4* weight, int tokens, i64 x_pitch, i64 gate_pitch, int first, int stages,
                   float& squares) {
  constexpr int EACH = BEFORE == 2 ? 2 * CHUNKS : CHUNKS;
  constexpr int BATCH = TOKENS == 1 ? 1 : EACH >= 8 ? 1 : TOKENS < 8 / EACH ? TOKENS : 8 / EACH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int limit = stages * (STAGE_K / 8);
  x += first, gate += BEFORE == 2 ? gate_pitch - K + first : 0;
#pragma unroll 1
  for (int base = 0; base < tokens; base += BATCH) {
    uint4 xs[BATCH][CHUNKS], gates[BATCH][BEFORE == 2 ? CHUNKS : 1];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) {
        const int chunk = j * 32 + lane;
        const bool live = chunk < limit && base + b < tokens;
        xs[b][j] = live ? load_fresh((const uint4*)(x + (base + b) * x_pitch) + chunk) : uint4{0, 0, 0, 0};
        if (BEFORE == 2)
          gates[b][j] = live ? load_fresh((const uint4*)(gate + (base + b) * gate_pitch) + chunk) : uint4{0, 0, 0, 0};
      }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int token = base + b;
      if (token >= tokens) break;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) {
        const int chunk = j * 32 + lane;
        float v[8];
        unpack_bf16(xs[b][j], v);
        if (BEFORE) {
          float w[8];
          unpack_bf16(weight[j], w);
#pragma unroll
          for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum), v[i] *= w[i];
        }
        if (BEFORE == 2) {
          float z[8];
          unpack_bf16(gates[b][j], z);
#pragma unroll
          for (int i = 0; i < 8; i++) v[i] *= sigmoid(z[i]);
        }
        u8* to = slice.x + token * PITCH;
        if (FORMAT == 1) {
          float most = 0;
#pragma unroll
          for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
          most = warp_max<16>(most);
          float inverse, scale = e4m3_scale(most, inverse);
#pragma unroll
          for (int i = 0; i < 8; i++) v[i] = e4m3_ratio(v[i], scale, inverse);
          const u32 low = to_e4m3(v[0], v[1], v[2], v[3]), high = to_e4m3(v[4], v[5], v[6], v[7]);
          if (chunk < limit) {
            if (CODES) {
              ((uint2*)to)[chunk] = uint2{low, high};
            } else {
              uint4 f;
              e4m3_to_f16(low, f.x, f.y), e4m3_to_f16(high, f.z, f.w);
              ((uint4*)to)[chunk] = f;
            }
            if (lane % 16 == 0) slice.scales[chunk / 16 * (COLUMNS * 8) + token] = scale;
          }
        } else if (chunk < limit) {
          ((uint4*)to)[chunk_place(chunk)] =
              uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
        }
      }
      if (TOKENS == 1) {
        squares = sum;
      } else if (BEFORE) {
        sum = warp_sum(sum);
        if (lane == 0) slice.squares[token * WARPS + warp] = sum;
      }
    }
  }
}

// Where lane t of the mma finds its channels of a stage, past the beginning of a token's slice.
DEVICE int x_offset(int t) {
  if (FORMAT == 1) return CODES ? t * 16 : t * 32;
  return FORMAT == 0 || GROUP == 32 ? t * 16 : t * 64;
}

// Warp. acc += W x for one stage; `x` is this lane's place in the stage's channels of each column of tokens.
DEVICE void multiply(float (&acc)[COLUMNS][4], const uint4 (&a)[PIECES], const uint4 (&b)[PIECES],
                     const u8* const (&x)[COLUMNS], const float* x_scales, float scale0, float scale1) {
  if constexpr (FORMAT == 1) {
    float c[COLUMNS][2][4] = {};
#pragma unroll
    for (int p = 0; p < 2; p++) {
      u32 top[8], low[8];
      e4m3_to_f16(a[p].x, top[0], top[1]), e4m3_to_f16(a[p].y, top[2], top[3]);
      e4m3_to_f16(a[p].z, top[4], top[5]), e4m3_to_f16(a[p].w, top[6], top[7]);
      e4m3_to_f16(b[p].x, low[0], low[1]), e4m3_to_f16(b[p].y, low[2], low[3]);
      e4m3_to_f16(b[p].z, low[4], low[5]), e4m3_to_f16(b[p].w, low[6], low[7]);
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        u32 v[8];
        if (CODES) {
          const uint4 codes = *(const uint4*)(x[n] + p * 64);
          e4m3_to_f16(codes.x, v[0], v[1]), e4m3_to_f16(codes.y, v[2], v[3]);
          e4m3_to_f16(codes.z, v[4], v[5]), e4m3_to_f16(codes.w, v[6], v[7]);
        } else {
          const uint4 f = *(const uint4*)(x[n] + p * 128), h = *(const uint4*)(x[n] + p * 128 + 16);
          v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w, v[4] = h.x, v[5] = h.y, v[6] = h.z, v[7] = h.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          mma_f16(c[n][i & 1], top[2 * i], low[2 * i], top[2 * i + 1], low[2 * i + 1], v[2 * i], v[2 * i + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
      const float2 s = *(const float2*)(x_scales + n * 8);
      acc[n][0] += (c[n][0][0] + c[n][1][0]) * (s.x * scale0), acc[n][1] += (c[n][0][1] + c[n][1][1]) * (s.y * scale0);
      acc[n][2] += (c[n][0][2] + c[n][1][2]) * (s.x * scale1), acc[n][3] += (c[n][0][3] + c[n][1][3]) * (s.y * scale1);
    }
  } else {
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
      float c[4] = {};
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const uint4 v = *(const uint4*)(x[n] + p * 64);
        mma_bf16(acc[n], a[p].x, b[p].x, a[p].y, b[p].y, v.x, v.y);
        mma_bf16(c, a[p].z, b[p].z, a[p].w, b[p].w, v.z, v.w);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] += c[i];
    }
  }
}

// Eight channels a lane of two rows in INT4, times `x`: c and d are sums of their own, to be scaled.
DEVICE void multiply_words(float* c, float* d, u32 top, u32 low, uint4 x) {
  mma_bf16(c, int4_to_bf16(top), int4_to_bf16(low), int4_to_bf16(top >> 4), int4_to_bf16(low >> 4), x.x, x.y);
  mma_bf16(d, int4_to_bf16(top >> 8), int4_to_bf16(low >> 8), int4_to_bf16(top >> 12), int4_to_bf16(low >> 12), x.z,
           x.w);
}

// Warp. The same for INT4. With groups of 128 a lane's 16 bytes of a row and those of its neighbours are one group; with
// groups of 32 a lane takes a word of each quarter instead, since one mma may hold one group only.
DEVICE void multiply_int4(float (&acc)[COLUMNS][4], const u32 (&a)[PIECES][4], const u32 (&b)[PIECES][4],
                          const float (&scale0)[PIECES][4], const float (&scale1)[PIECES][4],
                          const u8* const (&x)[COLUMNS], int t) {
#pragma unroll
  for (int p = 0; p < PIECES; p++)
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
      float c[4] = {}, d[4] = {};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const int at = GROUP == 32 ? q * 64 : (q ^ (t >> 1)) * 16;
        multiply_words(c, d, a[p][q], b[p][q], *(const uint4*)(x[n] + p * 256 + at));
        if (GROUP == 32 || q == 3) {
          const float s0 = scale0[p][GROUP == 32 ? q : 0], s1 = scale1[p][GROUP == 32 ? q : 0];
          acc[n][0] += (c[0] + d[0]) * s0, acc[n][1] += (c[1] + d[1]) * s0;
          acc[n][2] += (c[2] + d[2]) * s1, acc[n][3] += (c[3] + d[3]) * s1;
          c[0] = c[1] = c[2] = c[3] = d[0] = d[1] = d[2] = d[3] = 0;
        }
      }
    }
}

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

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    gemv(const u8* __restrict__ weight, const void* __restrict__ scale, const bf16* __restrict__ x,
         const bf16* __restrict__ gate, const bf16* __restrict__ norm_weight, const bf16* __restrict__ residual,
         Result* __restrict__ y, int tokens, int tiles, int x_pitch, int gate_pitch, float eps) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (TOKENS == 1) tokens = 1;
  u64* bars = (u64*)(shared + BARS_AT);
  u64 *full = bars + WARPS * DEPTH, *empty = full + BUFFERS;
  Ring<DEPTH, STAGE_BYTES> ring(shared + RING_AT + warp * DEPTH * STAGE_BYTES, bars + warp * DEPTH);
  const int first = warp * STAGES / WARPS, stages = (warp + 1) * STAGES / WARPS - first;
  const int grid = gridDim.x, mine = (tiles - (int)blockIdx.x + grid - 1) / grid;

  launch_dependents();

  // The stream: stage `next` of the whole matrix, `run` more in this tile's slice, `left` in all.
  int next = (int)blockIdx.x * STAGES + first, run = stages, left = mine * stages;
  auto ask = [&](int slot) {
    if (lane == 0) {
      barrier_expect(ring.bars + slot, STAGE_BYTES);
      bulk_load(ring.stages + slot * STAGE_BYTES, weight + (u64)next * CODE_BYTES, CODE_BYTES, ring.bars + slot);
      if (FORMAT == 2)
        bulk_load(ring.stages + slot * STAGE_BYTES + CODE_BYTES, (const u8*)scale + (u64)next * SCALE_BYTES, SCALE_BYTES,
                  ring.bars + slot);
    }
    left--, next++;
    if (--run == 0) run = stages, next += grid * STAGES - stages;
  };
  if (lane == 0) ring.init();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < BUFFERS; i++) barrier_init(full + i, WARPS), barrier_init(empty + i, COLUMNS);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < DEPTH; i++)
    if (left > 0) ask(i);
  if (AHEAD > 0 && lane == 0) {
    int at = next, there = run, most = left < AHEAD ? left : AHEAD;
    while (most > 0) {
      const int now = there < most ? there : most;
      bulk_prefetch(weight + (u64)at * CODE_BYTES, now * CODE_BYTES);
      if (FORMAT == 2) bulk_prefetch((const u8*)scale + (u64)at * SCALE_BYTES, now * SCALE_BYTES);
      most -= now, at += there + grid * STAGES - stages, there = stages;
    }
  }

  // What else is weights.
  constexpr int CHUNKS = (SLICE_K / 8 + 31) / 32;
  uint4 norm[BEFORE ? CHUNKS : 1];
  if (BEFORE) {
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
      norm[j] = j * 32 + lane < stages * (STAGE_K / 8)
                    ? load_early((const uint4*)(norm_weight + first * STAGE_K) + j * 32 + lane)
                    : uint4{0, 0, 0, 0};
  }
  // FP8: lane i has the scale of stage i of a tile, for rows 0-7 and 8-15.
  auto block_scale = [&](int tile, int half) {
    if (FORMAT != 1 || lane >= stages || tile >= tiles) return 0.0f;
    const int row = AFTER ? tile / 16 + half * (tiles / 16) : tile / 8;
    return load_early((const float*)scale + (i64)row * STAGES + first + lane);
  };
  float soon0 = block_scale(blockIdx.x, 0), soon1 = AFTER ? block_scale(blockIdx.x, 1) : 0;
  __syncthreads();  // the barriers of the sums

  wait_dependencies();

  // Residual of the tile that this warp adds up next: bits, since a conversion would await them.
  const int outputs = AFTER ? tiles * 8 : tiles * ROWS;
  bf16 kept[4] = {};
  auto fetch_residual = [&](int turn) {
    const int tile = blockIdx.x + turn / COLUMNS * grid, n = turn % COLUMNS;
    if (!RESIDUAL || tile >= tiles) return;
    if (TOKENS == 1) {
      if (lane < (AFTER ? 8 : 16)) kept[0] = load_fresh(residual + (AFTER ? 8 : ROWS) * tile + lane);
      return;
    }
#pragma unroll
    for (int i = 0; i < (AFTER ? 2 : 4); i++) {
      const int token = n * 8 + 2 * t + (i & 1);
      if (token < tokens)
        kept[i] = load_fresh(residual + (i64)token * outputs + (AFTER ? 8 : ROWS) * tile + g + (i & 2) * 4);
    }
  };
  fetch_residual(warp);

  Slice slice{shared + X_AT + warp * TOKENS * PITCH, (float*)(shared + X_SCALE_AT) + warp * MOST * COLUMNS * 8,
              (float*)(shared + SQUARES_AT)};
  float squares = 0;
  load_x<CHUNKS>(slice, x, gate, norm, tokens, x_pitch, gate_pitch, first * STAGE_K, stages, squares);
  __syncwarp();

  // Warp. Adds up the warps' sums of this block's i-th tile, 8 tokens, and stores them.
  float* partial = (float*)(shared + PARTIAL_AT);
  auto finish = [&](int i, int n) {
    const int buffer = i % BUFFERS, tile = blockIdx.x + i * grid;
    const float* sums = partial + buffer * WARPS * PARTIAL;
    barrier_wait(full + buffer, i / BUFFERS & 1);
    if constexpr (TOKENS == 1) {
      const int row = lane % 16, half = lane / 16;
      float v = 0;
#pragma unroll
      for (int group = 0; group < WARPS / GROUP_WARPS; group++) {
        float part = 0, square = 0;
#pragma unroll
        for (int j = 0; j < GROUP_WARPS; j++) {
          const int w = group * GROUP_WARPS + j;
          if ((w & 1) == half) part += sums[w * PARTIAL + row];
          if (BEFORE) square += slice.squares[w];
        }
        v += BEFORE ? part * rsqrtf(square * (1.0f / (K / (WARPS / GROUP_WARPS))) + eps) : part;
      }
      v += __shfl_xor_sync(FULL_WARP, v, 16);
      if (AFTER) {
        const float up = __shfl_down_sync(FULL_WARP, v, 8);
        v = silu(v) * up;
      }
      if (lane < (AFTER ? 8 : 16)) store(y + (AFTER ? 8 : ROWS) * tile + lane, v + from_bf16(kept[0]));
    } else {
      float v[4] = {};
      const int token = n * 8 + 2 * t;
#pragma unroll
      for (int group = 0; group < WARPS / GROUP_WARPS; group++) {
        float part[4] = {}, square0 = 0, square1 = 0;
#pragma unroll
        for (int j = 0; j < GROUP_WARPS; j++) {
          const int w = group * GROUP_WARPS + j;
          const float4 one = *(const float4*)(sums + w * PARTIAL + n * 128 + lane * 4);
          part[0] += one.x, part[1] += one.y, part[2] += one.z, part[3] += one.w;
          if (BEFORE && token < tokens) square0 += slice.squares[token * WARPS + w];
          if (BEFORE && token + 1 < tokens) square1 += slice.squares[(token + 1) * WARPS + w];
        }
        const float r0 = BEFORE ? rsqrtf(square0 * (1.0f / (K / (WARPS / GROUP_WARPS))) + eps) : 1.0f;
        const float r1 = BEFORE ? rsqrtf(square1 * (1.0f / (K / (WARPS / GROUP_WARPS))) + eps) : 1.0f;
        v[0] += part[0] * r0, v[1] += part[1] * r1, v[2] += part[2] * r0, v[3] += part[3] * r1;
      }
      if (AFTER) v[0] = silu(v[0]) * v[2], v[1] = silu(v[1]) * v[3];
      Result* to = y + (i64)token * outputs + (AFTER ? 8 : ROWS) * tile + g;
      if (token < tokens) {
        store(to, v[0] + from_bf16(kept[0]));
        if (!AFTER) store(to + 8, v[2] + from_bf16(kept[2]));
      }
      if (token + 1 < tokens) {
        store(to + outputs, v[1] + from_bf16(kept[1]));
        if (!AFTER) store(to + outputs + 8, v[3] + from_bf16(kept[3]));
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + buffer);
    fetch_residual(i * COLUMNS + n + WARPS);
  };

  const u8* x_at[COLUMNS];
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    const int token = n * 8 + g;  // columns past the last token repeat it; nobody reads their sums
    x_at[n] = slice.x + (token < tokens ? token : tokens - 1) * PITCH + x_offset(t);
  }
  const u32 at = piece_offset(lane);

#pragma unroll 1
  for (int i = 0; i < mine; i++) {
    const int tile = blockIdx.x + i * grid;
    const float scales0 = soon0, scales1 = AFTER ? soon1 : soon0;
    soon0 = block_scale(tile + grid, 0);
    if (AFTER) soon1 = block_scale(tile + grid, 1);

    float acc[COLUMNS][4] = {};
#pragma unroll(MOST <= 4 ? MOST : 2)
    for (int s = 0; s < MOST; s++) {
      if (STAGES % WARPS != 0 && s >= stages) break;
      const u8* x_now[COLUMNS];
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) x_now[n] = x_at[n] + s * STAGE_K * (CODES ? 1 : 2);
      const u8* codes = ring.front();
      u32 read = 0;  // a word of every load
      if constexpr (FORMAT == 2) {
        u32 a[PIECES][4], b[PIECES][4];
        float scale0[PIECES][4], scale1[PIECES][4];
        const bf16* scales = (const bf16*)(codes + CODE_BYTES);
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
          if constexpr (GROUP == 32) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
              const u8* word = codes + p * PIECE + g * 64 + (q ^ (g / 2 % 4)) * 16 + t * 4;
              a[p][q] = *(const u32*)word, b[p][q] = *(const u32*)(word + 512);
              read ^= a[p][q] ^ b[p][q];
              scale0[p][q] = from_bf16(scales[(p * 4 + q) * ROWS + g]);
              scale1[p][q] = from_bf16(scales[(p * 4 + q) * ROWS + g + 8]);
              read ^= __float_as_uint(scale0[p][q]) ^ __float_as_uint(scale1[p][q]);
            }
          } else {
            const uint4 top = *(const uint4*)(codes + p * PIECE + at), low = *(const uint4*)(codes + p * PIECE + at + 512);
            a[p][0] = top.x, a[p][1] = top.y, a[p][2] = top.z, a[p][3] = top.w;
            b[p][0] = low.x, b[p][1] = low.y, b[p][2] = low.z, b[p][3] = low.w;
            scale0[p][0] = from_bf16(scales[p * ROWS + g]), scale1[p][0] = from_bf16(scales[p * ROWS + g + 8]);
            read ^= top.x ^ low.x ^ __float_as_uint(scale0[p][0]) ^ __float_as_uint(scale1[p][0]);
          }
        }
        ring.release(read);
        if (left > 0) ask(ring.slot);
        ring.pop();
        multiply_int4(acc, a, b, scale0, scale1, x_now, t);
      } else {
        uint4 a[PIECES], b[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
          a[p] = *(const uint4*)(codes + p * PIECE + at);
          b[p] = *(const uint4*)(codes + p * PIECE + at + 512);
          read ^= a[p].x ^ b[p].x;
        }
        ring.release(read);
        if (left > 0) ask(ring.slot);
        ring.pop();
        const float s0 = FORMAT == 1 ? __shfl_sync(FULL_WARP, scales0, s) : 0;
        const float s1 = FORMAT == 1 && AFTER ? __shfl_sync(FULL_WARP, scales1, s) : s0;
        multiply(acc, a, b, x_now, slice.scales + s * (COLUMNS * 8) + 2 * t, s0, s1);
      }
    }

    const int buffer = i % BUFFERS;
    if (i >= BUFFERS) barrier_wait(empty + buffer, i / BUFFERS - 1 & 1);
    float* sums = partial + (buffer * WARPS + warp) * PARTIAL;
    if constexpr (TOKENS == 1) {
      if (t == 0) sums[g] = acc[0][0], sums[g + 8] = acc[0][2];
      if (BEFORE && i == 0) {
        squares = warp_sum(squares);
        if (lane == 0) slice.squares[warp] = squares;
      }
    } else {
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
        *(float4*)(sums + n * 128 + lane * 4) = float4{acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(full + buffer);
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
      if (i >= LAG && ((i - LAG) * COLUMNS + n) % WARPS == warp) finish(i - LAG, n);
  }
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
    if (LAG && ((mine - 1) * COLUMNS + n) % WARPS == warp) finish(mine - 1, n);
}
