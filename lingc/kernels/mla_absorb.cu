// MLA of a few tokens, first launch: the tokens' cache rows, and queries in the space of the latents.
//
// queries[group] = (q_n @ w_k[h] | rope(q_r)) * scale * log2(e), bf16, of one token's COLUMNS heads: the operand
// tile that `mla_attend` copies as it is. It has 9 blocks of 64 channels, in each one row of 128 bytes a head,
// whose 16-byte chunk c stands at c ^ (head % 8). Heads beyond HEADS are zero.
//
// Blocks: 4 slices of 128 latent channels for each head, for tokens in runs of `run`: a warp holds the weights of
// 64 in registers, and turns the rope part of every eighth token. Then one warp a token for the rows.
#include "mla_few.cuh"

#define NOPE 128
#define ROPE 64
#define LATENT 512
#define KEY (NOPE + ROPE)
#define WIDTH (LATENT + ROPE)
#define SLICE 128
#define SLICES (LATENT / SLICE)
#define WARPS 2
#define PADDED ((HEADS + COLUMNS - 1) / COLUMNS * COLUMNS)
#define TILE_BYTES (COLUMNS * WIDTH * 2)

// The low halves of two words, and their high halves.
DEVICE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// Where channel `c` of head `h` of a token's queries stands.
DEVICE u8* query_at(u8* queries, int token, int h, int c) {
  i64 group = (i64)token * (PADDED / COLUMNS) + h / COLUMNS;
  int column = h % COLUMNS, inside = c % 64;
  return queries + group * TILE_BYTES + (c / 64) * (COLUMNS * 128) + column * 128 +
         ((inside / 8) ^ (column % 8)) * 16 + inside % 8 * 2;
}

// Turns pair `lane` of 64 channels.
DEVICE u32 turned(u32 pair, float c, float s, float by) {
  float a = low_bf16(pair), b = high_bf16(pair);
  return pack_bf16((a * c - b * s) * by, (b * c + a * s) * by);
}

DEVICE void write_row(const bf16* a, int pitch, const bf16* kv_weight, const float* cos, const float* sin,
                      bf16* cache, const int* rows, int token, float eps) {
  int lane = threadIdx.x % 32;
  uint4 weight[2];
#pragma unroll
  for (int i = 0; i < 2; i++) weight[i] = load_weight(kv_weight + 8 * (lane + 32 * i));
  int row = load_fresh(rows + token);  // of the step's inputs, which were there before it began
  const bf16* own = a + (i64)token * pitch + pitch - WIDTH;
  bf16* to = cache + (i64)max(row, 0) * WIDTH;
  i64 angle = (i64)token * (ROPE / 2) + lane;
#pragma unroll 1
  for (int pass = hidden(0); pass < 2; pass++) {
    bool real = pass == 1, stores = real && row >= 0;
    if (real) wait_dependencies();
    uint4 raw[2];
#pragma unroll
    for (int i = 0; i < 2; i++) raw[i] = load_if(real, own + 8 * (lane + 32 * i));
    u32 key = load_word_if(real, own + LATENT + 2 * lane);
    float c = __uint_as_float(load_word_if(real, cos + angle)), s = __uint_as_float(load_word_if(real, sin + angle));
    float x[16], w[16], sum = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) unpack_bf16(raw[i], x + 8 * i), unpack_bf16(weight[i], w + 8 * i);
#pragma unroll
    for (int i = 0; i < 16; i++) sum += x[i] * x[i];
    float by = rsqrtf(warp_sum(sum) * (1.0f / LATENT) + eps);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint4 y;
      const float *v = x + 8 * i, *u = w + 8 * i;
      y.x = pack_bf16(v[0] * by * u[0], v[1] * by * u[1]), y.y = pack_bf16(v[2] * by * u[2], v[3] * by * u[3]);
      y.z = pack_bf16(v[4] * by * u[4], v[5] * by * u[5]), y.w = pack_bf16(v[6] * by * u[6], v[7] * by * u[7]);
      store_if(stores, to + 8 * (lane + 32 * i), y);
    }
    store_if(stores, to + LATENT + 2 * lane, turned(key, c, s, 1.0f));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 6)
    mla_absorb(const bf16* __restrict__ a, const bf16* __restrict__ q, const bf16* __restrict__ kv_weight,
               const float* __restrict__ cos, const float* __restrict__ sin, bf16* cache,
               const int* __restrict__ rows, const bf16* __restrict__ w_k, u8* queries, int tokens, int pitch,
               int run, int runs, float eps, float scale) {
  launch_dependents();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int block = blockIdx.x;
  if (block >= SLICES * PADDED * runs) {
    int token = (block - SLICES * PADDED * runs) * WARPS + warp;
    if (token < tokens) write_row(a, pitch, kv_weight, cos, sin, cache, rows, token, eps);
    else wait_dependencies();
    return;
  }
  int slice = block % SLICES, h = block / SLICES % PADDED, first = block / (SLICES * PADDED) * run;
  int last = min(tokens, first + run);
  // Lane (g, t) has channels 8 g … 8 g + 7 of the warp's 64, at 32 i + 8 t + (0 … 7) of k: what one load of q holds.
  // Words of two rows become k pairs of two channels; tile `j` has channels 8 g + 2 j as rows g, the next as g + 8.
  uint4 w[4][8];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int k = 0; k < 8; k++)
      w[i][k] = h < HEADS ? load_weight(w_k + ((i64)h * NOPE + 32 * i + 8 * t + k) * LATENT + slice * SLICE + warp * 64 + 8 * g)
                          : uint4{0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      uint4 u = w[i][k], v = w[i][k + 1];
      w[i][k] = uint4{low_halves(u.x, v.x), low_halves(u.y, v.y), low_halves(u.z, v.z), low_halves(u.w, v.w)};
      w[i][k + 1] = uint4{high_halves(u.x, v.x), high_halves(u.y, v.y), high_halves(u.z, v.z), high_halves(u.w, v.w)};
    }
#pragma unroll 1
  for (int pass = hidden(0); pass < 2; pass++) {
    bool real = pass == 1;
    if (real) wait_dependencies();
    int end = real ? last : first;
#pragma unroll 1
    for (int at = first; at < last; at += 8) {
      float d[4][4] = {};
      uint4 x[4];
      int token = at + g, other = at + slice * WARPS + warp;
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = load_if(token < end && h < HEADS, q + (i64)token * (HEADS * KEY) + h * KEY + 32 * i + 8 * t);
      bool turns = other < end && h < HEADS;
      u32 pair = load_word_if(turns, q + (i64)other * (HEADS * KEY) + h * KEY + NOPE + 2 * lane);
      i64 angle = (i64)other * (ROPE / 2) + lane;
      float c = __uint_as_float(load_word_if(turns, cos + angle));
      float s = __uint_as_float(load_word_if(turns, sin + angle));
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint4* u = w[i] + 4 * half;
          u32 b0 = half ? x[i].z : x[i].x, b1 = half ? x[i].w : x[i].y;
          mma_bf16(d[0], u[0].x, u[1].x, u[2].x, u[3].x, b0, b1);
          mma_bf16(d[1], u[0].y, u[1].y, u[2].y, u[3].y, b0, b1);
          mma_bf16(d[2], u[0].z, u[1].z, u[2].z, u[3].z, b0, b1);
          mma_bf16(d[3], u[0].w, u[1].w, u[2].w, u[3].w, b0, b1);
        }
      store_if(other < end, query_at(queries, other, h, LATENT + 2 * lane), turned(pair, c, s, scale));
#pragma unroll
      for (int e = 0; e < 2; e++) {
        u32 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = pack_bf16(d[j][e] * scale, d[j][e + 2] * scale);
        int to = at + 2 * t + e;
        store_if(to < end, query_at(queries, to, h, slice * SLICE + warp * 64 + 8 * g), uint4{v[0], v[1], v[2], v[3]});
      }
      if (!real) break;
    }
  }
}
