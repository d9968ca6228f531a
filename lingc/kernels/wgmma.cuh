// Hopper's warpgroup products (sm_90a alone), clusters of two blocks, and matrices stored from fragments.
//
// Operands in shared memory are K-major atoms of 8 rows x 64 bytes under the 64-byte swizzle, which is how the
// `tiled` layout stores 8 rows of a piece. One atom follows the other, 512 bytes apart, along the rows.
#pragma once
#include "device.cuh"

// ---------------------------------------------------------------- warpgroup products

// Descriptor of an operand at a shared address: 64-byte swizzle, 512 bytes from one 8-row group to the next.
// Atoms lie at multiples of 512 bytes; 32 bytes further along K is 2 more in the descriptor.
DEVICE u64 operand_at(u32 address) {
  return (2ull << 62) | (32ull << 32) | (1ull << 16) | (u64)((address & 0x3ffff) >> 4);
}

// The same of the lower half alone, which the other never depends on: kept as 32 bits, additions stay in the registers that
// products take descriptors from.
DEVICE u64 descriptor(u32 low) { return ((u64)(2u << 30 | 32u) << 32) | low; }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Registers that products in flight write: neither read nor moved across this point.
template <int count>
DEVICE void pin(float* d) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define R8_0 R8(0, 1, 2, 3, 4, 5, 6, 7)
#define R16_0 R8_0 "," R8(8, 9, 10, 11, 12, 13, 14, 15)
#define R32_0 R16_0 "," R8(16, 17, 18, 19, 20, 21, 22, 23) "," R8(24, 25, 26, 27, 28, 29, 30, 31)
#define R48_0 R32_0 "," R8(32, 33, 34, 35, 36, 37, 38, 39) "," R8(40, 41, 42, 43, 44, 45, 46, 47)
#define R64_0 R48_0 "," R8(48, 49, 50, 51, 52, 53, 54, 55) "," R8(56, 57, 58, 59, 60, 61, 62, 63)

// d[64, n] (+)= A B^T with A [64, 32 bytes] and B [n, 32 bytes]; `add` 0 overwrites d. Of d, lane (g, t) of warp
// w holds row 16 w + g at columns 8 j + 2 t and the next in d[4 j], d[4 j + 1], and row 16 w + g + 8 in the two
// after. The `_from` take A from registers, four a
// warp as in mma.sync m16n8k16 and m16n8k32.
template <int n>
struct Wgmma;

#define WGMMA(N, REGISTERS, OUTPUTS, I0, I1, I2, I3, I4, I5)                                                       \
  template <>                                                                                                      \
  struct Wgmma<N> {                                                                                                \
    static DEVICE void e4m3(float* d, u64 a, u64 b, int add) {                                                     \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I2 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, %" #I0 ", %" #I1     \
                   ", p, 1, 1;}"                                                                                   \
                   : OUTPUTS                                                                                       \
                   : "l"(a), "l"(b), "r"(add));                                                                    \
    }                                                                                                              \
    static DEVICE void e4m3_from(float* d, const u32* a, u64 b, int add) {                                         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, {%" #I0 ",%" #I1     \
                   ",%" #I2 ",%" #I3 "}, %" #I4 ", p, 1, 1;}"                                                      \
                   : OUTPUTS                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                \
    }                                                                                                              \
    static DEVICE void b16(float* d, u64 a, u64 b, int add) {                                                      \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I2 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" #I0 ", %" #I1     \
                   ", p, 1, 1, 0, 0;}"                                                                             \
                   : OUTPUTS                                                                                       \
                   : "l"(a), "l"(b), "r"(add));                                                                    \
    }                                                                                                              \
    static DEVICE void b16_from(float* d, const u32* a, u64 b, int add) {                                          \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {%" #I0 ",%" #I1     \
                   ",%" #I2 ",%" #I3 "}, %" #I4 ", p, 1, 1, 0;}"                                                   \
                   : OUTPUTS                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                \
    }                                                                                                              \
    static DEVICE void f16_from(float* d, const u32* a, u64 b, int add) {                                          \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS "}, {%" #I0 ",%" #I1       \
                   ",%" #I2 ",%" #I3 "}, %" #I4 ", p, 1, 1, 0;}"                                                   \
                   : OUTPUTS                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                \
    }                                                                                                              \
  };
WGMMA(16, R8_0, D8(0), 8, 9, 10, 11, 12, 13)
WGMMA(32, R16_0, D16(0), 16, 17, 18, 19, 20, 21)
WGMMA(64, R32_0, D32(0), 32, 33, 34, 35, 36, 37)
#define D48_0 D32(0), D16(32)
WGMMA(96, R48_0, D48_0, 48, 49, 50, 51, 52, 53)
#define D64_0 D32(0), D32(32)
WGMMA(128, R64_0, D64_0, 64, 65, 66, 67, 68, 69)

// Registers a thread of this warpgroup has from here on: more, waiting for others to give, or fewer.
template <int count>
DEVICE void registers_keep() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---------------------------------------------------------------- clusters

DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// All threads of all blocks of the cluster; what was written to shared memory before is seen after.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Address of the same object in the shared memory of another block of the cluster.
DEVICE u32 remote_address(const void* p, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
  return r;
}
DEVICE void barrier_arrive_remote(u64* bar, u32 rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_address(bar, rank))
               : "memory");
}

// `bulk_load` for addresses that the compiler can see to be the same in all threads: it keeps them where copies want them.
DEVICE void bulk_load_at(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}

// One lane of a converged warp, chosen by the hardware.
DEVICE bool elected() {
  u32 yes;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(yes));
  return yes != 0;
}

// Scales of INT4 weights, times this, are F16. A weight is exact then where its scale is between 2^-21 and 2^8; below, it
// is off by 2^-29 at most.
#define INT4_SHIFT 16.0f

// A scale, twice.
DEVICE u32 int4_scale(bf16 scale) {
  const float v = from_bf16(scale) * INT4_SHIFT;
  return pack_f16(v, v);
}

// Nibbles 0 and 4 of a tiled word, minus 8, times the scale. 0x6400 is F16 1024: 1024 + n is exact, so is the difference,
// and so is the product.
DEVICE u32 int4_to_f16(u32 word, u32 scale) {
  u32 v;
  asm("{.reg .b32 t; lop3.b32 t, %1, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 t, t, %3; mul.rn.f16x2 %0, t, %2;}"
      : "=r"(v)
      : "r"(word), "r"(scale), "r"(0x64086408u));
  return v;
}

// ---------------------------------------------------------------- fragments to and from shared memory

// Four 8x8 matrices of 16-bit elements, in a warp: lane i's address is row i % 8 of matrix i / 8, and register m
// holds row g, columns 2 t and 2 t + 1 of matrix m; of its transpose in the second pair.
DEVICE void store_matrices(void* row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
DEVICE void store_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
DEVICE void load_matrices(const void* row, u32* v) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_transposed(const void* row, u32* v) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}

// A barrier of some warps of the block; 0 is the block's own.
DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
