// The experts' way down for one token, weights of four bits: y = residual + sum of weight times (down a), each weight read
// once.
//
// A block makes TILES tiles of 16 rows that lie next to each other, so that one copy brings an expert's part of them, for all
// warps. A warp multiplies a slice of K of one tile. What is read is little for each multiprocessor, so time goes where warps
// wait for each other and for what they ask: copies are asked for by a warp that does nothing else, and rows of a are made
// integers once, by all warps, with the expert's share in their scales.
//
// Dependent launch: ids and weights are the router's, which ended before the kernel in front of this one let it begin
// (experts.cu says why); a and the residual are read behind the wait.
//
// Constants: GROUP of weights' scales; WIDTH, INNER channels of the residual stream and of an expert; EXPERTS, TOP_K, SHARED;
// TILES of a block; WARPS that multiply; DEPTH experts in shared memory; BYTES, as the host works them out.
#include "int4.cuh"

constexpr int SLOTS = TOP_K + SHARED;
constexpr int PIECES = INNER / 128;        // of a tile, of one expert
constexpr int SLICES = WARPS / TILES;      // warps that share a tile
constexpr int MINE = PIECES / SLICES;      // pieces of one warp
constexpr int GROUPS = 128 / GROUP;        // of a piece
constexpr int TILE_BYTES = PIECES * PIECE;
constexpr int TILE_SCALES = PIECES * GROUPS * 32;
constexpr int STAGE_BYTES = TILES * (TILE_BYTES + TILE_SCALES);
constexpr int ROW_BYTES = 2 * INNER;       // of a's rows as integers
constexpr int CHUNKS = SLOTS * INNER / 16; // of 16 channels
constexpr int EACH = (CHUNKS + WARPS * 32 - 1) / (WARPS * 32);

constexpr int X_AT = DEPTH * STAGE_BYTES;
constexpr int FACTORS_AT = X_AT + SLOTS * ROW_BYTES;
constexpr int SUMS_AT = FACTORS_AT + SLOTS * PIECES * 4;
constexpr int BARS_AT = (SUMS_AT + WARPS * 64 + 7) / 8 * 8;
static_assert(BARS_AT + 2 * DEPTH * 8 <= BYTES, "the host and this file disagree");
static_assert(MINE * WARPS == PIECES * TILES && WIDTH % (TILES * 16) == 0, "the experts' sizes do not suit the slices");
static_assert(TOP_K <= 32 && TILES * 16 <= WARPS * 32, "too many for one round");

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32)
    expert_down_one(const bf16* __restrict__ a, const int* __restrict__ ids, const float* __restrict__ weights,
                    const u8* __restrict__ down, const u8* __restrict__ scale, const bf16* __restrict__ residual,
                    bf16* __restrict__ y) {
  extern __shared__ __align__(1024) u8 memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * TILES;  // tile
  u64 *full = (u64*)(memory + BARS_AT), *empty = full + DEPTH;
  float* factors = (float*)(memory + FACTORS_AT);  // [SLOTS][PIECES]
  float* sums = (float*)(memory + SUMS_AT);        // [WARPS][16]

  launch_dependents();

  // Experts in the order in which they are multiplied: the shared one, whose id is known, then those that were chosen.
  auto slot_of = [](int entry) { return SHARED ? (entry == 0 ? TOP_K : entry - 1) : entry; };
  const int id = lane < TOP_K ? load_fresh(ids + lane) : -1;

  if (warp == WARPS) {
    const u64 policy = evict_first();
    auto ask = [&](int n, int expert) {  // by one lane: the n-th that is there
      const int slot = n % DEPTH;
      u8* to = memory + slot * STAGE_BYTES;
      const u64 tile = (u64)expert * (WIDTH / 16) + first;
      barrier_expect(full + slot, STAGE_BYTES);
      bulk_load(to, down + tile * TILE_BYTES, TILES * TILE_BYTES, full + slot, policy);
      bulk_load(to + TILES * TILE_BYTES, scale + tile * TILE_SCALES, TILES * TILE_SCALES, full + slot, policy);
    };
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < DEPTH; i++) barrier_init(full + i, 1), barrier_init(empty + i, WARPS);
      barrier_init_fence();
      if (SHARED) ask(0, EXPERTS);
    }
    __syncwarp();
    const u32 live = __ballot_sync(FULL_WARP, id >= 0);
    const int mine = SHARED + __popc(live & ((1u << lane) - 1));
    if (id >= 0 && mine < DEPTH) ask(mine, id);
    wait_dependencies();
    __syncthreads();
    const int count = SHARED + __popc(live);
    for (int n = DEPTH; n < count; n++) {  // by the lane whose expert it is
      barrier_wait(empty + n % DEPTH, n / DEPTH - 1 & 1);
      if (id >= 0 && mine == n) ask(n, id);
    }
    __syncthreads();
    return;
  }

  const u32 live = __ballot_sync(FULL_WARP, id >= 0);
  float shares[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int slot = (threadIdx.x + i * WARPS * 32) / (INNER / 16);
    shares[i] = slot < TOP_K ? load_fresh(weights + slot) : 1.0f;
  }
  wait_dependencies();

  uint4 raw[EACH][2];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int n = threadIdx.x + i * WARPS * 32;
    const uint4 *from = (const uint4*)a + n * 2, zero = {0, 0, 0, 0};
    raw[i][0] = n < CHUNKS ? load_fresh(from) : zero, raw[i][1] = n < CHUNKS ? load_fresh(from + 1) : zero;
  }
  const bf16 base = threadIdx.x < TILES * 16 ? load_fresh(residual + first * 16 + threadIdx.x) : 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int n = threadIdx.x + i * WARPS * 32;
    if (EACH > 1 && n - lane >= CHUNKS) break;
    float v[16], inverse;
    unpack_bf16(raw[i][0], v), unpack_bf16(raw[i][1], v + 8);
    const float scale = s16_scale<8>(v, inverse);
    if (n >= CHUNKS) continue;
    u8* slice = memory + X_AT + n / (INNER / 16) * ROW_BYTES;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Bytes made = to_s16(v + 8 * h, inverse);
      u8* to = slice + s16_place<GROUP>(n % (INNER / 16) * 2 + h);
      *(uint2*)to = made.high, *(uint2*)(to + 64) = made.low;
    }
    if (n % 8 == 0) factors[n / 8] = scale * (1.0f / 16) * shares[i];
  }
  __syncthreads();

  const int tile = warp / SLICES, piece = warp % SLICES * MINE;
  const u8* words_at = memory + (tile * PIECES + piece) * PIECE;
  const u8* scales_at = memory + TILES * TILE_BYTES + tile * TILE_SCALES + piece * GROUPS * 32;
  const u8* x_at = memory + X_AT + piece * 256 + g % 2 * 64 + t * 16;
  float tops = 0, lows = 0;
  int slot = 0, parity = 0;
#pragma unroll 3
  for (int entry = 0; entry < SLOTS; entry++) {
    const int row = slot_of(entry);
    if (row < TOP_K && !(live >> row & 1)) continue;
    barrier_wait(full + slot, parity);
#pragma unroll
    for (int p = 0; p < MINE; p++) {
      Nibbles<GROUP> words;
      words.read(words_at + slot * STAGE_BYTES + p * PIECE, (const bf16*)(scales_at + slot * STAGE_BYTES + p * GROUPS * 32), lane);
      const uint4* x = (const uint4*)(x_at + row * ROW_BYTES + p * 256);
      words.multiply(tops, lows, x[0], x[8], factors[row * PIECES + piece + p]);
    }
    if (DEPTH < SLOTS) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + slot);
    }
    if (++slot == DEPTH) slot = 0, parity ^= 1;
  }
  if (t == 0) sums[warp * 16 + g] = tops, sums[warp * 16 + g + 8] = lows;
  __syncthreads();
  if (threadIdx.x < TILES * 16) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < SLICES; w++) sum += sums[(threadIdx.x / 16 * SLICES + w) * 16 + threadIdx.x % 16];
    y[first * 16 + threadIdx.x] = to_bf16(from_bf16(base) + sum);
  }
}
