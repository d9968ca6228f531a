// An experiment, not part of lingc: how near the read ceiling can y = W x for up to 8 tokens come on Hopper?
// Findings and figures: weight-streaming.md beside this file.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o weight_streaming weight_streaming.cu
//   ./weight_streaming          checks every weight type against float64 first, then times; exit 1 if a check fails
//
// Each warp owns 16 rows of W and a slice of K. It streams them through a private ring in shared memory with bulk
// copies; the ring is filled before the wait on the preceding kernel (programmatic dependent launch), since weights
// depend on nobody. W is the 16-row operand of mma.sync, x the 8-column one, read straight into registers.
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <vector>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CK(x) do { cudaError_t e_ = (x); if (e_) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); exit(1); } } while (0)
enum { FP8 = 0, BF16 = 1, INT4 = 2 };
#define CODES 2048
__device__ __forceinline__ unsigned su(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bulk(void* dst, const void* src, unsigned bytes, void* bar) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(su(bar)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(su(dst)), "l"(src), "r"(bytes), "r"(su(bar)) : "memory"); }
__device__ __forceinline__ void wait(void* bar, unsigned phase) {
  asm volatile("{.reg .pred p; W%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D%=; bra W%=; D%=:}" :: "r"(su(bar)), "r"(phase) : "memory"); }
__device__ __forceinline__ void mma16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
__device__ __forceinline__ void mmah(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
__device__ __forceinline__ void cvt4(unsigned w, unsigned& lo, unsigned& hi) { asm("{.reg .b16 a,b; mov.b32 {a,b},%2; cvt.rn.f16x2.e4m3x2 %0,a; cvt.rn.f16x2.e4m3x2 %1,b;}" : "=r"(lo), "=r"(hi) : "r"(w)); }
__device__ __forceinline__ unsigned deq(unsigned q) { unsigned v; asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(v) : "r"(q)); __nv_bfloat162 k = __floats2bfloat162_rn(136.f, 136.f); __nv_bfloat162 r = __hsub2(*(__nv_bfloat162*)&v, k); return *(unsigned*)&r; }

template <int T, int KS, int TILES>
__global__ void __launch_bounds__(KS * TILES * 32) gemv(const uint8_t* __restrict__ W, const float* __restrict__ ws, const uint8_t* __restrict__ x, const float* __restrict__ xs, float* __restrict__ y, int N, int K, int M, int depth) {
  constexpr int KST = T == FP8 ? 128 : T == BF16 ? 64 : 256;     // K of a 2 KB stage of 16 rows
  constexpr int NW = KS * TILES; constexpr int STAGE = T == INT4 ? CODES + 64 : CODES;
  extern __shared__ __align__(128) uint8_t sm[];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint8_t* ring = sm + warp * depth * STAGE;
  uint64_t* bars = (uint64_t*)(sm + NW * depth * STAGE) + warp * depth;
  int ks = warp % KS, tile = blockIdx.x * TILES + warp / KS;
  int stages = K / KST, per = stages / KS, s0 = ks * per;
  const uint8_t* p = W + ((size_t)tile * stages + s0) * STAGE;
  asm volatile("griddepcontrol.launch_dependents;");
  if (lane == 0) {
    for (int i = 0; i < depth; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(su(bars + i)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < depth && i < per; i++) bulk(ring + i * STAGE, p + (size_t)i * STAGE, STAGE, bars + i);
  }
  int kb = K / 128;
  float mysc = 0; if (T == FP8 && lane < per) mysc = ws[(size_t)(tile / 8) * kb + s0 + lane];
  __syncwarp();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  constexpr int NX = T == INT4 ? 8 : 2; constexpr int XB = T == FP8 ? 128 : T == BF16 ? 128 : 512;  // bytes of x in a stage
  bool live = g < M; int xbytes = K * (T == FP8 ? 1 : 2);
  const uint8_t* xg = x + (size_t)g * xbytes + (size_t)s0 * XB;
  uint4 xn[NX]; float fn0 = 0, fn1 = 0;
  auto loadx = [&](int i) {
#pragma unroll
    for (int h = 0; h < NX; h++) { int o = T == INT4 ? (h / 4) * 256 + t * 64 + (h % 4) * 16 : h * 64 + t * 16; xn[h] = live && i < per ? *(const uint4*)(xg + (size_t)i * XB + o) : uint4{0, 0, 0, 0}; }
    if (T == FP8 && i < per) { fn0 = 2 * t < M ? xs[2 * t * kb + s0 + i] : 0; fn1 = 2 * t + 1 < M ? xs[(2 * t + 1) * kb + s0 + i] : 0; } };
  loadx(0);
  float acc[4] = {0, 0, 0, 0}, acd[4] = {0, 0, 0, 0};
  int slot = 0; unsigned phase = 0;
  for (int i = 0; i < per; i++) {
    float sc = __shfl_sync(~0u, mysc, i & 31); if (T == FP8 && i >= 32) sc = ws[(size_t)(tile / 8) * kb + s0 + i];
    uint4 xv[NX]; float f0 = fn0 * sc, f1 = fn1 * sc;
#pragma unroll
    for (int h = 0; h < NX; h++) xv[h] = xn[h];
    loadx(i + 1);
    wait(bars + slot, phase);
    const uint4* w = (const uint4*)(ring + slot * STAGE);
    uint4 a0 = w[lane], b0 = w[32 + lane], a1 = w[64 + lane], b1 = w[96 + lane]; const __nv_bfloat16* isc = (const __nv_bfloat16*)(w + 128); float i0 = 0, i1 = 0, i2 = 0, i3 = 0; if (T == INT4) { i0 = isc[g]; i1 = isc[g + 8]; i2 = isc[16 + g]; i3 = isc[24 + g]; }
    __syncwarp();
    if (lane == 0 && i + depth < per) bulk(ring + slot * STAGE, p + (size_t)(i + depth) * STAGE, STAGE, bars + slot);
    if (++slot == depth) { slot = 0; phase ^= 1; }
    if (T == FP8) {
      float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint4 va = h ? a1 : a0, vb = h ? b1 : b0; uint4 v, u; cvt4(xv[h].x, v.x, v.y); cvt4(xv[h].y, v.z, v.w); cvt4(xv[h].z, u.x, u.y); cvt4(xv[h].w, u.z, u.w);
        unsigned p0, p1, q0, q1;
        cvt4(va.x, p0, p1); cvt4(vb.x, q0, q1); mmah(c, p0, q0, p1, q1, v.x, v.y);
        cvt4(va.y, p0, p1); cvt4(vb.y, q0, q1); mmah(d, p0, q0, p1, q1, v.z, v.w);
        cvt4(va.z, p0, p1); cvt4(vb.z, q0, q1); mmah(c, p0, q0, p1, q1, u.x, u.y);
        cvt4(va.w, p0, p1); cvt4(vb.w, q0, q1); mmah(d, p0, q0, p1, q1, u.z, u.w);
      }
      acc[0] += (c[0] + d[0]) * f0; acc[1] += (c[1] + d[1]) * f1; acc[2] += (c[2] + d[2]) * f0; acc[3] += (c[3] + d[3]) * f1;
    } else if (T == BF16) {
      mma16(acc, a0.x, b0.x, a0.y, b0.y, xv[0].x, xv[0].y); mma16(acd, a0.z, b0.z, a0.w, b0.w, xv[0].z, xv[0].w);
      mma16(acc, a1.x, b1.x, a1.y, b1.y, xv[1].x, xv[1].y); mma16(acd, a1.z, b1.z, a1.w, b1.w, xv[1].z, xv[1].w);
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint4 va = h ? a1 : a0, vb = h ? b1 : b0; const unsigned pa[4] = {va.x, va.y, va.z, va.w}, pb[4] = {vb.x, vb.y, vb.z, vb.w};
        float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int q = 0; q < 4; q++) { uint4 v = xv[(h * 4 + q) % NX]; unsigned wa = pa[q], wb = pb[q];
          mma16(c, deq(wa), deq(wb), deq(wa >> 4), deq(wb >> 4), v.x, v.y); mma16(d, deq(wa >> 8), deq(wb >> 8), deq(wa >> 12), deq(wb >> 12), v.z, v.w); }
        float g0 = h ? i2 : i0, g1 = h ? i3 : i1;
        acc[0] += (c[0] + d[0]) * g0; acc[1] += (c[1] + d[1]) * g0; acc[2] += (c[2] + d[2]) * g1; acc[3] += (c[3] + d[3]) * g1;
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 4; q++) acc[q] += acd[q];
  int n = tile * 16 + g;
  if (KS > 1) {
    __syncthreads();
    float4* red = (float4*)sm; red[warp * 32 + lane] = float4{acc[0], acc[1], acc[2], acc[3]};
    __syncthreads();
    if (ks) return;
    for (int j = 1; j < KS; j++) { float4 o = red[(warp + j) * 32 + lane]; acc[0] += o.x; acc[1] += o.y; acc[2] += o.z; acc[3] += o.w; }
  }
  if (2 * t < M) { y[(size_t)(2 * t) * N + n] = acc[0]; y[(size_t)(2 * t) * N + n + 8] = acc[2]; }
  if (2 * t + 1 < M) { y[(size_t)(2 * t + 1) * N + n] = acc[1]; y[(size_t)(2 * t + 1) * N + n + 8] = acc[3]; }
}
static cudaStream_t s; static char* pool; static const size_t POOL = 12ull << 30;
struct Shape { const char* name; int N, K, M; };
template <int T, int KS, int TILES> void run(Shape h, int kb_ring) {
  constexpr int KST = T == FP8 ? 128 : T == BF16 ? 64 : 256;
  int N = h.N, K = h.K, M = h.M; size_t wb = T == FP8 ? (size_t)N * K : T == BF16 ? 2ull * N * K : (size_t)N * K / 2 + (size_t)N * (K / 128) * 2; constexpr int STAGE = T == INT4 ? CODES + 64 : CODES;
  if ((K / KST) % KS || N % (16 * TILES)) return;
  size_t sb = T == FP8 ? (size_t)((N + 127) / 128) * (K / 128) * 4 : 0;
  int per = K / KST / KS, depth = std::min(per, kb_ring * 1024 / (KS * TILES) / STAGE); if (depth < 2) return;
  int nb = std::min<size_t>(48, (POOL - (1 << 28)) / (wb + sb + 65536)); char* x = pool + POOL - (1 << 27); float* xs = (float*)(x + (1 << 22)); float* y = (float*)(x + (1 << 23));
  auto k = gemv<T, KS, TILES>; size_t shm = (size_t)KS * TILES * depth * (STAGE + 8) + 256; shm = std::max<size_t>(shm, KS * TILES * 512);
  if (shm > 227 * 1024) return; CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shm));
  const int L = std::max(12, nb); cudaGraph_t g; cudaGraphExec_t ge;
  CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < L; i++) {
    cudaLaunchConfig_t c = {}; c.gridDim = N / 16 / TILES; c.blockDim = KS * TILES * 32; c.stream = s; c.dynamicSmemBytes = shm;
    cudaLaunchAttribute a; a.id = cudaLaunchAttributeProgrammaticStreamSerialization; a.val.programmaticStreamSerializationAllowed = 1; c.attrs = &a; c.numAttrs = 1;
    char* w = pool + (size_t)(i % nb) * ((wb + sb + 65535) / 65536 * 65536);
    CK(cudaLaunchKernelEx(&c, k, (const uint8_t*)w, (const float*)(w + wb), (const uint8_t*)x, (const float*)xs, y, N, K, M, depth));
  }
  CK(cudaStreamEndCapture(s, &g)); CK(cudaGraphInstantiate(&ge, g, 0));
  cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1); std::vector<float> t;
  for (int r = 0; r < 13; r++) { cudaEventRecord(e0, s); cudaGraphLaunch(ge, s); cudaEventRecord(e1, s); CK(cudaEventSynchronize(e1)); float ms; cudaEventElapsedTime(&ms, e0, e1); if (r > 2) t.push_back(ms * 1e3f / L); }
  CK(cudaGetLastError()); cudaGraphExecDestroy(ge); cudaGraphDestroy(g); std::sort(t.begin(), t.end());
  int occ = 0; cudaOccupancyMaxActiveBlocksPerMultiprocessor(&occ, k, KS * TILES * 32, shm); cudaFuncAttributes at; cudaFuncGetAttributes(&at, k);
  float us = t[t.size() / 2]; double tb = (wb + sb) / us / 1e6;
  printf("%-16s M%d ks%-2d tiles%-2d ring%-3dKB depth%-2d grid %d | %7.2f us  %.2f TB/s  %4.1f%% | occ %d regs %d shm %zu\n", h.name, M, KS, TILES, kb_ring, depth, N / 16 / TILES, us, tb, 100 * tb / 4.70, occ, at.numRegs, shm / 1024);
}
template <int T> void shape(Shape h) { for (int r : {32, 48, 64, 100}) {
  run<T, 1, 8>(h, r); run<T, 2, 8>(h, r); run<T, 1, 4>(h, r); run<T, 2, 4>(h, r); run<T, 1, 9>(h, r); run<T, 4, 2>(h, r); run<T, 8, 2>(h, r); run<T, 8, 1>(h, r); run<T, 16, 1>(h, r); run<T, 4, 3>(h, r); run<T, 6, 2>(h, r); run<T, 12, 1>(h, r); run<T, 4, 1>(h, r); run<T, 1, 16>(h, r); run<T, 2, 9>(h, r); run<T, 9, 1>(h, r); run<T, 9, 2>(h, r); run<T, 16, 2>(h, r); run<T, 8, 3>(h, r); run<T, 8, 4>(h, r); } }

// ---- gate: small random problems against float64 on the same rounded values
static uint64_t rs = 88172645463325252ull; static double rnd() { rs ^= rs << 13; rs ^= rs >> 7; rs ^= rs << 17; return (double)(rs >> 11) / 9007199254740992.0 * 2 - 1; }
static float e4m3(uint8_t b) { int e = (b >> 3) & 15, m = b & 7; float v = e ? ldexpf(1 + m / 8.f, e - 7) : ldexpf(m / 8.f, -6); return b & 0x80 ? -v : v; }
static uint16_t bf(float f) { unsigned u; memcpy(&u, &f, 4); return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
static float fb(uint16_t h) { unsigned u = (unsigned)h << 16; float f; memcpy(&f, &u, 4); return f; }
template <int T, int KS, int TILES> int gate(int N, int K, int M, int depth) {
  constexpr int KST = T == FP8 ? 128 : T == BF16 ? 64 : 256; constexpr int STAGE = T == INT4 ? CODES + 64 : CODES;
  std::vector<double> w((size_t)N * K), x((size_t)M * K); std::vector<uint8_t> W((size_t)N / 16 * (K / KST) * STAGE), X((size_t)M * K * 2); int kb = K / 128, nb = (N + 127) / 128;
  std::vector<float> ws((size_t)nb * kb), xs((size_t)M * kb);
  for (auto& v : ws) v = 0.01f + 0.01f * fabs(rnd()); for (auto& v : xs) v = 0.5f + 0.5f * fabs(rnd());
  std::vector<float> is((size_t)N * kb); for (auto& v : is) v = fb(bf(0.05f + 0.05f * fabs(rnd())));
  for (int m = 0; m < M; m++) for (int k = 0; k < K; k++) {
    if (T == FP8) { uint8_t b; do b = (uint8_t)(rnd() * 128 + 128); while ((b & 0x7f) > 0x68); X[(size_t)m * K + k] = b; x[(size_t)m * K + k] = (double)e4m3(b) * xs[m * kb + k / 128]; }
    else { uint16_t h = bf((float)rnd()); memcpy(&X[((size_t)m * K + k) * 2], &h, 2); x[(size_t)m * K + k] = fb(h); } }
  for (int n = 0; n < N; n++) for (int k = 0; k < K; k++) {
    int tile = n / 16, r = n % 16, st = k / KST, o = k % KST; uint8_t* S = &W[((size_t)tile * (K / KST) + st) * STAGE];
    int half = o / (KST / 2), q = o % (KST / 2), el = KST / 8, t = q / el, e = q % el, lane = (r % 8) * 4 + t; uint8_t* P = S + ((half * 2 + r / 8) * 32 + lane) * 16;
    if (T == FP8) { uint8_t b; do b = (uint8_t)(rnd() * 128 + 128); while ((b & 0x7f) > 0x68); P[e] = b; w[(size_t)n * K + k] = (double)e4m3(b) * ws[(n / 128) * kb + k / 128]; }
    else if (T == BF16) { uint16_t h = bf((float)rnd()); memcpy(P + e * 2, &h, 2); w[(size_t)n * K + k] = fb(h); }
    else { int v = (int)((rnd() + 1) * 8) & 15, word = e / 8, i = e % 8, pos = (i % 2) * 4 + i / 2; unsigned u; memcpy(&u, P + word * 4, 4); u = (u & ~(15u << (4 * pos))) | ((unsigned)v << (4 * pos)); memcpy(P + word * 4, &u, 4);
      uint16_t sc = bf(is[(size_t)n * kb + k / 128]); memcpy(S + CODES + (half * 16 + r) * 2, &sc, 2); w[(size_t)n * K + k] = (v - 8) * (double)is[(size_t)n * kb + k / 128]; } }
  uint8_t *dW, *dX; float *dws, *dxs, *dy; CK(cudaMalloc(&dW, W.size())); CK(cudaMalloc(&dX, X.size())); CK(cudaMalloc(&dws, ws.size() * 4)); CK(cudaMalloc(&dxs, xs.size() * 4)); CK(cudaMalloc(&dy, (size_t)M * N * 4));
  cudaMemcpy(dW, W.data(), W.size(), cudaMemcpyHostToDevice); cudaMemcpy(dX, X.data(), X.size(), cudaMemcpyHostToDevice); cudaMemcpy(dws, ws.data(), ws.size() * 4, cudaMemcpyHostToDevice); cudaMemcpy(dxs, xs.data(), xs.size() * 4, cudaMemcpyHostToDevice); cudaMemset(dy, 0xff, (size_t)M * N * 4);
  auto k = gemv<T, KS, TILES>; size_t shm = std::max<size_t>((size_t)KS * TILES * depth * (STAGE + 8) + 256, KS * TILES * 512); CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shm));
  k<<<N / 16 / TILES, KS * TILES * 32, shm>>>(dW, dws, dX, dxs, dy, N, K, M, depth); CK(cudaDeviceSynchronize());
  std::vector<float> y((size_t)M * N); cudaMemcpy(y.data(), dy, y.size() * 4, cudaMemcpyDeviceToHost); double num = 0, den = 0; bool nan = false;
  for (int m = 0; m < M; m++) for (int n = 0; n < N; n++) { double a = 0; for (int k2 = 0; k2 < K; k2++) a += w[(size_t)n * K + k2] * x[(size_t)m * K + k2]; double d = y[(size_t)m * N + n] - a; nan |= !(d == d); num += d * d; den += a * a; }
  double e = sqrt(num / den); bool ok = e < 1e-4 && !nan; printf("gate type %d N%d K%d M%d ks%d tiles%d depth%d: %.2e %s\n", T, N, K, M, KS, TILES, depth, e, ok ? "ok" : "WRONG");
  cudaFree(dW); cudaFree(dX); cudaFree(dws); cudaFree(dxs); cudaFree(dy); return !ok; }
int gates() { int bad = 0; for (int M : {1, 3, 8}) { bad += gate<FP8, 8, 1>(256, 4096, M, 2); bad += gate<FP8, 2, 4>(256, 2048, M, 3); bad += gate<FP8, 1, 8>(128, 5120, M, 2); bad += gate<BF16, 8, 1>(128, 4096, M, 2); bad += gate<BF16, 4, 1>(64, 1536, M, 6); bad += gate<INT4, 8, 1>(128, 4096, M, 2); bad += gate<INT4, 2, 4>(128, 2048, M, 2); } return bad; }
__global__ void fillk(uint4* p, size_t n) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) { unsigned h = (unsigned)(i * 2654435761u) ^ (unsigned)(i >> 13); h ^= h >> 15; h *= 2246822519u; p[i] = uint4{h & 0x3f3f3f3f, (h * 3) & 0x3f3f3f3f, (h * 5) & 0x3f3f3f3f, (h * 7) & 0x3f3f3f3f}; } }
int main() {
  if (gates()) return 1;
  CK(cudaStreamCreate(&s)); CK(cudaMalloc(&pool, POOL)); fillk<<<1024, 256>>>((uint4*)pool, POOL / 16); CK(cudaDeviceSynchronize());
  for (int M : {1, 4}) {
    printf("---- FP8\n"); shape<FP8>({"qkvg 16384x4096", 16384, 4096, M}); shape<FP8>({"dense 4096x4096", 4096, 4096, M}); shape<FP8>({"up 18432x4096", 18432, 4096, M}); shape<FP8>({"down 4096x9216", 4096, 9216, M});
    if (M == 4) break;
    printf("---- BF16\n"); shape<BF16>({"qkv_a 2112x4096", 2112, 4096, M}); shape<BF16>({"q_b 6144x1536", 6144, 1536, M}); shape<BF16>({"lm 157184x4096", 157184, 4096, M});
    printf("---- INT4\n"); shape<INT4>({"qkvg 16384x4096", 16384, 4096, M}); shape<INT4>({"dense 4096x4096", 4096, 4096, M}); shape<INT4>({"up 18432x4096", 18432, 4096, M}); shape<INT4>({"down 4096x9216", 4096, 9216, M});
  }
}
