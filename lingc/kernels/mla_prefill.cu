// Causal attention of many tokens over keys and values that were made from latents, on warpgroup products (sm_90a).
//
// One block has 128 tokens of one sequence and one head: two warpgroups with 64 each, and a warp that copies keys and
// values, 128 rows at a time. Operands lie as the tensor cores read them, 128 rows together, so that a copy is one run:
//
//   k     [heads, sequences, tiles][NOPE / 32][128 rows][64 bytes]
//   rope  [sequences, tiles][ROPE / 32][128 rows][64 bytes]
//   v     [heads, sequences, tiles][4 runs of 32 rows][VALUE channels][64 bytes]   transposed
//
// a line's 16-byte quarter c at c ^ (line / 2 % 4). A warpgroup asks for the next scores before it weighs the values of
// the tile before, and makes shares of the scores while the values are weighed. To let the warpgroups take turns at the
// tensor cores was 1 to 2 % slower.
//
// Constants: HEADS of a row of q and y; NOPE, ROPE, VALUE channels of a head.
#include "wgmma.cuh"

#define ROWS 128
#define KEYS 128
#define STAGES 2
#define WIDTH (NOPE + ROPE)
#define QUERY_BYTES (ROWS * WIDTH * 2)
#define KEY_BYTES (KEYS * WIDTH * 2)
#define PLAIN_BYTES (KEYS * NOPE * 2)
#define VALUE_BYTES (KEYS * VALUE * 2)
#define CONSUMERS 256
#define MINUS_INFINITY (-__uint_as_float(0x7f800000u))

struct Tile {
  int sequence, first, tokens;  // of the tile's tokens, those that are its sequence's
  int at;                       // position of the first
  int end;                      // rows that the last one sees
};

// Tiles are numbered by sequence, the tokens that none has last. Blocks take them from the end: what sees most comes first.
DEVICE Tile locate(const int* starts, const int* positions, int tokens, int sequences, int room) {
  int total = 0;
  for (int b = 0; b <= sequences; b++) total += (starts[b + 1] - starts[b] + ROWS - 1) / ROWS;
  int index = total - 1 - (int)blockIdx.x;
  Tile tile = {0, 0, 0, 0, 0};
  if (index < 0) return tile;
  int b = 0, count;
  while (index >= (count = (starts[b + 1] - starts[b] + ROWS - 1) / ROWS)) index -= count, b++;
  tile.sequence = b;
  tile.first = starts[b] + index * ROWS;
  tile.tokens = min(ROWS, starts[b + 1] - tile.first);
  if (b == sequences) return tile;
  const int past = load_fresh(positions + starts[b]) - starts[b], last = load_fresh(positions + starts[b + 1] - 1);
  tile.at = tile.first + past;
  tile.end = min(min(tile.at + tile.tokens, last + 1), room);
  return tile;
}

struct Bars {
  u64 keys[STAGES], values[STAGES];            // they are there
  u64 keys_read[STAGES], values_read[STAGES];  // by all
};

DEVICE void produce(u8* keys, u8* values, Bars& bars, const u8* k, const u8* rope, const u8* v, int tiles) {
  for (int j = 0; j < tiles; j++) {
    const int slot = j % STAGES;
    const u32 phase = j / STAGES & 1;
    barrier_wait(bars.keys_read + slot, phase ^ 1);
    barrier_expect(bars.keys + slot, KEY_BYTES);
    bulk_load(keys + slot * KEY_BYTES, k + (i64)j * PLAIN_BYTES, PLAIN_BYTES, bars.keys + slot);
    bulk_load(keys + slot * KEY_BYTES + PLAIN_BYTES, rope + (i64)j * (KEY_BYTES - PLAIN_BYTES), KEY_BYTES - PLAIN_BYTES,
              bars.keys + slot);
    barrier_wait(bars.values_read + slot, phase ^ 1);
    barrier_expect(bars.values + slot, VALUE_BYTES);
    bulk_load(values + slot * VALUE_BYTES, v + (i64)j * VALUE_BYTES, VALUE_BYTES, bars.values + slot);
  }
}

// One lane of each warp says that its warp is done with a slot.
DEVICE void release(u64* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(bar);
}

// A warpgroup's scores of a tile: s[4 i + e] as `Wgmma` says.
DEVICE void ask_scores(float (&s)[64], u32 queries, u32 keys) {
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++)
    Wgmma<128>::b16(s, descriptor(queries + k / 2 * (ROWS * 64 >> 4) + k % 2 * 2),
                    descriptor(keys + k / 2 * (KEYS * 64 >> 4) + k % 2 * 2), k > 0);
  wgmma_commit();
}

DEVICE void ask_values(float (&o)[64], u32 (&shares)[8][4], u32 values) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++)
    Wgmma<VALUE>::b16_from(o, shares[k], descriptor(values + k / 2 * (VALUE * 64 >> 4) + k % 2 * 2), 1);
  wgmma_commit();
}

// Scores become shares, times what they add up to; `by` is what the sums before are to be multiplied by.
DEVICE void share(float (&s)[64], float (&top)[2], float (&total)[2], float (&by)[2], float scale) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float most = s[2 * h];
#pragma unroll
    for (int i = 0; i < 16; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
    most = fmaxf(top[h], most * scale);
    by[h] = exp2_fast(top[h] - most);
    top[h] = most;
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 16; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& v = s[4 * i + 2 * h + e];
        v = exp2_fast(fmaf(v, scale, -most));
        sum[e] += v;
      }
    }
    total[h] = fmaf(total[h], by[h], sum[0] + sum[1]);
  }
}

DEVICE void pack(const float (&s)[64], u32 (&shares)[8][4]) {
#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) shares[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    mla_prefill(const bf16* q, const u8* k, const u8* v, const u8* rope, const int* offsets, const int* positions, bf16* y,
                int tokens, int sequences, int room, int first_head, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  u8 *queries = memory, *keys = queries + QUERY_BYTES, *values = keys + STAGES * KEY_BYTES;
  Bars& bars = *(Bars*)(values + STAGES * VALUE_BYTES);
  int* starts = (int*)(&bars + 1);
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(bars.keys + i, 1), barrier_init(bars.values + i, 1);
      barrier_init(bars.keys_read + i, CONSUMERS / 32), barrier_init(bars.values_read + i, CONSUMERS / 32);
    }
    barrier_init_fence();
  }
  wait_dependencies();
  for (int i = threadIdx.x; i < sequences + 2; i += CONSUMERS + 128)
    starts[i] = i <= sequences ? load_fresh(offsets + i) : tokens;
  __syncthreads();
  const Tile tile = locate(starts, positions, tokens, sequences, room);
  if (tile.tokens <= 0) return;
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), group = warp / 4, head = blockIdx.y;
  const int tiles = __shfl_sync(FULL_WARP, (tile.end + KEYS - 1) / KEYS, 0), room_tiles = (room + KEYS - 1) / KEYS;

  if (warp >= CONSUMERS / 32) {
    registers_give<24>();
    const i64 of = ((i64)head * sequences + tile.sequence) * room_tiles;
    if (warp == CONSUMERS / 32 && elected())
      produce(keys, values, bars, k + of * PLAIN_BYTES, rope + (i64)tile.sequence * room_tiles * (KEY_BYTES - PLAIN_BYTES),
              v + of * VALUE_BYTES, tiles);
    return;
  }
  registers_keep<240>();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, thread = threadIdx.x % 128;
  const i64 pitch = (i64)HEADS * WIDTH;
  const bf16* from = q + (i64)tile.first * pitch + (first_head + head) * WIDTH;
#pragma unroll 4
  for (int i = thread; i < 64 * WIDTH / 8; i += 128) {
    const int row = group * 64 + i / (WIDTH / 8), piece = i % (WIDTH / 8);
    uint4 of = {0, 0, 0, 0};
    if (row < tile.tokens) of = load_fresh((const uint4*)(from + row * pitch) + piece);
    *(uint4*)(queries + piece / 4 * (ROWS * 64) + row * 64 + (piece % 4 ^ row / 2 % 4) * 16) = of;
  }
  fence_async();
  named_barrier(1 + group, 128);

  float s[64], o[64], top[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0, 0}, by[2];
  u32 shares[8][4];
#pragma unroll
  for (int i = 0; i < 64; i++) o[i] = 0;
  const int first = group * 64 + warp % 4 * 16 + g;
  const int last[2] = {min(tile.at + first, tile.end - 1), min(tile.at + first + 8, tile.end - 1)};  // rows seen
  const int whole = min(tile.at + group * 64 + 1, tile.end) / KEYS;  // tiles that all of the warpgroup see
  const u32 queries_at = (u32)operand_at(shared_address(queries)) + group * (64 * 64 >> 4);
  const u32 keys_at = (u32)operand_at(shared_address(keys)), values_at = (u32)operand_at(shared_address(values));

  auto mask = [&](int j) {
    if (j < whole) return;
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (j * KEYS + i / 4 * 8 + 2 * t + i % 2 > last[i % 4 / 2]) s[i] = MINUS_INFINITY;
  };
  if (tiles > 0) {
    barrier_wait(bars.keys, 0);
    wgmma_fence();
    ask_scores(s, queries_at, keys_at);
    wgmma_wait<0>();
    pin<64>(s);
    release(bars.keys_read);
    mask(0);
    share(s, top, total, by, scale);
    pack(s, shares);
    for (int j = 1; j < tiles; j++) {
      const int slot = j % STAGES, before = (j - 1) % STAGES;
      barrier_wait(bars.keys + slot, j / STAGES & 1);
      barrier_wait(bars.values + before, (j - 1) / STAGES & 1);
      wgmma_fence();
      ask_scores(s, queries_at, keys_at + slot * (KEY_BYTES >> 4));
      ask_values(o, shares, values_at + before * (VALUE_BYTES >> 4));
        wgmma_wait<1>();
      pin<64>(s);
      release(bars.keys_read + slot);
      mask(j);
      share(s, top, total, by, scale);
      wgmma_wait<0>();
      pin<64>(o);
      release(bars.values_read + before);
      pack(s, shares);
#pragma unroll
      for (int i = 0; i < 64; i++) o[i] *= by[i % 4 / 2];
    }
    const int slot = (tiles - 1) % STAGES;
    barrier_wait(bars.values + slot, (tiles - 1) / STAGES & 1);
    wgmma_fence();
    ask_values(o, shares, values_at + slot * (VALUE_BYTES >> 4));
    wgmma_wait<0>();
    pin<64>(o);
  }
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
    total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
    inverse[h] = total[h] > 0 ? __fdividef(1.0f, total[h]) : 0.0f;
  }
  // Each warp's 16 rows go through the place of its queries.
  named_barrier(1 + group, 128);
  const int row = group * 64 + warp % 4 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const int piece = i + lane / 16;
    u32 made[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const int at = 4 * (i + m / 2) + m % 2 * 2;
      made[m] = pack_bf16(o[at] * inverse[m % 2], o[at + 1] * inverse[m % 2]);
    }
    store_matrices(queries + piece / 4 * (ROWS * 64) + row * 64 + (piece % 4 ^ row / 2 % 4) * 16, made[0], made[1], made[2],
                   made[3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int mine = group * 64 + warp % 4 * 16 + i * 2 + lane / 16, piece = lane % 16;
    const uint4 of = *(const uint4*)(queries + piece / 4 * (ROWS * 64) + mine * 64 + (piece % 4 ^ mine / 2 % 4) * 16);
    if (mine < tile.tokens)
      *((uint4*)(y + ((i64)(tile.first + mine) * HEADS + first_head + head) * VALUE) + piece) = of;
  }
}
