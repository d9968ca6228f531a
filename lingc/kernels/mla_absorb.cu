// MLA of a few tokens, first launch: the tokens' cache rows, and queries in the space of the latents.
//
// queries[group] = (q_n @ w_k[h] | rope(q_r)) * scale * log2(e), bf16, of one token's COLUMNS heads: the operand
// tile that `mla_attend` copies as it is. It has 9 blocks of 64 channels, in each one row of 128 bytes a head,
// whose 16-byte chunk c stands at c ^ (head % 8). Heads beyond HEADS are zero.
//
// Blocks: 4 slices of 128 latent channels for each head, for tokens in runs of `run`; then one warp a token for
// the rows.
#include "device.cuh"

#define NOPE 128
#define ROPE 64
#define LATENT 512
#define KEY (NOPE + ROPE)
#define WIDTH (LATENT + ROPE)
#define SLICE 128
#define SLICES (LATENT / SLICE)
#define WARPS 5
#define PADDED ((HEADS + COLUMNS - 1) / COLUMNS * COLUMNS)
#define TILE_BYTES (COLUMNS * WIDTH * 2)

DEVICE void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE void load_transposed(u32 row, u32* v) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

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
  for (int i = 0; i < 2; i++) weight[i] = ((const uint4*)kv_weight)[lane + 32 * i];
  wait_dependencies();
  int row = load_fresh(rows + token);
  const bf16* own = a + (i64)token * pitch + pitch - WIDTH;
  uint4 raw[2];
#pragma unroll
  for (int i = 0; i < 2; i++) raw[i] = load_fresh((const uint4*)own + lane + 32 * i);
  u32 key = load_fresh((const u32*)(own + LATENT) + lane);
  float c = load_fresh(cos + (i64)token * (ROPE / 2) + lane), s = load_fresh(sin + (i64)token * (ROPE / 2) + lane);
  float x[16], w[16], sum = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) unpack_bf16(raw[i], x + 8 * i), unpack_bf16(weight[i], w + 8 * i);
#pragma unroll
  for (int i = 0; i < 16; i++) sum += x[i] * x[i];
  float by = rsqrtf(warp_sum(sum) * (1.0f / LATENT) + eps);
  if (row < 0) return;
  bf16* to = cache + (i64)row * WIDTH;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint4 y;
    const float *v = x + 8 * i, *u = w + 8 * i;
    y.x = pack_bf16(v[0] * by * u[0], v[1] * by * u[1]), y.y = pack_bf16(v[2] * by * u[2], v[3] * by * u[3]);
    y.z = pack_bf16(v[4] * by * u[4], v[5] * by * u[5]), y.w = pack_bf16(v[6] * by * u[6], v[7] * by * u[7]);
    ((uint4*)to)[lane + 32 * i] = y;
  }
  ((u32*)(to + LATENT))[lane] = turned(key, c, s, 1.0f);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
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
  // [nope][128 channels]; 16-byte chunk c of row n stands where eight rows of a transposed matrix meet no bank twice.
  __shared__ __align__(128) u8 weight[NOPE * SLICE * 2];
  u32 base = shared_address(weight);
  if (h < HEADS) {
    const u8* from = (const u8*)(w_k + (i64)h * NOPE * LATENT + slice * SLICE);
    for (int i = threadIdx.x; i < NOPE * 16; i += WARPS * 32) {
      int n = i / 16, c = i % 16, swizzle = (n & 1) | (n / 8 % 4) << 1;
      copy_async(base + n * 256 + ((c ^ swizzle) * 16), from + (i64)n * (LATENT * 2) + c * 16);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  if (warp == WARPS - 1) {  // rope
    wait_dependencies();
    for (int token = first + slice; token < last; token += SLICES) {
      u32 pair = 0;
      float c = 0, s = 0;
      if (h < HEADS) {
        pair = load_fresh((const u32*)(q + (i64)token * (HEADS * KEY) + h * KEY + NOPE) + lane);
        c = load_fresh(cos + (i64)token * (ROPE / 2) + lane), s = load_fresh(sin + (i64)token * (ROPE / 2) + lane);
      }
      *(u32*)query_at(queries, token, h, LATENT + 2 * lane) = turned(pair, c, s, scale);
    }
    return;
  }
  // k of step 2 i (+ 1) of lane t: channels 32 i + 8 t + (0, 1 | 2, 3), then (4, 5 | 6, 7): what one load of q holds.
  u32 w[2][8][4];
  int m = lane / 8, r = lane % 8;  // of four matrices: channels 0-7, 8-15 at the first k half, then at the second
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int k = 0; k < 8; k++) {
      int n = 32 * (k / 2) + 8 * (r / 2) + r % 2 + 4 * (k % 2) + 2 * (m / 2);
      int c = warp * 4 + tile * 2 + m % 2, swizzle = (n & 1) | (n / 8 % 4) << 1;
      load_transposed(base + n * 256 + ((c ^ swizzle) * 16), w[tile][k]);
    }
  wait_dependencies();
  for (int at = first; at < last; at += 8) {
    float d[2][4] = {};
    uint4 x[4];
    int token = at + g;
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = token < last && h < HEADS
                 ? load_fresh((const uint4*)(q + (i64)token * (HEADS * KEY) + h * KEY) + 4 * i + t)
                 : uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        u32 *u = w[tile][2 * i], *v = w[tile][2 * i + 1];
        mma_bf16(d[tile], u[0], u[1], u[2], u[3], x[i].x, x[i].y);
        mma_bf16(d[tile], v[0], v[1], v[2], v[3], x[i].z, x[i].w);
      }
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int to = at + 2 * t + i % 2, c = slice * SLICE + warp * 32 + tile * 16 + i / 2 * 8 + g;
        if (to < last) *(bf16*)query_at(queries, to, h, c) = to_bf16(h < HEADS ? d[tile][i] * scale : 0.0f);
      }
  }
}
