// y = x W^T for many tokens, dense or grouped by expert, on warpgroup products (sm_90a).
//
// One block computes tiles of ROWS x COLS: GROUPS warpgroups multiply, one moves operands through a ring of stages
// of 128 bytes of K. Weights come as they are packed (`tiled`, `tiled_gated`), tokens as prep.cu leaves them:
//
//   codes   [K bytes / 64][padded][64 bytes]   panels; a row's 16-byte quarter c at c ^ (row / 2 % 4)
//   scales  f32 [K / 128][padded], FP8; [padded], INT4
//
// so that every copy is a run of bytes and every 8 rows x 64 bytes are an atom of the tensor cores.
// In FP8 the products of 128 channels are added up by the tensor cores and promoted to f32 sums with the scales
// of both sides. Where tokens are rows, a tile begins with the first slot of the ring, so that the loop over stages knows
// its slots: what products take as operands costs next to nothing then. Three warpgroups with 64 rows each have more on
// their way than two with 128, each of which waits for its products and adds them up by itself. INT4 weights become F16 in the registers of the warpgroup that multiplies them, with their scales:
// a number of 3 bits times one of 8 is exact there (`int4_to_f16`). Tokens are F16 as well then, each row shifted by a
// power of two that prep.cu chose, which the sums are multiplied by at the end.
// Grouped, tiles come from a list on the device, which route.cu made of the experts' pairs, and blocks take the next one
// when they are ready for it. The thread that copies finds tiles; it leaves a note about each with its first stage.
//
// Constants:
//   FORMAT   0 BF16; 1 FP8; 2 INT4, with GROUP channels a scale (32, 64 or 128), SWAP and 256 bytes of tokens a stage
//   SWAP     0: tokens are the rows of a tile and weights its columns; 1: the other way round
//   GROUPS   warpgroups that multiply: 2, or 3 where tokens are rows
//   WAVES    rows of a warpgroup are WAVES x 64
//   COLS     columns of a tile; with SWAP the most, a tile takes as many as it has tokens
//   STAGES   of the ring
//   GATED    1: weights are tiled_gated, y = silu(gate) * up
//   RESIDUAL 1: added before y is rounded
//   F32      1: y is f32, not BF16
//   GROUPED  1: tiles and rows of y from the lists of route.cu
//   BLANKS   1: K is no multiple of a round of stages, and a tile's last round has stages without operands (FP8, SWAP 0)
//   BAND     token blocks that are walked through together, so that weights and tokens stay in L2
#include "wgmma.cuh"

#define ROWS (WAVES * GROUPS * 64)
#define WEIGHT_ROWS (SWAP ? ROWS : COLS)
#define TOKEN_ROWS (SWAP ? COLS : ROWS)
#define WEIGHT_STAGE (WEIGHT_ROWS * (FORMAT == 2 ? 64 : 128))
#define TOKEN_STAGE (TOKEN_ROWS * (FORMAT == 2 ? 256 : 128))
#define TILE_SCALES (4096 / GROUP)  // bytes of the INT4 scales of 16 rows in a stage
#define SCALE_STAGE (FORMAT == 1 ? TOKEN_ROWS * 4 : FORMAT == 2 ? WEIGHT_ROWS / 16 * TILE_SCALES : 0)
#define STAGING 8192  // bytes of a warpgroup, to turn fragments into rows
#define CONSUMERS (GROUPS * 128)
#define ROUNDS (FORMAT == 1 && !SWAP)  // a tile begins with the first slot
#define SECOND (SWAP && WAVES == 2 && !GATED)  // warpgroups have FP8 scales of their own

struct Arguments {
  const u8* weight;
  const float* weight_scale;
  const u8* codes;
  const float* scales;
  const bf16* residual;
  u8* y;
  int* work;
  const int* rows;
  int tokens, padded, outputs, width;
};

struct Tile {
  int weight_row, token_row;  // where it begins
  int tokens;                 // how many of its token rows are wanted
  int expert;
};

// Tiles are numbered in bands of token blocks.
struct Tiles {
  int count, weight_blocks, token_blocks;

  DEVICE Tiles(const Arguments& a) {
    weight_blocks = (a.outputs + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    token_blocks = GROUPED ? load_fresh(a.work) : (a.tokens + TOKEN_ROWS - 1) / TOKEN_ROWS;
    count = weight_blocks * token_blocks;
  }

  DEVICE Tile at(const Arguments& a, int index) const {
    Tile tile;
    if (GROUPED) {
      // Entries of one expert lie together; all of them pass before the next weights.
      const uint4* entry = (const uint4*)(a.work + 8 + index / weight_blocks * 8);
      const uint4 of = load_fresh(entry), way = load_fresh(entry + 1);
      const int each = of.w, first = way.x, entries = way.y, rest = index - first * weight_blocks;
      const int mine = rest % entries * each;
      tile.expert = of.x, tile.token_row = of.y + mine, tile.tokens = min(each, (int)of.z - mine);
      tile.weight_row = rest / entries * WEIGHT_ROWS;
    } else {
      const int band = index / (BAND * weight_blocks), rest = index - band * (BAND * weight_blocks);
      const int height = min(BAND, token_blocks - band * BAND);
      tile.expert = 0;
      tile.token_row = (band * BAND + rest % height) * TOKEN_ROWS;
      tile.tokens = min(TOKEN_ROWS, a.tokens - tile.token_row);
      tile.weight_row = rest / height * WEIGHT_ROWS;
    }
    return tile;
  }
};

// Token rows that a tile's copies and products cover: those of the warps, or the columns, that suffice.
DEVICE int covered(const Tile& tile) {
  if (!SWAP) return (tile.tokens + 63) / 64 * 64;
  return tile.tokens <= 16 ? 16 : (tile.tokens + 31) / 32 * 32;
}

// First of the 64 rows of a tile that a warpgroup has in one wave. Weights: a run of its own, which shares scales.
// Tokens: in turns, so that a tile with few of them keeps all warpgroups busy.
DEVICE int first_row(int group, int w) { return (SWAP ? group * WAVES + w : w * GROUPS + group) * 64; }

struct Ring {
  int slot = 0;
  u32 phase = 0;
  DEVICE void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// What the warpgroups are told with a stage.
struct __align__(16) Note {
  int weight_row, token_row, tokens;  // of the tile that begins; no tokens: there are no more
  int blank;
  float scales[2];  // FP8: of gate and up; or of our weights, or of the first and of the second warpgroup's
  int blanks[2];
};

struct Shared {
  u8 *weights, *tokens, *staging;
  u8* scales;
  Note* notes;
  u64 *full, *empty;

  DEVICE Shared(u8* base) {
    weights = base;
    tokens = weights + STAGES * WEIGHT_STAGE;
    staging = tokens + STAGES * TOKEN_STAGE;
    scales = staging + GROUPS * STAGING;
    notes = (Note*)(scales + STAGES * SCALE_STAGE);
    full = (u64*)(notes + STAGES);
    empty = full + STAGES;
  }
};

// ---------------------------------------------------------------- copies

// One thread copies. Every address is the same in all threads of its warp, so that the compiler keeps them in uniform
// registers, where copies want them.
DEVICE void produce(const Arguments& a, const Tiles& tiles, const Shared& s) {
  constexpr int PIECES = FORMAT == 2 ? 1 : 2, PANELS = FORMAT == 2 ? 4 : 2;
  const int blocks = a.width / (FORMAT ? 128 : 64), pieces = blocks * PIECES;
  const i64 panel = (i64)a.padded * 64;
  const u32 weights = shared_address(s.weights), tokens = shared_address(s.tokens);
  const u32 all_scales = shared_address(s.scales), full0 = shared_address(s.full);
  Ring ring;
  int next;
  for (int index = blockIdx.x; index < tiles.count; index = next) {
    next = GROUPED ? gridDim.x + atomicAdd(a.work + 1, 1) : index + gridDim.x;
    const Tile tile = tiles.at(a, index);
    const int wanted = min(WEIGHT_ROWS, a.outputs - tile.weight_row) / 16;  // tiles of 16 weight rows
    const int rows = covered(tile);
    const u32 bytes = wanted * (PIECES * 1024 + (FORMAT == 2 ? TILE_SCALES : 0)) + rows * (PANELS * 64 + (FORMAT == 1 ? 4 : 0));
    const i64 first = (i64)tile.expert * (a.outputs / 16) + tile.weight_row / 16;
    const u8* weight = a.weight + first * pieces * 1024;
    const u8* weight_scale = (const u8*)a.weight_scale + first * blocks * TILE_SCALES;
    const u8* codes = a.codes + (i64)tile.token_row * 64;
    const float* scales = a.scales + tile.token_row;
    // Scale blocks of the weights: gate and up of a gated matrix have blocks of their own.
    const float *low = a.weight_scale, *high = nullptr;
    float low_next = 0, high_next = 0;
    if (FORMAT == 1) {
      const int across = (a.outputs + 127) / 128, at = (GATED ? tile.weight_row / 2 : tile.weight_row) / 128;
      low += ((i64)tile.expert * across + at) * blocks;
      high = low + (i64)(GATED ? across / 2 : SECOND && at + 1 < across ? 1 : 0) * blocks;
      low_next = __ldg(low), high_next = __ldg(high);
    }
    for (int block = 0; block < blocks; block++) {
      const u32 full = full0 + ring.slot * 8;
      barrier_wait(s.empty + ring.slot, ring.phase ^ 1);
      Note* note = s.notes + ring.slot;
      if (block == 0) note->weight_row = tile.weight_row, note->token_row = tile.token_row, note->tokens = tile.tokens;
      if (FORMAT == 1) {
        *(float2*)note->scales = float2{low_next, high_next};
        if (block + 1 < blocks) low_next = __ldg(low + block + 1), high_next = __ldg(high + block + 1);
      }
      barrier_expect(s.full + ring.slot, bytes);
      u32 to = weights + ring.slot * WEIGHT_STAGE, scales_to = all_scales + ring.slot * SCALE_STAGE;
      const u8 *from = weight, *scale_from = weight_scale;
#pragma unroll 4
      for (int i = 0; i < wanted; i++) {
        bulk_load_at(to, from, 1024, full);
        if (PIECES == 2) bulk_load_at(to + WEIGHT_ROWS * 64, from + 1024, 1024, full);
        to += 1024, from += (i64)pieces * 1024;
        if (FORMAT == 2) {
          bulk_load_at(scales_to, scale_from, TILE_SCALES, full);
          scales_to += TILE_SCALES, scale_from += (i64)blocks * TILE_SCALES;
        }
      }
      weight += PIECES * 1024, weight_scale += TILE_SCALES;
      const u32 into = tokens + ring.slot * TOKEN_STAGE;
#pragma unroll
      for (int i = 0; i < PANELS; i++) bulk_load_at(into + i * TOKEN_ROWS * 64, codes + i * panel, rows * 64, full);
      if (FORMAT == 1) bulk_load_at(all_scales + ring.slot * SCALE_STAGE, scales, rows * 4, full);
      codes += PANELS * panel, scales += a.padded;
      ring.next();
    }
    while (ROUNDS && BLANKS && ring.slot > 0) {
      barrier_wait(s.empty + ring.slot, ring.phase ^ 1);
      barrier_arrive(s.full + ring.slot);
      ring.next();
    }
  }
  barrier_wait(s.empty + ring.slot, ring.phase ^ 1);
  s.notes[ring.slot].tokens = 0;
  barrier_arrive(s.full + ring.slot);
}

// ---------------------------------------------------------------- products

// Our warpgroup's rows of one tile, all of K: sum[w][4 j + i] as `Wgmma` says, j over N / 8 columns.
#if ROUNDS
template <int N>
DEVICE void multiply(const Arguments& a, const Tile& tile, const Shared& s, Ring& ring, float (&sum)[WAVES][N / 2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4;
  const int group = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0), blocks = a.width / 128;
  const u32 row_base = (u32)operand_at(shared_address(s.tokens)) + group * (64 * 64 >> 4);
  const u32 column_base = (u32)operand_at(shared_address(s.weights));
  const float* of_token = (const float*)s.scales + group * 64 + warp * 16 + g;
  const int waves = (tile.tokens - group * 64 + GROUPS * 64 - 1) / (GROUPS * 64);  // of ours that have a token
  auto release = [&](int slot) {
    __syncwarp();  // all lanes have read their scales
    if (lane == 0) barrier_arrive(s.empty + slot);
  };
  for (int block = 0; block < blocks; block += STAGES) {
#pragma unroll
    for (int slot = 0; slot < STAGES; slot++) {
      barrier_wait(s.full + slot, ring.phase);
      if (BLANKS && block + slot >= blocks) {
        release(slot);
        continue;
      }
      const float2 of_weight = *(const float2*)s.notes[slot].scales;
      float of_rows[WAVES][2];
#pragma unroll
      for (int w = 0; w < WAVES; w++) {
        of_rows[w][0] = of_token[slot * (SCALE_STAGE / 4) + w * GROUPS * 64];
        of_rows[w][1] = of_token[slot * (SCALE_STAGE / 4) + w * GROUPS * 64 + 8];
      }
#pragma unroll
      for (int w = 0; w < WAVES; w++) {
        if (w >= waves) {
          if (w == WAVES - 1) release(slot);
          continue;
        }
        float part[N / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const u32 row = slot * (TOKEN_STAGE >> 4) + k / 2 * (ROWS * 64 >> 4) + w * GROUPS * (64 * 64 >> 4) + k % 2 * 2;
          const u32 column = slot * (WEIGHT_STAGE >> 4) + k / 2 * (COLS * 64 >> 4) + k % 2 * 2;
          Wgmma<N>::e4m3(part, descriptor(row_base + row), descriptor(column_base + column), k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (w == WAVES - 1) release(slot);
        const float gate0 = of_rows[w][0] * of_weight.x, gate1 = of_rows[w][1] * of_weight.x;
        const float up0 = of_rows[w][0] * of_weight.y, up1 = of_rows[w][1] * of_weight.y;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          const float f0 = GATED && j % 2 ? up0 : gate0, f1 = GATED && j % 2 ? up1 : gate1;
          sum[w][4 * j] = fmaf(part[4 * j], f0, sum[w][4 * j]);
          sum[w][4 * j + 1] = fmaf(part[4 * j + 1], f0, sum[w][4 * j + 1]);
          sum[w][4 * j + 2] = fmaf(part[4 * j + 2], f1, sum[w][4 * j + 2]);
          sum[w][4 * j + 3] = fmaf(part[4 * j + 3], f1, sum[w][4 * j + 3]);
        }
      }
    }
    ring.phase ^= 1;
  }
}
#else
template <int N>
DEVICE void multiply(const Arguments& a, const Tile& tile, const Shared& s, Ring& ring, float (&sum)[WAVES][N / 2]) {
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = a.width / (FORMAT ? 128 : 64);
  constexpr int ROW_STAGE = SWAP ? WEIGHT_STAGE : TOKEN_STAGE, COLUMN_STAGE = SWAP ? TOKEN_STAGE : WEIGHT_STAGE;
  const u64 row_base = operand_at(shared_address(SWAP ? s.weights : s.tokens));
  const u64 column_base = operand_at(shared_address(SWAP ? s.tokens : s.weights));

  for (int block = 0; block < blocks; block++) {
    barrier_wait(s.full + ring.slot, ring.phase);
    const u64 row_at = row_base + (u64)(ring.slot * (ROW_STAGE >> 4)), column_at = column_base + (u64)(ring.slot * (COLUMN_STAGE >> 4));
    const float* scales = (const float*)(s.scales + ring.slot * SCALE_STAGE);
    float low_scale = 0, high_scale = 0;
    if (FORMAT == 1) {
      const float2 f = *(const float2*)s.notes[ring.slot].scales;
      low_scale = SECOND && group ? f.y : f.x, high_scale = f.y;
    }
    if (FORMAT == 1) {
#pragma unroll
      for (int w = 0; w < WAVES; w++) {
        float part[N / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const u64 row = row_at + (k / 2) * (ROWS * 64 >> 4) + first_row(group, w) * 4 + k % 2 * 2;
          const u64 column = column_at + (k / 2) * (COLS * 64 >> 4) + k % 2 * 2;
          Wgmma<N>::e4m3(part, row, column, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          const float2 f = *(const float2*)(scales + 8 * j + 2 * t);
          const float f0 = f.x * low_scale, f1 = f.y * low_scale;
          const float h0 = GATED ? f.x * high_scale : f0, h1 = GATED ? f.y * high_scale : f1;
          sum[w][4 * j] = fmaf(part[4 * j], f0, sum[w][4 * j]);
          sum[w][4 * j + 1] = fmaf(part[4 * j + 1], f1, sum[w][4 * j + 1]);
          sum[w][4 * j + 2] = fmaf(part[4 * j + 2], h0, sum[w][4 * j + 2]);
          sum[w][4 * j + 3] = fmaf(part[4 * j + 3], h1, sum[w][4 * j + 3]);
        }
        if (w == WAVES - 1) {
          __syncwarp();  // all lanes have read their scales
          if (lane == 0) barrier_arrive(s.empty + ring.slot);
        }
      }
    } else if (FORMAT == 2) {
      u32 values[WAVES][8][4];
#pragma unroll
      for (int w = 0; w < WAVES; w++) {
        // A warp's 16 rows are one piece: 32 neighbouring channels a lane, of rows g and g + 8.
        const int piece = first_row(group, w) / 16 + warp;
        const u8* codes = s.weights + ring.slot * WEIGHT_STAGE + piece * 1024 + g * 64 + (t ^ (g / 2 % 4)) * 16;
        const uint4 low = *(const uint4*)codes, high = *(const uint4*)(codes + 512);
        const bf16* scale = (const bf16*)(s.scales + ring.slot * SCALE_STAGE + piece * TILE_SCALES) + t * 32 / GROUP * 16 + g;
        const u32 low_scale2 = int4_scale(scale[0]), high_scale2 = int4_scale(scale[8]);
        const u32 words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const int shift = k % 2 * 8;
          values[w][k][0] = int4_to_f16(words[0][k / 2] >> shift, low_scale2);
          values[w][k][1] = int4_to_f16(words[1][k / 2] >> shift, high_scale2);
          values[w][k][2] = int4_to_f16(words[0][k / 2] >> (shift + 4), low_scale2);
          values[w][k][3] = int4_to_f16(words[1][k / 2] >> (shift + 4), high_scale2);
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; k++)
          Wgmma<N>::f16_from(sum[w], values[w][k], column_at + k / 2 * (COLS * 64 >> 4) + k % 2 * 2, 1);
        wgmma_commit();
      }
      wgmma_wait<0>();
      __syncwarp();  // all lanes have read their weights and scales
      if (lane == 0) barrier_arrive(s.empty + ring.slot);
    } else {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int w = 0; w < WAVES; w++) {
          const u64 row = row_at + (k / 2) * (ROWS * 64 >> 4) + first_row(group, w) * 4 + k % 2 * 2;
          const u64 column = column_at + (k / 2) * (COLS * 64 >> 4) + k % 2 * 2;
          Wgmma<N>::b16(sum[w], row, column, 1);
        }
      }
      wgmma_commit();
      // The stage before is done, this one stays in flight.
      wgmma_wait<1>();
      if (block > 0 && lane == 0) barrier_arrive(s.empty + (ring.slot + STAGES - 1) % STAGES);
    }
    ring.next();
  }
  if (FORMAT == 0) {
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(s.empty + (ring.slot + STAGES - 1) % STAGES);
  }
  if (FORMAT == 2) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const uint2 f = load_fresh((const uint2*)(a.scales + tile.token_row + 8 * j + 2 * t));
#pragma unroll
      for (int w = 0; w < WAVES; w++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[w][4 * j + i] *= __uint_as_float(i % 2 ? f.y : f.x);
    }
  }
}
#endif

// ---------------------------------------------------------------- results

#define OUT_BYTES (F32 ? 4 : 2)

// Row of y, or -1, of a tile's token row.
DEVICE int result_row(const Arguments& a, const Tile& tile, int row) {
  if (row >= tile.tokens) return -1;
  return GROUPED ? load_fresh(a.rows + tile.token_row + row) : tile.token_row + row;
}

DEVICE float gated(float gate, float up) { return silu(gate) * up; }

// Tokens are rows: each warp turns 16 rows of 64 results in its own corner of the staging. Lane 16 w + r has the row of
// y of wave w's row r.
DEVICE void store_rows(const Arguments& a, const Tile& tile, const Shared& s, int mine, float (&sum)[WAVES][COLS / 2]) {
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int outputs = GATED ? a.outputs / 2 : a.outputs, column0 = GATED ? tile.weight_row / 2 : tile.weight_row;
  u8* corner = s.staging + (group * 4 + warp) * 2048;
#pragma unroll
  for (int w = 0; w < WAVES; w++) {
    if (first_row(group, w) >= tile.tokens) continue;
    if (F32) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const i64 row = __shfl_sync(FULL_WARP, mine, w * 16 + g + half * 8);
#pragma unroll
        for (int j = 0; j < COLS / 8; j += GATED ? 2 : 1) {
          const int column = column0 + (GATED ? j / 2 : j) * 8 + 2 * t;
          float2 v = float2{sum[w][4 * j + 2 * half], sum[w][4 * j + 2 * half + 1]};
          if (GATED) v = float2{gated(v.x, sum[w][4 * j + 4 + 2 * half]), gated(v.y, sum[w][4 * j + 5 + 2 * half])};
          if (row >= 0 && column < outputs) {
            if (RESIDUAL) {
              const u32 r = load_fresh((const u32*)(a.residual + row * outputs + column));
              v.x += low_bf16(r), v.y += high_bf16(r);
            }
            *(float2*)(a.y + (row * outputs + column) * 4) = v;
          }
        }
      }
    } else {
      i64 row[4];
#pragma unroll
      for (int i = 0; i < 4; i++) row[i] = __shfl_sync(FULL_WARP, mine, w * 16 + i * 4 + lane / 8);
#pragma unroll
      for (int chunk = 0; chunk < COLS / (GATED ? 128 : 64); chunk++) {
        const int column = column0 + chunk * 64 + lane % 8 * 8;
        if (RESIDUAL) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int r = i * 4 + lane / 8;
            uint4 v = uint4{0, 0, 0, 0};
            if (row[i] >= 0 && column < outputs) v = load_fresh((const uint4*)(a.residual + row[i] * outputs + column));
            *(uint4*)(corner + r * 128 + (lane % 8 ^ r % 8) * 16) = v;
          }
          __syncwarp();
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
          const int r = lane % 8 + lane / 8 % 2 * 8, at = pair * 2 + lane / 16;
          u8* place = corner + r * 128 + (at ^ r % 8) * 16;
          u32 v[4], old[4] = {0, 0, 0, 0};
          if (RESIDUAL) load_matrices(place, old);
#pragma unroll
          for (int m = 0; m < 4; m++) {
            const int j = chunk * (GATED ? 16 : 8) + (pair * 2 + m / 2) * (GATED ? 2 : 1), e = 4 * j + m % 2 * 2;
            float v0 = sum[w][e], v1 = sum[w][e + 1];
            if (GATED) v0 = gated(v0, sum[w][(e + 4) % (COLS / 2)]), v1 = gated(v1, sum[w][(e + 5) % (COLS / 2)]);
            if (RESIDUAL) v0 += low_bf16(old[m]), v1 += high_bf16(old[m]);
            v[m] = pack_bf16(v0, v1);
          }
          store_matrices(place, v[0], v[1], v[2], v[3]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = i * 4 + lane / 8;
          const uint4 v = *(const uint4*)(corner + r * 128 + (lane % 8 ^ r % 8) * 16);
          if (row[i] >= 0 && column < outputs) *(uint4*)(a.y + (row[i] * outputs + column) * 2) = v;
        }
        __syncwarp();
      }
    }
  }
}

// Tokens are columns: a warpgroup turns 32 of them at a time, all its channels. Lane r has the rows of y of every 32nd
// token from r on.
template <int N>
DEVICE void store_columns(const Arguments& a, const Tile& tile, const Shared& s, const int (&mine)[(N + 31) / 32],
                          float (&sum)[WAVES][N / 2]) {
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int outputs = GATED ? a.outputs / 2 : a.outputs;
  const int channel0 = (tile.weight_row + group * WAVES * 64) / (GATED ? 2 : 1);
  constexpr int CHUNKS = WAVES * 8 / (GATED ? 2 : 1);  // of 8 channels
  constexpr int TURNS = CHUNKS < 8 ? CHUNKS : 8;       // a row's chunks change places, against bank conflicts
  u8* corner = s.staging + group * STAGING;
#pragma unroll
  for (int token0 = 0; token0 < N; token0 += 32) {
    constexpr int BLOCKS = N < 32 ? N / 8 : 4;
    const int j0 = token0 / 8;
    if (F32) {
#pragma unroll
      for (int j = j0; j < j0 + BLOCKS; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const i64 row = __shfl_sync(FULL_WARP, mine[j / 4], j % 4 * 8 + 2 * t + e);
#pragma unroll
          for (int w = 0; w < WAVES; w++) {
#pragma unroll
            for (int half = 0; half < (GATED ? 1 : 2); half++) {
              const int channel = channel0 + (GATED ? w * 32 + warp * 8 : w * 64 + warp * 16 + half * 8) + g;
              float v = sum[w][4 * j + 2 * half + e];
              if (GATED) v = gated(v, sum[w][4 * j + 2 + e]);
              if (row >= 0 && channel < outputs) {
                if (RESIDUAL) v += from_bf16(load_fresh(a.residual + row * outputs + channel));
                *(float*)(a.y + (row * outputs + channel) * 4) = v;
              }
            }
          }
        }
      }
    } else {
      constexpr int VECTORS = (BLOCKS * 8 * CHUNKS + 127) / 128;
      i64 row[VECTORS];
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        const int r = (i * 128 + threadIdx.x % 128) / CHUNKS, found = __shfl_sync(FULL_WARP, mine[token0 / 32], r);
        row[i] = r < BLOCKS * 8 ? found : -1;
      }
      const int at = threadIdx.x % CHUNKS, channel = channel0 + at * 8;
      named_barrier(1 + group, 128);
      if (RESIDUAL) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
          const int r = (i * 128 + threadIdx.x % 128) / CHUNKS;
          uint4 v = uint4{0, 0, 0, 0};
          if (row[i] >= 0 && channel < outputs) v = load_fresh((const uint4*)(a.residual + row[i] * outputs + channel));
          *(uint4*)(corner + r * CHUNKS * 16 + (at ^ r % TURNS) * 16) = v;
        }
        named_barrier(1 + group, 128);
      }
#pragma unroll
      for (int w = 0; w < WAVES; w++) {
#pragma unroll
        for (int quad = 0; quad < BLOCKS * (GATED ? 1 : 2); quad += 4) {
          // Four 8x8 matrices: of 4 token blocks, or of 2 by two groups of 8 channels.
          const int m = lane / 8;
          const int r = (GATED ? min(m, BLOCKS - 1) : quad / 2 + m / 2) * 8 + lane % 8;
          const int c = GATED ? w * 4 + warp : w * 8 + warp * 2 + m % 2;
          u8* place = corner + r * CHUNKS * 16 + (c ^ r % TURNS) * 16;
          u32 v[4], old[4] = {0, 0, 0, 0};
          if (RESIDUAL) load_transposed(place, old);
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int e = GATED ? 4 * (j0 + min(k, BLOCKS - 1)) : 4 * (j0 + quad / 2 + k / 2) + k % 2 * 2;
            float v0 = sum[w][e], v1 = sum[w][e + 1];
            if (GATED) v0 = gated(v0, sum[w][e + 2]), v1 = gated(v1, sum[w][e + 3]);
            if (RESIDUAL) v0 += low_bf16(old[k]), v1 += high_bf16(old[k]);
            v[k] = pack_bf16(v0, v1);
          }
          store_transposed(place, v[0], v[1], v[2], v[3]);
        }
      }
      named_barrier(1 + group, 128);
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        const int r = (i * 128 + threadIdx.x % 128) / CHUNKS;
        const uint4 v = *(const uint4*)(corner + r * CHUNKS * 16 + (at ^ r % TURNS) * 16);
        if (row[i] >= 0 && channel < outputs) *(uint4*)(a.y + (row[i] * outputs + channel) * 2) = v;
      }
    }
  }
}

template <int N>
DEVICE void finish(const Arguments& a, const Tile& tile, const Shared& s, Ring& ring) {
  const int lane = threadIdx.x % 32;
  float sum[WAVES][N / 2];
#pragma unroll
  for (int w = 0; w < WAVES; w++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[w][i] = 0;
  // Where results go is asked for before there are any.
#if SWAP
  int mine[(N + 31) / 32];
#pragma unroll
  for (int i = 0; i < (N + 31) / 32; i++) mine[i] = result_row(a, tile, i * 32 + lane);
  multiply<N>(a, tile, s, ring, sum);
  store_columns<N>(a, tile, s, mine, sum);
#else
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
  const int mine = lane < WAVES * 16 ? result_row(a, tile, first_row(group, lane / 16) + warp * 16 + lane % 16) : -1;
  multiply<N>(a, tile, s, ring, sum);
  store_rows(a, tile, s, mine, sum);
#endif
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    gemm(const u8* weight, const float* weight_scale, const u8* codes, const float* scales, const bf16* residual, u8* y,
         int* work, const int* rows, int tokens, int padded, int outputs, int width) {
  extern __shared__ __align__(1024) u8 memory[];
  const Arguments a = {weight, weight_scale, codes, scales, residual, y, work, rows, tokens, padded, outputs, width};
  const Shared s(memory);
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0);  // as the compiler sees: the same in all lanes
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(s.full + i, 1);
      barrier_init(s.empty + i, CONSUMERS / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_dependencies();

  if (warp >= CONSUMERS / 32) {
    registers_give<(GROUPS == 3 ? 56 : 40)>();
    if (warp == CONSUMERS / 32 && elected()) produce(a, Tiles(a), s);
  } else {
    registers_keep<(GROUPS == 3 ? 152 : 232)>();
    Ring ring;
    while (true) {
      barrier_wait(s.full + ring.slot, ring.phase);
      const Note& note = s.notes[ring.slot];
      const Tile tile = {note.weight_row, note.token_row, note.tokens, 0};
      if (tile.tokens == 0) break;
#if SWAP
      const int n = covered(tile);
      if (n > 96) finish<(COLS > 96 ? 128 : 16)>(a, tile, s, ring);
      else if (n > 64) finish<(COLS > 64 ? 96 : 16)>(a, tile, s, ring);
      else if (n > 32) finish<(COLS > 32 ? 64 : 16)>(a, tile, s, ring);
      else if (n > 16) finish<32>(a, tile, s, ring);
      else finish<16>(a, tile, s, ring);
#else
      finish<COLS>(a, tile, s, ring);
#endif
    }
  }
}
