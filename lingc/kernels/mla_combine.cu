// MLA of a few tokens, last launch: the splits' means of latents become one, and go through w_v.
//
// y[t, h] = w_v[h] @ (sum_s 2^(m_s - M) l_s o_s / sum_s 2^(m_s - M) l_s),  M = max_s m_s
//
// with o_s, m_s, l_s what `mla_attend` left for split s. PARTS blocks, two or four, are a cluster for 8 tokens at a time of
// a head: each adds up its part of the channels, gives it to the others, and multiplies by 32 rows of w_v. Four read each
// mean once, two read it twice and meet sooner.
//
// EVEN: a token's splits are added up by one warp, one after another, however many tokens there are.
#include "mla_few.cuh"

#ifndef EVEN
#define EVEN 0
#endif

#define LATENT 512
#define VALUE 128
#define WARPS 8
#define LANES (LATENT / PARTS / 8)  // that hold a split's part of the channels
#define ABREAST (32 / LANES)        // splits that a warp adds up at a time
#define QUARTERS 4  // of the rows of w_v
#define RUN 8
#define PADDED ((HEADS + COLUMNS - 1) / COLUMNS * COLUMNS)
#define PITCH (LATENT + 8)
#define BATCH (SPLITS < 9 * ABREAST ? (SPLITS + ABREAST - 1) / ABREAST : 9)  // loads that a lane has in flight

DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

DEVICE void store_peer(u32 address, u32 peer, u32 v) {
  asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.b32 [a], %2;}" ::"r"(address),
               "r"(peer), "r"(v)
               : "memory");
}

// Adds to `sum` what LANES of a warp have of one token and head: 8 channels a lane, every (ABREAST * warps)-th split.
DEVICE void add_splits(float* sum, const u8* partial, const float2* stats, u32 columns, float* share, int sub, int warps,
                       bool real) {
  int lane = threadIdx.x % 32, first = ABREAST * sub + lane / LANES, step = ABREAST * warps;
  uint4 o[BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    int at = first + i * step;
    o[i] = load_if(real && at < SPLITS, partial + (u32)at * columns * (LATENT * 2));
  }
  float2 none = {__int_as_float(0xff800000), 0}, own[(SPLITS + 31) / 32];
  float top = none.x, total = 0;
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++) {
    int s = lane + 32 * i;
    own[i] = load_if(real && s < SPLITS, stats + (u32)s * columns, none);
    top = fmaxf(top, own[i].x);
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++) {
    own[i].y *= own[i].y > 0 ? power(own[i].x - top) : 0;
    total += own[i].y;
  }
  total = warp_sum(total);
  float by = total > 0 ? __fdividef(1.0f, total) : 0;
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++)
    if (lane + 32 * i < SPLITS) share[lane + 32 * i] = own[i].y * by;
  __syncwarp();
#pragma unroll 1
  for (int from = first; from < SPLITS; from += BATCH * step) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      int at = from + i * step;
      float f = at < SPLITS ? share[at] : 0;
      bool used = f != 0;  // a split without rows left whatever was there
      u32 v[4] = {used ? o[i].x : 0, used ? o[i].y : 0, used ? o[i].z : 0, used ? o[i].w : 0};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float low, high;
        unpack_f16(v[k], low, high);
        sum[2 * k] += f * low, sum[2 * k + 1] += f * high;
      }
    }
    if (BATCH * ABREAST < SPLITS && from + BATCH * step < SPLITS) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        int at = from + (BATCH + i) * step;
        o[i] = load_if(real && at < SPLITS, partial + (u32)at * columns * (LATENT * 2));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    mla_combine(const u8* __restrict__ partial, const float* __restrict__ stats, const bf16* __restrict__ w_v, bf16* y,
                int tokens) {
  launch_dependents();
  __shared__ __align__(16) bf16 whole[RUN * PITCH];
  __shared__ float share[WARPS][SPLITS];
  __shared__ __align__(16) float products[WARPS][32 * RUN];
  float(*sums)[LATENT / PARTS] = (float(*)[LATENT / PARTS])products;  // before the products
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int part = cluster_rank(), h = blockIdx.x / QUARTERS, quarter = blockIdx.x % QUARTERS, runs = (tokens + RUN - 1) / RUN;
  uint4 w[2][2][2];  // tile of 16 rows, row g or g + 8, 32 channels
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        w[tile][r][k] =
            load_weight(w_v + ((i64)h * VALUE + quarter * 32 + tile * 16 + r * 8 + g) * LATENT + warp * 64 + k * 32 + t * 8);
  u32 columns = tokens * PADDED;
  // The first is a rehearsal.
#pragma unroll 1
  for (int run = hidden((int)blockIdx.y - (int)gridDim.y); run < runs; run += gridDim.y) {
    bool real = run >= 0;
    int first = real ? run * RUN : 0, count = min(RUN, tokens - first);
    int warps = EVEN ? 1 : count == 1 ? 8 : count == 2 ? 4 : count <= 4 ? 2 : 1;  // a token
    int token = warp / warps, sub = warp % warps;
    // Whoever writes to a neighbour's memory knows that the neighbour runs, and is done with the run before.
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    __syncthreads();
    if (real) wait_dependencies();
    float sum[8] = {};
    if (token < count) {
      i64 column = (i64)(first + token) * PADDED + h;
      add_splits(sum, partial + column * (LATENT * 2) + (part * LANES + lane % LANES) * 16, (const float2*)stats + column,
                 columns, share[warp], sub, warps, real);
      float* to = sums[ABREAST * warp + lane / LANES] + lane % LANES * 8;
      *(float4*)to = float4{sum[0], sum[1], sum[2], sum[3]}, *(float4*)(to + 4) = float4{sum[4], sum[5], sum[6], sum[7]};
    }
    __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    // A thread has two neighbouring channels, for one block. What stands at (8 w + g) * 8 + e of each 256 means is channel
    // (4 half + e / 2) * 64 + w * 16 + e % 2 * 8 + g (mla_attend).
    int e = threadIdx.x % 8, two = threadIdx.x / 8 % 4 * 2, at = threadIdx.x / 32 % (8 / PARTS) * 64 + two * 8 + e;
    int mean = part * (LATENT / PARTS) + at, channel = (mean / 256 * 4 + e / 2) * 64 + mean % 256 / 64 * 16 + e % 2 * 8 + two;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      float low = 0, high = 0;
#pragma unroll 2
      for (int k = 0; k < ABREAST * warps; k++)
        low += sums[i * ABREAST * warps + k][at], high += sums[i * ABREAST * warps + k][at + 8];
      store_peer(shared_address(whole + i * PITCH + channel), threadIdx.x / (256 / PARTS), pack_bf16(low, high));
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");

    float d[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      uint4 o = g < count ? *(const uint4*)(whole + g * PITCH + warp * 64 + k * 32 + t * 8) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        uint4 a = w[tile][0][k], b = w[tile][1][k];
        mma_bf16(d[tile], a.x, b.x, a.y, b.y, o.x, o.y);
        mma_bf16(d[tile], a.z, b.z, a.w, b.w, o.z, o.w);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) products[warp][(2 * t + i % 2) * 32 + tile * 16 + i / 2 * 8 + g] = d[tile][i];
    __syncthreads();
    float v = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) v += products[i][warp * 32 + lane];
    store_if(real && warp < count, y + ((i64)(first + warp) * HEADS + h) * VALUE + quarter * 32 + lane, to_bf16(v));
  }
}
