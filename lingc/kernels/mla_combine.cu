// MLA of a few tokens, last launch: the splits' sums of latents become one, and go through w_v.
//
// y[t, h] = w_v[h] @ (sum_s 2^(m_s - M) o_s / sum_s 2^(m_s - M) l_s),  M = max_s m_s
//
// with o_s, m_s, l_s what `mla_attend` left for split s. Four blocks are a cluster for one head and 8 tokens: each
// adds up 128 channels, gives them to the other three, and multiplies by 32 rows of w_v.
#include "device.cuh"

#define LATENT 512
#define VALUE 128
#define WARPS 8
#define PARTS 4
#define RUN 8
#define PADDED ((HEADS + COLUMNS - 1) / COLUMNS * COLUMNS)
#define PITCH (LATENT + 8)
#define BATCH 4

DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// Sum over the splits that warp `sub` of `warps` has, of 4 channels of one token and head.
DEVICE float4 summed(const float4* partial, const float2* stats, i64 column, i64 columns, float* share, int sub,
                     int warps) {
  int lane = threadIdx.x % 32;
  // The first sums are asked for at once; those of splits that had no rows are whatever was there.
  uint4 o[BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; i++)
    o[i] = load_fresh((const uint4*)(partial + (min(sub + i * warps, SPLITS - 1) * columns + column) * (LATENT / 4)));
  float2 own[(SPLITS + 31) / 32];
  float top = -__int_as_float(0x7f800000), total = 0;
  int used = 0;
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++) {
    int s = lane + 32 * i;
    own[i] = float2{-__int_as_float(0x7f800000), 0};
    if (s < SPLITS) {
      uint2 bits = load_fresh((const uint2*)(stats + s * columns + column));
      own[i] = float2{__uint_as_float(bits.x), __uint_as_float(bits.y)};
    }
    top = fmaxf(top, own[i].x);
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++) {
    used += __popc(__ballot_sync(FULL_WARP, own[i].y > 0));
    own[i].x = own[i].y > 0 ? exp2f(own[i].x - top) : 0;
    total += own[i].x * own[i].y;
  }
  total = warp_sum(total);
#pragma unroll
  for (int i = 0; i < (SPLITS + 31) / 32; i++)
    if (lane + 32 * i < SPLITS) share[lane + 32 * i] = total > 0 ? own[i].x / total : 0;
  __syncwarp();
  float4 sum = {0, 0, 0, 0};
  for (int s = sub; s < used; s += BATCH * warps) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      int at = s + i * warps;
      float f = at < used ? share[at] : 0;
      uint4 v = o[i];
      int next = at + BATCH * warps;
      if (next < used) o[i] = load_fresh((const uint4*)(partial + (next * columns + column) * (LATENT / 4)));
      if (at < used) {
        sum.x += f * __uint_as_float(v.x), sum.y += f * __uint_as_float(v.y);
        sum.z += f * __uint_as_float(v.z), sum.w += f * __uint_as_float(v.w);
      }
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
    mla_combine(const float* __restrict__ partial, const float* __restrict__ stats, const bf16* __restrict__ w_v,
                bf16* y, int tokens) {
  launch_dependents();
  // Whoever writes to a neighbour's memory knows that the neighbour runs.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  __shared__ __align__(16) bf16 whole[RUN * PITCH];
  __shared__ float4 sums[WARPS][32];
  __shared__ float share[WARPS][SPLITS];
  __shared__ float products[WARPS][32 * RUN];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int part = cluster_rank(), h = blockIdx.x / PARTS, first = blockIdx.y * RUN, count = min(RUN, tokens - first);
  uint4 w[2][2][2];  // tile of 16 rows, row g or g + 8, 32 channels
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        w[tile][r][k] = *(const uint4*)(w_v + ((i64)h * VALUE + part * 32 + tile * 16 + r * 8 + g) * LATENT +
                                        warp * 64 + k * 32 + t * 8);
  wait_dependencies();

  int warps = count == 1 ? 8 : count == 2 ? 4 : count <= 4 ? 2 : 1;  // a token
  int token = warp / warps, sub = warp % warps;
  i64 columns = (i64)tokens * PADDED;
  float4 sum = {0, 0, 0, 0};
  if (token < count)
    sum = summed((const float4*)partial + part * 32 + lane, (const float2*)stats, (i64)(first + token) * PADDED + h,
                 columns, share[warp], sub, warps);
  if (warps > 1) {
    sums[warp][lane] = sum;
    __syncthreads();
    if (sub == 0)
      for (int i = 1; i < warps; i++) {
        float4 v = sums[warp + i][lane];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (sub == 0 && token < count) {
    // What stands at 128 part + 4 lane of a partial row: two channels 64 apart, and those 8 further (mla_attend).
    int channel = part * 128 + lane / 8 * 16 + lane % 8;
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 to = shared_address(whole + token * PITCH + channel + i % 2 * 64 + i / 2 * 8);
#pragma unroll
      for (int peer = 0; peer < PARTS; peer++)
        asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.b16 [a], %2;}" ::"r"(to),
                     "r"(peer), "h"(to_bf16(v[i]))
                     : "memory");
    }
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
  if (warp < count) y[((i64)(first + warp) * HEADS + h) * VALUE + part * 32 + lane] = to_bf16(v);
}
