// lingc/kernels/device.cuh for the CPU: the same functions, one thread a fiber.
#pragma once
#include "fibers.h"

#define DEVICE inline
#define FULL_WARP 0xffffffffu

// ---------------------------------------------------------------- CUDA's own

inline void __syncwarp() { emulator::meet_warp(); }
inline void __syncthreads() { emulator::meet(emulator::named[0], emulator::threads); }
inline void __threadfence() {}

template <class T>
T from_lane(T v, int lane) {
  using namespace emulator;
  static_assert(sizeof v <= 8);
  memcpy(&exchanged[warp()][emulator::lane()][0], &v, sizeof v);
  meet_warp();
  memcpy(&v, &exchanged[warp()][lane & 31][0], sizeof v);
  meet_warp();
  return v;
}
template <class T>
T __shfl_sync(u32, T v, int lane) { return from_lane(v, lane); }
template <class T>
T __shfl_xor_sync(u32, T v, int mask) { return from_lane(v, emulator::lane() ^ mask); }
template <class T>
T __shfl_down_sync(u32, T v, int by) { return from_lane(v, min(emulator::lane() + by, 31)); }
template <class T>
T __shfl_up_sync(u32, T v, int by) { return from_lane(v, max(emulator::lane() - by, 0)); }
inline u32 __ballot_sync(u32, bool yes) {
  using namespace emulator;
  exchanged[warp()][lane()][0] = yes;
  meet_warp();
  u32 all = 0;
  for (int i = 0; i < 32; i++) all |= (u32)exchanged[warp()][i][0] << i;
  meet_warp();
  return all;
}
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __ffs(u32 v) { return __builtin_ffs((int)v); }

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T atomicAdd(T* p, T v) { return std::exchange(*p, *p + v); }

inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float v) { u32 u; memcpy(&u, &v, 4); return u; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __expf(float v) { return expf(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }

// ---------------------------------------------------------------- device.cuh

DEVICE void launch_dependents() {}
DEVICE void wait_dependencies() {}

DEVICE u32 shared_address(const void* p) { return (u32)((const u8*)p - emulator::shared); }
DEVICE void barrier_init(u64* bar, u32 count) { *(emulator::Barrier*)bar = {(u16)count, (u16)count, 0, 0}; }
DEVICE void barrier_init_fence() {}
DEVICE void barrier_arrive(u64* bar) { emulator::arrive(*(emulator::Barrier*)bar, 0); }
DEVICE void barrier_expect(u64* bar, u32 bytes) { emulator::arrive(*(emulator::Barrier*)bar, bytes); }
DEVICE void barrier_wait(u64* bar, u32 parity) {
  while (((emulator::Barrier*)bar)->phase == parity) emulator::yield();
  auto& bars = emulator::reading[emulator::current->thread];
  if (std::find(bars.begin(), bars.end(), bar) == bars.end()) bars.push_back(bar);
}
DEVICE void bulk_load(void* to, const void* from, u32 bytes, u64* bar) {
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16) emulator::fail("copies what is not aligned");
  emulator::may_be_copied_to(bar);
  memset(to, 0xff, bytes);
  emulator::copies.push_back({to, from, bytes, bar, (int)(emulator::random() % 6)});
}
DEVICE void bulk_load(void* to, const void* from, u32 bytes, u64* bar, u64) { bulk_load(to, from, bytes, bar); }
DEVICE void bulk_prefetch(const void*, u32) {}
DEVICE u64 evict_first() { return 0; }
DEVICE void fence_async() { emulator::reading[emulator::current->thread].clear(); }
DEVICE void settle(u32) { fence_async(); }

template <class T>
T load_fresh(const T* p) {
  if ((u64)p % sizeof(T)) emulator::fail("loads what is not aligned");
  return *p;
}
template <class T>
T load_early(const T* p) { return load_fresh(p); }

DEVICE float from_bf16(bf16 v) { return __uint_as_float((u32)v << 16); }
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE bf16 to_bf16(float v) {
  const u32 bits = __float_as_uint(v);
  return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
DEVICE void unpack_bf16(uint4 v, float* to) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 8; i++) to[i] = from_bf16((bf16)(words[i / 2] >> i % 2 * 16));
}

DEVICE float from_e4m3(u8 code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float v = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  if ((code & 127) == 127) v = NAN;
  return code & 128 ? -v : v;
}
DEVICE u8 code_of(float v) {
  if (v != v) return 0x7f;
  const float size = fminf(fabsf(v), 448.0f);
  const int exponent = max(size > 0 ? ilogbf(size) : -6, -6);
  const int steps = (int)nearbyintf(ldexpf(size, 3 - exponent));  // to even; 16 is the next exponent's 8
  return (u8)(((exponent + 6) * 8 + steps) | (std::signbit(v) ? 128 : 0));
}
DEVICE u32 to_e4m3(float a, float b, float c, float d) {
  return code_of(a) | (u32)code_of(b) << 8 | (u32)code_of(c) << 16 | (u32)code_of(d) << 24;
}
// f16 by its bits, to nearest even.
DEVICE u16 f16_of(float v) {
  const u32 sign = __float_as_uint(v) >> 16 & 0x8000;
  const float size = fabsf(v);
  if (v != v) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-5f) return sign | (u32)nearbyintf(ldexpf(size, 24));
  const int exponent = ilogbf(size);
  return sign | (((exponent + 15) << 10) + (u32)nearbyintf(ldexpf(size, 10 - exponent)) - 1024);
}
DEVICE float from_f16(u16 v) {
  const int exponent = v >> 10 & 31, mantissa = v & 0x3ff;
  float size = exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return v & 0x8000 ? -size : size;
}
DEVICE u32 pack_f16(float low, float high) { return f16_of(low) | (u32)f16_of(high) << 16; }
DEVICE void e4m3_to_f16(u32 codes, u32& low, u32& high) {
  low = f16_of(from_e4m3(codes)) | (u32)f16_of(from_e4m3(codes >> 8)) << 16;
  high = f16_of(from_e4m3(codes >> 16)) | (u32)f16_of(from_e4m3(codes >> 24)) << 16;
}
#define E4M3_MAX 448.0f
DEVICE float e4m3_scale(float amax, float& inverse) {
  const float scale = amax > 1e-30f ? amax / E4M3_MAX : 1.0f;
  inverse = 1.0f / scale;
  return scale;
}
DEVICE float e4m3_ratio(float v, float scale, float) { return v / scale; }
DEVICE u32 int4_to_bf16(u32 word) { return pack_bf16((int)(word & 15) - 8, (int)(word >> 16 & 15) - 8); }
DEVICE u32 int4_to_s8(u32 word) { return (word & 0xf0f0f0f0u) ^ 0x80808080u; }
DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
DEVICE u32 select_bytes(u32 a, u32 b, u32 which) {
  const u64 both = (u64)b << 32 | a;
  u32 made = 0;
  for (int i = 0; i < 4; i++) made |= (u32)(u8)(both >> (which >> 4 * i & 7) * 8) << 8 * i;
  return made;
}

// Rows of A and columns of B lie over the lanes as the PTX ISA says for m16n8k16.
template <class Value>
void multiply_fragments(float* c, const u32 (&own)[6], Value value) {
  using namespace emulator;
  for (int i = 0; i < 6; i++) exchanged[warp()][lane()][i] = own[i];
  meet_warp();
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; i++) {
    double sum = 0;
    for (int k = 0; k < 16; k++) {
      const u64* a = exchanged[warp()][g * 4 + k % 8 / 2];
      const u64* b = exchanged[warp()][(2 * t + i % 2) * 4 + k % 8 / 2];
      const int half = k % 2 * 16;
      sum += (double)value((u16)(a[i / 2 + k / 8 * 2] >> half)) * value((u16)(b[4 + k / 8] >> half));
    }
    c[i] += (float)sum;
  }
  meet_warp();
}
DEVICE void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  multiply_fragments(c, {a0, a1, a2, a3, b0, b1}, from_bf16);
}
DEVICE void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  multiply_fragments(c, {a0, a1, a2, a3, b0, b1}, from_f16);
}
DEVICE void mma_s8(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  using namespace emulator;
  const u32 own[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; i++) exchanged[warp()][lane()][i] = own[i];
  meet_warp();
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 32; k++) {
      const u64* a = exchanged[warp()][g * 4 + k % 16 / 4];
      const u64* b = exchanged[warp()][(2 * t + i % 2) * 4 + k % 16 / 4];
      c[i] += (int)(signed char)(a[i / 2 + k / 16 * 2] >> k % 4 * 8) * (signed char)(b[4 + k / 16] >> k % 4 * 8);
    }
  meet_warp();
}

template <int width = 32>
float warp_sum(float v) {
  for (int i = width / 2; i > 0; i /= 2) v += __shfl_xor_sync(FULL_WARP, v, i);
  return v;
}
template <int width = 32>
float warp_max(float v) {
  for (int i = width / 2; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, i));
  return v;
}
DEVICE float exp2_fast(float v) { return exp2f(v); }
DEVICE float inverse_fast(float v) { return 1.0f / v; }
DEVICE float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
DEVICE float silu(float v) { return v / (1.0f + expf(-v)); }

#define PIECE 1024
DEVICE u32 piece_offset(u32 lane) { return lane / 4 * 64 + (lane % 4 ^ (lane / 8 % 4)) * 16; }
