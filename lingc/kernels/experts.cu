// The experts of 1 to 64 tokens: weights of the experts that are hit are read once, at the speed of memory.
//
// Every warp streams a slice of K of 16 rows at a time through a ring of its own. Rows of weights are the 16-row
// operand of mma, tokens its 8 columns. Warps of a block add up their slices in a fixed order, and a token's sum over
// its experts has an order of its own, so its bits depend on nothing but its row.
//
// Dependent launch: `expert_up` and `prepare_rows` let the next kernel begin only after their own wait. Whatever the
// router wrote has therefore ended when `expert_down` begins, and it reads ids, weights, pairs and starts, and with
// them the experts' weights, before its wait. A kernel between these must keep to that.
//
// Constants, by -D:
//   FORMAT          0 bf16, 1 E4M3 with one f32 scale a 128x128 block, 2 four bits with one bf16 scale a row and GROUP
//   GROUP           channels of one scale
//   WIDTH, INNER    channels of the residual stream, and of one expert
//   EXPERTS, TOP_K, SHARED   routed experts, those of one token, and 1 where one more expert serves all tokens
//   TOKENS          most tokens: 1, 8, 16, ...
//   PREPARED        whether `prepare_rows` has normed and quantized the rows before
//   WARPS, BLOCKS   of a block, and blocks meant for one multiprocessor
//   STAGE, DEPTH    pieces of one copy, and copies of a warp's ring
//   BYTES           of shared memory, which the host works out as this file does
// and one of UP, DOWN, ROW (channels of a row to prepare; NORM: whether to norm it).
#include "int4.cuh"
#include "stream.cuh"

#define BF16 0
#define FP8 1
#define INT4 2

#if FORMAT == FP8
#define PIECE_K 64   // channels of a piece
#define FRAGMENTS 1  // 16-byte parts of x that one lane multiplies with its 16 bytes of a row
#define ROW_BYTES(k) ((size_t)(k))
#define X_BYTES 1
#elif FORMAT == BF16
#define PIECE_K 32
#define FRAGMENTS 1
#define ROW_BYTES(k) ((size_t)(k) * 2)
#define X_BYTES 2
#else
#define PIECE_K 128
#define FRAGMENTS 4
#define ROW_BYTES(k) ((size_t)(k) / 2)
#define X_BYTES 2
#endif
// Whether x is multiplied as integers of 16 bits (int4.cuh): `expert_down_one.cu` does so on the way down.
#if defined(UP)
#define INTEGER (FORMAT == INT4 && TOKENS == 1)
#else
#define INTEGER 0
#endif
#define SCALED (FORMAT == FP8 || INTEGER)  // x has a scale for each 128 channels
#define PARTS (INTEGER ? 2 : FRAGMENTS)    // 16-byte loads of x for a piece

// ---------------------------------------------------------------- rows

// 16 channels of a row in registers of one lane, as this format multiplies them: of E4M3, 8 neighbouring lanes hold a
// block, and get its scale.
struct Chunk {
  uint4 part[X_BYTES];
};
template <bool exact = true>
DEVICE float round_chunk(const float* v, Chunk& to) {
#if FORMAT == FP8
  float most = 0, inverse, q[16];
#pragma unroll
  for (int i = 0; i < 16; i++) most = fmaxf(most, fabsf(v[i]));
  const float scale = e4m3_scale(warp_max<8>(most), inverse);
  // To the last bit where v is: bf16 values often lie halfway between two codes.
#pragma unroll
  for (int i = 0; i < 16; i++) q[i] = exact ? e4m3_ratio(v[i], scale, inverse) : v[i] * inverse;
  to.part[0] = uint4{to_e4m3(q[0], q[1], q[2], q[3]), to_e4m3(q[4], q[5], q[6], q[7]),
                     to_e4m3(q[8], q[9], q[10], q[11]), to_e4m3(q[12], q[13], q[14], q[15])};
  return scale;
#else
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float* u = v + 8 * h;
    to.part[h] = uint4{pack_bf16(u[0], u[1]), pack_bf16(u[2], u[3]), pack_bf16(u[4], u[5]), pack_bf16(u[6], u[7])};
  }
  return 1.0f;
#endif
}

// The same as integers, at its place in a row's slice; `n` of 16 channels. Returns the scale.
DEVICE float store_integers(u8* slice, int n, const float (&v)[16], bool live) {
  float inverse;
  const float scale = s16_scale<8>(v, inverse);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const Bytes made = to_s16(v + 8 * h, inverse);
    u8* at = slice + s16_place<GROUP>(2 * n + h);
    if (live) *(uint2*)at = made.high, *(uint2*)(at + 64) = made.low;
  }
  return scale * (1.0f / 16);
}

// Chunk n of a row, as it lies in memory; zeros where the lane has none.
struct Raw {
  uint4 part[2];
};
DEVICE Raw load_chunk(const bf16* row, int n, bool live) {
  const uint4 zero = {0, 0, 0, 0}, *from = (const uint4*)row + n * 2;
  return live ? Raw{{load_fresh(from), load_fresh(from + 1)}} : Raw{{zero, zero}};
}
DEVICE void unpack(const Raw& raw, float* v) { unpack_bf16(raw.part[0], v), unpack_bf16(raw.part[1], v + 8); }

#ifdef ROW
// Rows of ROW channels (NORM: first normed) to E4M3 codes [T, ROW] with scales [T, ROW / 128], or to bf16 [T, ROW].
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    prepare_rows(const bf16* x, const bf16* norm_weight, u8* rows, float* scales, int pitch, float eps) {
  __shared__ float squares[WARPS];
  const i64 row = blockIdx.x;
  constexpr int EACH = (ROW / 16 + WARPS * 32 - 1) / (WARPS * 32);
  float v[EACH][16], square = 0, root = 1;
  wait_dependencies();
  launch_dependents();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int chunk = threadIdx.x + i * WARPS * 32;
    unpack(load_chunk(x + row * pitch, chunk, chunk < ROW / 16), v[i]);
#pragma unroll
    for (int j = 0; j < 16; j++) square += v[i][j] * v[i][j];
  }
  if (NORM) {
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
    for (int w = 0; w < WARPS; w++) square += squares[w];
    root = rsqrtf(square * (1.0f / ROW) + eps);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int chunk = threadIdx.x + i * WARPS * 32;
    const bool live = chunk < ROW / 16;
    if (NORM && live) {
      float w[16];
      unpack(load_chunk(norm_weight, chunk, live), w);
#pragma unroll
      for (int j = 0; j < 16; j++) v[i][j] *= root * w[j];
    }
    Chunk made;
    const float scale = round_chunk(v[i], made);
    if (!live) continue;
#pragma unroll
    for (int h = 0; h < X_BYTES; h++) ((uint4*)(rows + row * ROW * X_BYTES))[chunk * X_BYTES + h] = made.part[h];
    if (FORMAT == FP8 && chunk % 8 == 0) scales[row * (ROW / 128) + chunk / 8] = scale;
  }
}
#else

#define SLOTS (TOP_K + SHARED)
#define STAGE_K (STAGE * PIECE_K)
#define STAGE_GROUPS (STAGE_K / GROUP)
#define STAGE_BLOCKS (STAGE_K / 128)  // of E4M3
#define SCALE_BYTES (FORMAT == INT4 ? STAGE_GROUPS * 32 : 0)
#define STAGE_BYTES (STAGE * PIECE + SCALE_BYTES)
#define EIGHTS ((TOKENS + 7) / 8)

// Which 16 bytes of a row lane t multiplies in fragment f of a piece, counted from the piece's first.
DEVICE int part_of(int f, int t) { return FORMAT != INT4 ? t : GROUP == 32 ? f * 4 + t : t * 4 + f; }

// And back: where the n-th 16 bytes of a row stand in shared memory, in parts: [piece][fragment] `pitch` apart, then t.
DEVICE int place_of(int n, int pitch) {
  if (FORMAT != INT4) return n / 4 * pitch + n % 4;
  if (GROUP == 32) return n / 4 * pitch + n % 4;
  return (n / 16 * 4 + n % 4) * pitch + n % 16 / 4;
}

// ---------------------------------------------------------------- products

// What one lane multiplies: its 16 bytes of rows g and g + 8 of every piece, and the scales that travel along.
struct Words {
#if INTEGER
  Nibbles<GROUP> pieces[STAGE];
#else
  u32 top[STAGE][4], low[STAGE][4];
#if FORMAT == INT4
  float top_scale[STAGE_GROUPS], low_scale[STAGE_GROUPS];
#endif
#endif
};

// Returns what says that it is done, for `Ring::release`.
DEVICE u32 read_stage(Words& w, const u8* stage, int lane) {
  u32 read = 0;
#if INTEGER
#pragma unroll
  for (int p = 0; p < STAGE; p++)
    read ^= w.pieces[p].read(stage + p * PIECE, (const bf16*)(stage + STAGE * PIECE) + p * (STAGE_GROUPS / STAGE) * 16, lane);
#else
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int p = 0; p < STAGE; p++) {
    if (FORMAT == INT4 && GROUP == 32) {
      // A word of each quarter: the four lanes of a row then multiply channels of one group at a time.
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u8* at = stage + p * PIECE + g * 64 + (i ^ (g / 2)) * 16 + t * 4;
        w.top[p][i] = *(const u32*)at, w.low[p][i] = *(const u32*)(at + 512);
        read ^= w.top[p][i] ^ w.low[p][i];
      }
    } else {
      const uint4 a = *(const uint4*)(stage + p * PIECE + piece_offset(lane));
      const uint4 b = *(const uint4*)(stage + p * PIECE + piece_offset(lane) + 512);
      w.top[p][0] = a.x, w.top[p][1] = a.y, w.top[p][2] = a.z, w.top[p][3] = a.w;
      w.low[p][0] = b.x, w.low[p][1] = b.y, w.low[p][2] = b.z, w.low[p][3] = b.w;
      read ^= a.x ^ b.x;
    }
  }
#if FORMAT == INT4
  const bf16* scales = (const bf16*)(stage + STAGE * PIECE);
#pragma unroll
  for (int i = 0; i < STAGE_GROUPS; i++) {
    w.top_scale[i] = from_bf16(scales[i * 16 + g]), w.low_scale[i] = from_bf16(scales[i * 16 + g + 8]);
    read ^= __float_as_uint(w.top_scale[i]) ^ __float_as_uint(w.low_scale[i]);
  }
#endif
#endif
  return read;
}

// acc += the stage times 8 columns; acc: row g of columns 2t and 2t + 1, then row g + 8. `x(p, f)` gives fragment f of
// piece p, `factors(b, s)` what the four sums of the stage's E4M3 block b are to be multiplied by.
template <class X, class S>
DEVICE void multiply(float (&acc)[4], const Words& w, X x, S factors) {
#if FORMAT == FP8
#pragma unroll
  for (int b = 0; b < STAGE_BLOCKS; b++) {
    float c[2][4] = {}, s[4];
#pragma unroll
    for (int p = 2 * b; p < 2 * b + 2; p++) {
      const uint4 v = x(p, 0);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 a0, a1, a2, a3, b0, b1;
        e4m3_to_f16(w.top[p][i], a0, a2), e4m3_to_f16(w.low[p][i], a1, a3), e4m3_to_f16(words[i], b0, b1);
        mma_f16(c[i % 2], a0, a1, a2, a3, b0, b1);
      }
    }
    factors(b, s);
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] += (c[0][i] + c[1][i]) * s[i];
  }
#elif FORMAT == BF16
  float c[4] = {};
#pragma unroll
  for (int p = 0; p < STAGE; p++) {
    const uint4 v = x(p, 0);
    mma_bf16(acc, w.top[p][0], w.low[p][0], w.top[p][1], w.low[p][1], v.x, v.y);
    mma_bf16(c, w.top[p][2], w.low[p][2], w.top[p][3], w.low[p][3], v.z, v.w);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) acc[i] += c[i];
#elif INTEGER
#pragma unroll
  for (int p = 0; p < STAGE; p++) {
    float factor[4];
    factors(p, factor);
    w.pieces[p].multiply(acc[0], acc[2], x(p, 0), x(p, 1), factor[0]);
  }
#else
  constexpr int EACH = GROUP / 32;
#pragma unroll
  for (int i = 0; i < STAGE_GROUPS; i++) {
    float c[2][4] = {};
#pragma unroll
    for (int n = i * EACH; n < (i + 1) * EACH; n++) {
      const uint4 v = x(n / 4, n % 4);
      const u32 a = w.top[n / 4][n % 4], b = w.low[n / 4][n % 4];
      mma_bf16(c[0], int4_to_bf16(a), int4_to_bf16(b), int4_to_bf16(a >> 4), int4_to_bf16(b >> 4), v.x, v.y);
      mma_bf16(c[1], int4_to_bf16(a >> 8), int4_to_bf16(b >> 8), int4_to_bf16(a >> 12), int4_to_bf16(b >> 12), v.z, v.w);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) acc[j] += (c[0][j] + c[1][j]) * (j < 2 ? w.top_scale[i] : w.low_scale[i]);
  }
#endif
}

// By one lane: asks for a stage.
DEVICE void ask(u8* to, const u8* words, const u8* scales, u64* bar, u64 policy) {
  barrier_expect(bar, STAGE_BYTES);
  bulk_load(to, words, STAGE * PIECE, bar, policy);
  if (FORMAT == INT4) bulk_load(to + STAGE * PIECE, scales, SCALE_BYTES, bar, policy);
}

// ---------------------------------------------------------------- lists of experts

// An expert that is hit: its id, the first of its places in `pairs`, how many.
struct Hit {
  int expert, first, count;
};

// Warp. All of them by rising id; returns how many.
DEVICE int list_hits(Hit* hits, const int* starts, int lane) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  int found = 0, first[EACH], end[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = min(i * 32 + lane, EXPERTS - 1);
    first[i] = load_fresh(starts + e), end[i] = load_fresh(starts + e + 1);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const bool hit = i * 32 + lane < EXPERTS && end[i] > first[i];
    const u32 some = __ballot_sync(FULL_WARP, hit);
    if (hit) hits[found + __popc(some & ((1u << lane) - 1))] = Hit{i * 32 + lane, first[i], end[i] - first[i]};
    found += __popc(some);
  }
  return found;
}

constexpr int ROUTED = TOKENS * TOP_K;
constexpr int MOST_HITS = ROUTED < EXPERTS ? ROUTED : EXPERTS;

// ---------------------------------------------------------------- gate, up and SwiGLU

#ifdef UP
constexpr int SLICE = WIDTH / WARPS;       // channels that a warp multiplies
constexpr int STAGES = SLICE / STAGE_K;    // of one tile
constexpr int TILES = INNER / 8;           // of one expert: gate and up of eight channels
constexpr int COLUMNS = TOKENS < 8 ? TOKENS : 8;  // rows of x in shared memory
constexpr int X_PITCH = COLUMNS * 4;       // parts between fragments
constexpr int X_SLICE = SLICE * X_BYTES * COLUMNS;
constexpr int BLOCKS_K = SCALED ? SLICE / 128 : 0;
constexpr int BUFFERS = 4;                 // tiles whose sums are under way
constexpr int PARTIAL = TOKENS == 1 ? 16 : 128;  // floats of one warp's

constexpr int X_AT = WARPS * DEPTH * STAGE_BYTES;
constexpr int PARTIAL_AT = X_AT + WARPS * X_SLICE;
constexpr int X_SCALE_AT = PARTIAL_AT + BUFFERS * WARPS * PARTIAL * 4;
constexpr int SQUARES_AT = X_SCALE_AT + WARPS * COLUMNS * BLOCKS_K * 4;
constexpr int BARS_AT = (SQUARES_AT + COLUMNS * WARPS * 4 + 7) / 8 * 8;
constexpr int LIST_AT = BARS_AT + (WARPS * DEPTH + 2 * BUFFERS) * 8;
constexpr int PAIRS_AT = LIST_AT + (TOKENS == 1 ? WARPS * TOP_K * 4 : 4 + MOST_HITS * 12);
static_assert(PAIRS_AT + (TOKENS == 1 ? 0 : ROUTED * 4) == BYTES, "the host and this file disagree");
static_assert(STAGES * STAGE_K * WARPS == WIDTH && BLOCKS_K <= 16, "WIDTH does not suit the slices");

// A tile to make: of which entry of the list of experts, -1 for the shared one.
struct Item {
  int entry, tile;
};

// One block's sum of a tile and 8 columns: who finishes it must know.
struct Turn {
  int entry, tile, eight;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    expert_up(const bf16* __restrict__ x, const bf16* __restrict__ norm_weight, const float* __restrict__ x_scales,
              const int* __restrict__ ids, const int* __restrict__ pairs, const int* __restrict__ starts,
              const u8* __restrict__ gate_up, const u8* __restrict__ scale, bf16* __restrict__ a, int tokens, int pitch,
              float eps) {
  extern __shared__ __align__(1024) u8 memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u64* bars = (u64*)(memory + BARS_AT);
  u64 *full = bars + WARPS * DEPTH, *empty = full + BUFFERS;
  Ring<DEPTH, STAGE_BYTES> ring(memory + warp * DEPTH * STAGE_BYTES, bars + warp * DEPTH);
  uint4* xs = (uint4*)(memory + X_AT + warp * X_SLICE);
  float* block_scales = (float*)(memory + X_SCALE_AT) + warp * COLUMNS * BLOCKS_K;  // [COLUMNS][BLOCKS_K]
  float* squares = (float*)(memory + SQUARES_AT);                                   // [COLUMNS][WARPS]
  int* chosen = (int*)(memory + LIST_AT) + warp * TOP_K;                            // of one token, a copy a warp
  Hit* hits = (Hit*)(memory + LIST_AT + 4);
  int* places = (int*)(memory + PAIRS_AT);
  if (TOKENS == 1) tokens = 1;

  auto expert_of = [&](int entry) { return entry < 0 ? EXPERTS : TOKENS == 1 ? chosen[entry] : hits[entry].expert; };

  // Tiles are numbered, the shared expert's first, for which no id has to be known. A block takes every gridDim.x-th.
  // Rows that had to be prepared are of many tokens: there a block has its share of the shared expert's tiles and then
  // neighbours, so that an expert's rows of x are fetched once for many tiles.
  const int block = blockIdx.x, grid = gridDim.x, own = SHARED && block < TILES ? (TILES - block + grid - 1) / grid : 0;
  int total = SHARED * TILES, first = 0;  // tiles in all (of this block, where it has neighbours), first of those
  auto item = [&](int i) {
    int n = block + i * grid;
    if (PREPARED && i >= own) n = i < total ? SHARED * TILES + first + i - own : -1;
    if (!PREPARED && n >= total) n = -1;
    return Item{n < SHARED * TILES ? -1 : n / TILES - SHARED, n < 0 ? -1 : n % TILES};
  };

  // Asks for the next stage, by lane 0; false where there is none. Runs ahead of the products, over the ends of tiles.
  int next_item = 0, next_stage = 0, asked = 0;
  const u8 *next_words = nullptr, *next_scales = nullptr;
  const u64 policy = evict_first();
  auto ask_next = [&](int slot) {
    if (next_stage == 0) {
      Item one;
      int expert = -1;
      for (;; next_item++) {
        one = item(next_item);
        if (one.tile < 0) return false;
        if ((expert = expert_of(one.entry)) >= 0) break;
      }
      const size_t at = (size_t)expert * TILES + one.tile;
      next_words = gate_up + at * 16 * ROW_BYTES(WIDTH) + warp * STAGES * STAGE * PIECE;
      if (FORMAT == INT4) next_scales = scale + (at * (WIDTH / GROUP) + warp * STAGES * STAGE_GROUPS) * 32;
    }
    ask(ring.stages + slot * STAGE_BYTES, next_words, next_scales, ring.bars + slot, policy);
    next_words += STAGE * PIECE, next_scales += SCALE_BYTES;
    if (++next_stage == STAGES) next_stage = 0, next_item++;
    return true;
  };
  auto fill = [&]() {
    if (lane == 0)
      while (asked < DEPTH && ask_next(asked)) asked++;
    __syncwarp();
  };
  // FP8: of a tile, the scales of gate's blocks in lanes 0 to 15 and of up's in the others.
  auto tile_scales = [&](int i) -> float {
    if (FORMAT != FP8) return 0;
    const Item one = item(i);
    const int expert = one.tile < 0 ? -1 : expert_of(one.entry);
    if (expert < 0 || lane % 16 >= BLOCKS_K) return 0;
    const size_t row = ((size_t)expert * 2 + lane / 16) * (INNER / 128) + one.tile * 8 / 128;
    return load_early((const float*)scale + row * (WIDTH / 128) + warp * BLOCKS_K + lane % 16);
  };

  if (lane == 0) ring.init();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < BUFFERS; i++) barrier_init(full + i, WARPS), barrier_init(empty + i, 1);
  }
  __syncwarp();
  float soon = 0;
  constexpr int EACH = (SLICE / 16 + 31) / 32;  // chunks of a lane
  Raw norm[EACH], row[EACH];
  if (!PREPARED) {
    fill();
    soon = tile_scales(0);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      norm[i] = load_chunk(norm_weight + warp * SLICE, lane + i * 32, lane + i * 32 < SLICE / 16);
    __syncthreads();  // the barriers of the sums
    wait_dependencies();
    launch_dependents();
  }

  if (TOKENS == 1) {
    // A store would await its load, so x is asked for before the ids are stored.
    const int id = lane < TOP_K ? load_fresh(ids + lane) : 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) row[i] = load_chunk(x + warp * SLICE, lane + i * 32, lane + i * 32 < SLICE / 16);
    if (lane < TOP_K) chosen[lane] = id;
    __syncwarp();
    total = SLOTS * TILES;
  } else {
    int* found = (int*)(memory + LIST_AT);
    if (warp == 0) {
      const int n = list_hits(hits, starts, lane);
      if (lane == 0) *found = n;
    }
    for (int i = threadIdx.x; i < tokens * TOP_K; i += WARPS * 32) places[i] = load_fresh(pairs + i);
    __syncthreads();
    const int routed = *found * TILES;
    total = SHARED * TILES + routed;
    if (PREPARED) first = (int)((i64)routed * block / grid), total = own + (int)((i64)routed * (block + 1) / grid) - first;
  }
  fill();
  if (PREPARED || own == 0) soon = tile_scales(0);
  if (PREPARED) {
    wait_dependencies();
    launch_dependents();
  } else {
    // The warp's own slice of x, normed but for the root, as the format multiplies it.
    for (int token = 0; token < tokens; token++) {
      float square = 0;
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int chunk = lane + i * 32;
        const bool live = chunk < SLICE / 16;
        if (TOKENS > 1) row[i] = load_chunk(x + (i64)token * pitch + warp * SLICE, chunk, live);
        float v[16], w[16];
        unpack(row[i], v), unpack(norm[i], w);
#pragma unroll
        for (int j = 0; j < 16; j++) square += v[j] * v[j], v[j] *= w[j];
        Chunk made;
        const float s = INTEGER ? store_integers((u8*)xs, chunk, v, live) : round_chunk<false>(v, made);
        if (live) {
#pragma unroll
          for (int h = 0; h < X_BYTES && !INTEGER; h++) xs[place_of(chunk * X_BYTES + h, X_PITCH) + token * 4] = made.part[h];
          if (SCALED && chunk % 8 == 0) block_scales[token * BLOCKS_K + chunk / 8] = s;
        }
      }
      square = warp_sum(square);
      if (lane == 0) squares[token * WARPS + warp] = square;
    }
    __syncwarp();
  }
  if (TOKENS > 1) {
    // Rows of a that no expert makes.
    for (int i = blockIdx.x; i < tokens * TOP_K; i += gridDim.x)
      if (load_fresh(ids + i) < 0)
        for (int j = threadIdx.x; j < INNER / 8; j += WARPS * 32)
          ((uint4*)(a + ((i64)(i / TOP_K) * SLOTS + i % TOP_K) * INNER))[j] = uint4{0, 0, 0, 0};
  }

  // Of an entry of the list: its columns, which tokens they are, and their rows of a.
  auto columns_of = [&](int entry) { return entry < 0 || TOKENS == 1 ? tokens : hits[entry].count; };
  auto token_of = [&](int entry, int c) {
    return TOKENS == 1 ? 0 : entry < 0 ? c : places[hits[entry].first + c] / TOP_K;
  };
  auto row_of = [&](int entry, int c) {
    if (TOKENS == 1) return entry < 0 ? TOP_K : entry;
    const int p = entry < 0 ? 0 : places[hits[entry].first + c];
    return entry < 0 ? c * SLOTS + TOP_K : p / TOP_K * SLOTS + p % TOP_K;
  };

  // Warp. Adds up the warps' sums of a turn and stores the results.
  float* partial = (float*)(memory + PARTIAL_AT);
  auto finish = [&](int n, Turn turn) {
    const int buffer = n % BUFFERS;
    const float* sums = partial + buffer * WARPS * PARTIAL;
    barrier_wait(full + buffer, n / BUFFERS & 1);
    auto root_of = [&](int token) {
      if (PREPARED) return 1.0f;
      float square = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) square += squares[token * WARPS + w];
      return rsqrtf(square * (1.0f / WIDTH) + eps);
    };
    if (TOKENS == 1) {
      float v = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w += 2)
        if (w + lane / 16 < WARPS) v += sums[(w + lane / 16) * PARTIAL + lane % 16];
      v = (v + __shfl_xor_sync(FULL_WARP, v, 16)) * root_of(0);
      const float up = __shfl_down_sync(FULL_WARP, v, 8);
      if (lane < 8) a[row_of(turn.entry, 0) * INNER + turn.tile * 8 + lane] = to_bf16(silu(v) * up);
    } else {
      float v[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float4 one = *(const float4*)(sums + w * PARTIAL + lane * 4);
        v[0] += one.x, v[1] += one.y, v[2] += one.z, v[3] += one.w;
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int c = turn.eight * 8 + 2 * t + j;
        if (c < columns_of(turn.entry)) {
          const float r = root_of(token_of(turn.entry, c));
          a[(i64)row_of(turn.entry, c) * INNER + turn.tile * 8 + g] = to_bf16(silu(v[j] * r) * (v[2 + j] * r));
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + buffer);
  };

  int turns = 0, held = -2;
  Turn before;
  for (int i = 0;; i++) {
    const Item one = item(i);
    const int entry = one.entry, tile = one.tile;
    if (tile < 0) break;
    const int expert = expert_of(entry), columns = columns_of(entry), last = columns - 1;
    const float scales = soon;
    soon = tile_scales(i + 1);
    if (PREPARED && entry != held) {
      // x of the first eight columns; of an expert that more tokens chose, the others are read where they are.
      held = entry;
      __syncwarp();
      const uint4* from[8];
      float column_scales[8];
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const i64 token = c < columns ? token_of(entry, c) : 0;
        from[c] = (const uint4*)((const u8*)x + (token * WIDTH + warp * SLICE) * X_BYTES);
        column_scales[c] = c < columns && lane < BLOCKS_K ? load_fresh(x_scales + token * (WIDTH / 128) + warp * BLOCKS_K + lane) : 0;
      }
      for (int n = lane; n < SLICE * X_BYTES / 16; n += 32) {
        uint4 part[8];
#pragma unroll
        for (int c = 0; c < 8; c++) part[c] = c < columns ? load_fresh(from[c] + n) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (c < columns) xs[place_of(n, X_PITCH) + c * 4] = part[c];
      }
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (c < columns && lane < BLOCKS_K) block_scales[c * BLOCKS_K + lane] = column_scales[c];
      __syncwarp();
    }
    // Columns past the last repeat it; nobody reads their sums.
    auto column = [&](int c) { return PREPARED ? min(c, last) : token_of(entry, min(c, last)); };
    const uint4* x_at = xs + (INTEGER ? g % 2 : column(g)) * 4 + t;
    const float *scale0 = block_scales + column(2 * t) * BLOCKS_K, *scale1 = block_scales + column(2 * t + 1) * BLOCKS_K;
    float acc[EIGHTS][4] = {};
    if (expert >= 0) {
#pragma unroll 1
      for (int s = 0; s < STAGES; s++) {
        Words w;
        ring.release(read_stage(w, ring.front(), lane));
        if (lane == 0) ask_next(ring.slot);
        ring.pop();
        multiply(
            acc[0], w, [&](int p, int f) { return x_at[((s * STAGE + p) * FRAGMENTS + f * (FRAGMENTS / PARTS)) * X_PITCH]; },
            [&](int b, float(&to)[4]) {
              const int k = s * STAGE_BLOCKS + b;
              if (INTEGER) {
                to[0] = block_scales[k];
                return;
              }
              const float gate = __shfl_sync(FULL_WARP, scales, k), up = __shfl_sync(FULL_WARP, scales, 16 + k);
              const float v0 = scale0[k], v1 = TOKENS == 1 ? 0 : scale1[k];
              to[0] = gate * v0, to[1] = gate * v1, to[2] = up * v0, to[3] = up * v1;
            });
#pragma unroll
        for (int q = 1; q < EIGHTS; q++) {
          if (q * 8 >= columns) break;
          const u8* far = (const u8*)x + ((i64)token_of(entry, min(q * 8 + g, last)) * WIDTH + warp * SLICE) * X_BYTES;
          const float* far0 = x_scales + token_of(entry, min(q * 8 + 2 * t, last)) * (WIDTH / 128) + warp * BLOCKS_K;
          const float* far1 = x_scales + token_of(entry, min(q * 8 + 2 * t + 1, last)) * (WIDTH / 128) + warp * BLOCKS_K;
          multiply(
              acc[q], w,
              [&](int p, int f) {
                return load_fresh((const uint4*)far + (s * STAGE + p) * FRAGMENTS * 4 + part_of(f, t));
              },
              [&](int b, float(&to)[4]) {
                const int k = s * STAGE_BLOCKS + b;
                const float gate = __shfl_sync(FULL_WARP, scales, k), up = __shfl_sync(FULL_WARP, scales, 16 + k);
                const float v0 = load_fresh(far0 + k), v1 = load_fresh(far1 + k);
                to[0] = gate * v0, to[1] = gate * v1, to[2] = up * v0, to[3] = up * v1;
              });
        }
      }
    }
    // Slices meet in shared memory; warps take turns at adding them up, one turn behind, so that no one waits.
#pragma unroll
    for (int q = 0; q < EIGHTS; q++) {
      if (q * 8 >= columns) break;
      const int buffer = turns % BUFFERS;
      if (turns >= BUFFERS) barrier_wait(empty + buffer, (turns / BUFFERS - 1) & 1);
      float* mine = partial + (buffer * WARPS + warp) * PARTIAL;
      if (TOKENS > 1) {
        *(float4*)(mine + lane * 4) = float4{acc[q][0], acc[q][1], acc[q][2], acc[q][3]};
      } else if (t == 0) {
        mine[g] = acc[q][0], mine[g + 8] = acc[q][2];
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(full + buffer);
      if (turns > 0 && (turns - 1) % WARPS == warp) finish(turns - 1, before);
      before = Turn{entry, tile, q};
      turns++;
    }
  }
  if (turns > 0 && (turns - 1) % WARPS == warp) finish(turns - 1, before);
}
#endif  // UP

// ---------------------------------------------------------------- down, weighted sum and residual

#ifdef DOWN
constexpr int SLICE = INNER / WARPS;
constexpr int STAGES = SLICE / STAGE_K;  // of one tile of one expert
constexpr int TILES = WIDTH / 16;
constexpr int BLOCKS_K = FORMAT == FP8 ? SLICE / 128 : 0;
constexpr bool OWN = TOKENS == 1 || (FORMAT == FP8 && !PREPARED);  // whether a's slices come to shared memory
constexpr int OWN_ROWS = OWN ? TOKENS * SLOTS : 0;
constexpr int ROW_PARTS = SLICE * X_BYTES / 16;
constexpr int LISTED = TOKENS == 1 ? SLOTS : MOST_HITS + SHARED;
constexpr int PLACES = TOKENS * SLOTS;

constexpr int X_AT = WARPS * DEPTH * STAGE_BYTES;
constexpr int SUM_AT = X_AT + WARPS * OWN_ROWS * SLICE * X_BYTES;
constexpr int BARS_AT = SUM_AT + WARPS * TOKENS * 16 * 4;
constexpr int A_SCALE_AT = BARS_AT + WARPS * DEPTH * 8;
constexpr int ROW_SCALE_AT = A_SCALE_AT + WARPS * OWN_ROWS * BLOCKS_K * 4;
constexpr int LIST_AT = ROW_SCALE_AT + WARPS * LISTED * BLOCKS_K * 4;
constexpr int ROW_AT = LIST_AT + 4 + LISTED * 12;
constexpr int SHARE_AT = ROW_AT + PLACES * 4;
static_assert(SHARE_AT + PLACES * 4 == BYTES, "the host and this file disagree");
static_assert(STAGES * STAGE_K * WARPS == INNER, "INNER does not suit the slices");

// A part of a row in shared memory. Rows lie a multiple of 128 bytes apart, or one is all there is to read at a time.
DEVICE int own_at(int row, int part) { return row * ROW_PARTS + (ROW_PARTS % 8 ? part : part ^ (row & 1) * 4); }

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    expert_down(const bf16* __restrict__ a, const float* __restrict__ a_scales, const int* __restrict__ ids,
                const float* __restrict__ weights, const int* __restrict__ pairs, const int* __restrict__ starts,
                const u8* __restrict__ down, const u8* __restrict__ scale, const bf16* __restrict__ residual,
                bf16* __restrict__ y, int tokens) {
  extern __shared__ __align__(1024) u8 memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, tile = blockIdx.x;
  Ring<DEPTH, STAGE_BYTES> ring(memory + warp * DEPTH * STAGE_BYTES, (u64*)(memory + BARS_AT) + warp * DEPTH);
  uint4* xs = (uint4*)(memory + X_AT) + warp * OWN_ROWS * ROW_PARTS;
  float* block_scales = (float*)(memory + A_SCALE_AT) + warp * OWN_ROWS * BLOCKS_K;
  float* row_scales = (float*)(memory + ROW_SCALE_AT) + warp * LISTED * BLOCKS_K;
  float* sums = (float*)(memory + SUM_AT);       // [WARPS][TOKENS][16]
  Hit* hits = (Hit*)(memory + LIST_AT + 4);
  int* rows = (int*)(memory + ROW_AT);           // row of a at each place of the lists
  float* shares = (float*)(memory + SHARE_AT);   // and what it is weighted by
  if (TOKENS == 1) tokens = 1;

  launch_dependents();
  if (lane == 0) ring.init();
  // The experts to walk: one token's in the order of its slots, several tokens' by rising id, the shared one last.
  int count = SLOTS;
  if (TOKENS == 1) {
    for (int i = threadIdx.x; i < SLOTS; i += WARPS * 32) {
      hits[i] = Hit{i < TOP_K ? load_fresh(ids + i) : EXPERTS, i, 1};
      rows[i] = i, shares[i] = i < TOP_K ? load_fresh(weights + i) : 1.0f;
    }
    __syncthreads();
  } else {
    int* found = (int*)(memory + LIST_AT);
    if (warp == 0) {
      const int n = list_hits(hits, starts, lane);
      if (SHARED && lane == 0) hits[n] = Hit{EXPERTS, tokens * TOP_K, tokens};
      if (lane == 0) *found = n + SHARED;
    }
    for (int i = threadIdx.x; i < tokens * SLOTS; i += WARPS * 32) {
      const bool routed = i < tokens * TOP_K;
      const int p = routed ? load_fresh(pairs + i) : 0, shared = i - tokens * TOP_K;
      rows[i] = routed ? p / TOP_K * SLOTS + p % TOP_K : shared * SLOTS + TOP_K;
      shares[i] = routed ? load_fresh(weights + p) : 1.0f;
    }
    for (int i = threadIdx.x; i < WARPS * TOKENS * 16; i += WARPS * 32) sums[i] = 0;
    __syncthreads();
    count = *found;
  }

  int next_entry = 0, next_stage = 0, asked = 0;
  const u8 *next_words = nullptr, *next_scales = nullptr;
  const u64 policy = evict_first();
  auto ask_next = [&](int slot) {  // by lane 0; false where there is none
    if (next_stage == 0) {
      while (next_entry < count && hits[next_entry].expert < 0) next_entry++;
      if (next_entry >= count) return false;
      const size_t at = (size_t)hits[next_entry].expert * TILES + tile;
      next_words = down + at * 16 * ROW_BYTES(INNER) + warp * STAGES * STAGE * PIECE;
      if (FORMAT == INT4) next_scales = scale + (at * (INNER / GROUP) + warp * STAGES * STAGE_GROUPS) * 32;
    }
    ask(ring.stages + slot * STAGE_BYTES, next_words, next_scales, ring.bars + slot, policy);
    next_words += STAGE * PIECE, next_scales += SCALE_BYTES;
    if (++next_stage == STAGES) next_stage = 0, next_entry++;
    return true;
  };
  if (lane == 0)
    while (asked < DEPTH && ask_next(asked)) asked++;
  // Scales of the blocks that the tile lies in; held in registers, since a store would await them before the wait.
  constexpr int SCALES = (LISTED * BLOCKS_K + 31) / 32;
  float found_scales[SCALES + 1];
#pragma unroll
  for (int j = 0; j < SCALES; j++) {
    const int i = lane + j * 32, expert = i < count * BLOCKS_K ? hits[i / BLOCKS_K].expert : -1;
    const size_t row = (size_t)max(expert, 0) * ((WIDTH + 127) / 128) + tile * 16 / 128;
    const float* from = (const float*)scale + row * (INNER / 128) + warp * BLOCKS_K + i % BLOCKS_K;
    found_scales[j] = expert < 0 ? 0 : load_early(from);
  }
  wait_dependencies();

  // The warp's own slice of every row, as the format multiplies it. Three loads are in flight before one is awaited.
  constexpr int AHEAD_OF_USE = 3;
  const int chunks = tokens * SLOTS * (SLICE / 16);
  auto load_own = [&](int n) {
    return load_chunk(a + (i64)(n / (SLICE / 16)) * INNER + warp * SLICE, n % (SLICE / 16), n < chunks);
  };
  Raw raw[AHEAD_OF_USE];
  if (OWN) {
#pragma unroll
    for (int j = 0; j < AHEAD_OF_USE; j++) raw[j] = load_own(j * 32 + lane);
  }
  // Results of this thread, and what they are added to.
  constexpr int EACH = (16 * TOKENS + WARPS * 32 - 1) / (WARPS * 32);
  bf16 base[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int n = threadIdx.x + i * WARPS * 32;
    base[i] = n < 16 * tokens ? load_fresh(residual + (i64)(n / 16) * WIDTH + tile * 16 + n % 16) : 0;
  }
#pragma unroll
  for (int j = 0; j < SCALES; j++)
    if (lane + j * 32 < LISTED * BLOCKS_K) row_scales[lane + j * 32] = found_scales[j];
  if (OWN) {
    for (int from = 0; from < chunks; from += AHEAD_OF_USE * 32) {
#pragma unroll
      for (int j = 0; j < AHEAD_OF_USE; j++) {
        const int n = from + j * 32 + lane, own = n / (SLICE / 16), chunk = n % (SLICE / 16);
        float v[16];
        unpack(raw[j], v);
        Chunk made;
        const float s = round_chunk(v, made);
        if (n < chunks) {
#pragma unroll
          for (int h = 0; h < X_BYTES; h++) xs[own_at(own, place_of(chunk * X_BYTES + h, 4))] = made.part[h];
          if (FORMAT == FP8 && chunk % 8 == 0) block_scales[own * BLOCKS_K + chunk / 8] = s;
        }
      }
#pragma unroll
      for (int j = 0; j < AHEAD_OF_USE; j++) raw[j] = load_own(from + (AHEAD_OF_USE + j) * 32 + lane);
    }
  }
  __syncwarp();

  // What eight columns of an entry multiply a stage with. Rows that are not in shared memory are fetched a stage ahead.
  struct Near {
    uint4 x[STAGE * FRAGMENTS];
    float scale[2 * STAGE_BLOCKS + 1];
  };
  auto fetch = [&](Near& to, const Hit& hit, int q, int s) {
    const int last = hit.count - 1;
    auto row_of = [&](int c) { return TOKENS == 1 ? hit.first : rows[hit.first + min(q * 8 + c, last)]; };
    const int mine = row_of(g);
    const uint4* from = (const uint4*)((const u8*)a + ((i64)mine * INNER + warp * SLICE) * X_BYTES);
#pragma unroll
    for (int f = 0; f < STAGE * FRAGMENTS; f++) {
      const int n = s * STAGE * FRAGMENTS + f;
      to.x[f] = OWN ? xs[own_at(mine, n * 4 + t)] : load_fresh(from + n / FRAGMENTS * FRAGMENTS * 4 + part_of(n % FRAGMENTS, t));
    }
#pragma unroll
    for (int b = 0; b < STAGE_BLOCKS && FORMAT == FP8; b++) {
      const int k = s * STAGE_BLOCKS + b;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const i64 r = row_of(2 * t + j);
        if (TOKENS == 1 && j) to.scale[2 * b + 1] = 0;
        else to.scale[2 * b + j] = OWN ? block_scales[r * BLOCKS_K + k] : load_fresh(a_scales + r * (INNER / 128) + warp * BLOCKS_K + k);
      }
    }
  };

  float acc[4] = {};
  Near near;
  int entry = 0, stage = 0;  // of what is near
  auto skip = [&]() {
    while (entry < count && hits[entry].expert < 0) entry++;
  };
  skip();
  if (!OWN && entry < count) fetch(near, hits[entry], 0, 0);
  for (int i = 0; i < count; i++) {
    const Hit hit = hits[i];
    if (hit.expert < 0) continue;
    float part[EIGHTS][4] = {};
#pragma unroll 1
    for (int s = 0; s < STAGES; s++) {
      Near now = near;
      if (OWN) {
        fetch(now, hit, 0, s);
      } else {
        if (++stage == STAGES) stage = 0, entry++, skip();
        if (entry < count) fetch(near, hits[entry], 0, stage);
      }
      Words w;
      ring.release(read_stage(w, ring.front(), lane));
      if (lane == 0) ask_next(ring.slot);
      ring.pop();
#pragma unroll
      for (int q = 0; q < EIGHTS; q++) {
        if (q * 8 >= hit.count) break;
        if (q > 0) fetch(now, hit, q, s);
        multiply(
            part[q], w, [&](int p, int f) { return now.x[p * FRAGMENTS + f]; },
            [&](int b, float(&to)[4]) {
              const float f = row_scales[i * BLOCKS_K + s * STAGE_BLOCKS + b];
              to[0] = to[2] = f * now.scale[2 * b], to[1] = to[3] = f * now.scale[2 * b + 1];
            });
      }
    }
    if (TOKENS == 1) {
      acc[0] += shares[i] * part[0][0], acc[2] += shares[i] * part[0][2];
    } else {
      // A warp's sums of all tokens are in shared memory: which of them an expert adds to is known only now.
#pragma unroll
      for (int q = 0; q < EIGHTS; q++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int c = q * 8 + 2 * t + j;
          if (c < hit.count) {
            float* to = sums + (warp * TOKENS + rows[hit.first + c] / SLOTS) * 16 + g;
            const float share = shares[hit.first + c];
            to[0] += share * part[q][j], to[8] += share * part[q][2 + j];
          }
        }
      }
      __syncwarp();
    }
  }
  if (TOKENS == 1 && t == 0) sums[warp * 16 + g] = acc[0], sums[warp * 16 + g + 8] = acc[2];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int n = threadIdx.x + i * WARPS * 32;
    if (n >= 16 * tokens) break;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w * TOKENS * 16 + n];
    y[(i64)(n / 16) * WIDTH + tile * 16 + n % 16] = to_bf16(from_bf16(base[i]) + sum);
  }
}
#endif  // DOWN
#endif  // not ROW
