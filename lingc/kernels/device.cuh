// What CUDA kernels share: Hopper's copies and barriers, conversions, tensor-core products.
//
// Compiled by NVRTC with no header but those of this folder, so types and conversions are spelled
// out here. Every function is for one thread unless its comment says warp. Operand layouts of mma
// are those of the PTX ISA; g = lane / 4 and t = lane % 4 throughout.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef u16 bf16;  // its bits

#define DEVICE __device__ __forceinline__
#define FULL_WARP 0xffffffffu

// ---------------------------------------------------------------- dependent launch

// Lets the next kernel of the stream begin, as far as it can without our results.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before have ended and what they wrote can be seen.
DEVICE void wait_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- shared memory, barriers, bulk copies

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

// After barrier_init, so that copies which begin later see the barriers.
DEVICE void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void barrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// One arrival that also awaits `bytes` more bytes of copies.
DEVICE void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete.
DEVICE void barrier_wait(u64* bar, u32 parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "W%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D%=;\n"
      "bra W%=;\n"
      "D%=:}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// Copies global to shared memory; addresses and size are multiples of 16. The bytes arrive at `bar`.
DEVICE void bulk_load(void* to, const void* from, u32 bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// The same with a cache policy, e.g. `evict_first()` for weights, which nobody reads again soon.
DEVICE void bulk_load(void* to, const void* from, u32 bytes, u64* bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
      : "memory");
}

// Brings bytes near, into L2; address and size are multiples of 16.
DEVICE void bulk_prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

DEVICE u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Waits until `word` is in its register; then the loads that it is made of are done. The copy engine is in no order with
// loads that have merely begun. fence_async() makes one, but it waits for loads from global memory too. What depends on
// the word is a mark for profilers, of no effect.
DEVICE void settle(u32 word) {
  asm volatile("{.reg .pred p; setp.eq.u32 p, %0, 0x9e3779b9; @p pmevent 1;}" ::"r"(word) : "memory");
}

// Before the copy engine or wgmma reads what this thread wrote to shared memory.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

// ---------------------------------------------------------------- global loads of activations

// Past L1, which may hold what an address held before the kernels that we waited for.
DEVICE uint4 load_fresh(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE uint2 load_fresh(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
DEVICE u32 load_fresh(const u32* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE int load_fresh(const int* p) { return (int)load_fresh((const u32*)p); }
DEVICE float load_fresh(const float* p) { return __uint_as_float(load_fresh((const u32*)p)); }
DEVICE bf16 load_fresh(const bf16* p) {
  bf16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

// A weight that is asked for before a wait and used behind it. A load that may be of constants (`nc`, `__ldg`) moves behind
// the wait, to its use, also where it is volatile: nothing that is written can concern it.
DEVICE float load_early(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEVICE uint4 load_early(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// ---------------------------------------------------------------- bf16, f16, E4M3

DEVICE float from_bf16(bf16 v) { return __uint_as_float((u32)v << 16); }
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two values rounded to nearest even, the first in the low half.
DEVICE u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
DEVICE bf16 to_bf16(float v) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

DEVICE u32 pack_f16(float low, float high) {
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// Eight bf16 to f32.
DEVICE void unpack_bf16(uint4 v, float* to) {
  to[0] = low_bf16(v.x), to[1] = high_bf16(v.x), to[2] = low_bf16(v.y), to[3] = high_bf16(v.y);
  to[4] = low_bf16(v.z), to[5] = high_bf16(v.z), to[6] = low_bf16(v.w), to[7] = high_bf16(v.w);
}

// Four E4M3 codes to f16, exactly; low holds the first two.
DEVICE void e4m3_to_f16(u32 codes, u32& low, u32& high) {
  asm("{.reg .b16 a,b; mov.b32 {a,b},%2; cvt.rn.f16x2.e4m3x2 %0,a; cvt.rn.f16x2.e4m3x2 %1,b;}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}

// Four values to E4M3, to nearest even, past the range to +-448; the first in the low byte.
DEVICE u32 to_e4m3(float a, float b, float c, float d) {
  u32 v;
  asm("{.reg .b16 l,h; cvt.rn.satfinite.e4m3x2.f32 l,%2,%1; cvt.rn.satfinite.e4m3x2.f32 h,%4,%3; mov.b32 %0,{l,h};}"
      : "=r"(v)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return v;
}

#define E4M3_MAX 448.0f

// Scale of 128 channels whose largest magnitude is `amax`, and its inverse. Both are 1 where all are zero, or so small
// that the inverse would leave the range of f32.
DEVICE float e4m3_scale(float amax, float& inverse) {
  const float near = amax * (1.0f / E4M3_MAX);
  const float scale = amax > 1e-30f ? fmaf(fmaf(-near, E4M3_MAX, amax), 1.0f / E4M3_MAX, near) : 1.0f;
  inverse = __fdividef(1.0f, scale);
  return scale;
}

// v / scale, correctly rounded: values often lie halfway between two codes, and references divide.
DEVICE float e4m3_ratio(float v, float scale, float inverse) {
  const float near = v * inverse;
  return fmaf(fmaf(-near, scale, v), inverse, near);
}

// Nibbles 0 and 4 of a tiled word, neighbours along K, as bf16 pairs minus 8; shift by 4, 8, 12 for the next.
// 0x4300 is bf16 128: 128 + n is exact, and so is the difference.
DEVICE u32 int4_to_bf16(u32 word) {
  u32 v, r;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(v) : "r"(word));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(0x3f803f80u), "r"(0xc308c308u));  // v * 1 - 136
  return r;
}

// Four nibbles of a tiled word, every second one, as signed bytes 16 (n - 8): channels 2, 6, 3, 7 of the eight; of
// the word shifted left by 4 channels 0, 4, 1, 5.
DEVICE u32 int4_to_s8(u32 word) {
  u32 v;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(v) : "r"(word), "r"(0xf0f0f0f0u), "r"(0x80808080u));  // and, xor
  return v;
}

DEVICE float max_or_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// Four of the eight bytes of `a` and `b`, numbered by the nibbles of `which`.
DEVICE u32 select_bytes(u32 a, u32 b, u32 which) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(which));
  return v;
}

// ---------------------------------------------------------------- tensor cores

// D[16, 8] += A[16, 16] B[16, 8]. a: rows g, g+8, g, g+8 at k = 2t (first two) and 2t + 8; b: column g, the same k.
// c: row g columns 2t, 2t + 1, then row g + 8.
DEVICE void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// D[16, 8] += A[16, 32] B[32, 8] of signed bytes. a: rows g, g+8, g, g+8 at k = 4t (first two) and 4t + 16; b: column g,
// the same k; c as above.
DEVICE void mma_s8(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- within a warp

// Sum or maximum over `width` neighbouring lanes, a power of two; every lane has the result, in a fixed order.
template <int width = 32>
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int i = width / 2; i > 0; i /= 2) v += __shfl_xor_sync(FULL_WARP, v, i);
  return v;
}
template <int width = 32>
DEVICE float warp_max(float v) {
#pragma unroll
  for (int i = width / 2; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, i));
  return v;
}

// 2^v and 1 / v where it matters not that what is tiny becomes zero: plain, either takes three instructions more.
DEVICE float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float inverse_fast(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float sigmoid(float v) { return inverse_fast(1.0f + exp2_fast(v * -1.44269504f)); }
DEVICE float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// ---------------------------------------------------------------- the `tiled` layout (lingc/quantize/layouts.py)

#define PIECE 1024  // bytes: 16 rows of 64

// Where in a piece lane (g, t) finds its 16 bytes of row g; those of row g + 8 lie 512 bytes further.
DEVICE u32 piece_offset(u32 lane) {
  u32 g = lane / 4, t = lane % 4;
  return g * 64 + (t ^ (g / 2 % 4)) * 16;
}
