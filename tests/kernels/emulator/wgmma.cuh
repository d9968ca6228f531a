// lingc/kernels/wgmma.cuh for the CPU. Products are done at once; whoever waits for them lets others go first.
#pragma once
#include "device.cuh"

DEVICE u64 operand_at(u32 address) {
  if (address % 32) emulator::fail("multiplies what is not aligned");
  return (address & 0x3ffff) >> 4;
}
DEVICE u64 descriptor(u32 low) { return low; }
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int pending>
void wgmma_wait() { emulator::yield(); }
template <int count>
void pin(float*) {}

// 32 bytes of a row of an operand, out of the 64-byte swizzle.
DEVICE void operand_row(u64 operand, int row, u8* to) {
  for (int half = 0; half < 2; half++) {
    u32 at = (u32)(operand << 4) + row / 8 * 512 + row % 8 * 64 + half * 16;
    at ^= (at >> 7 & 3) << 4;
    memcpy(to + half * 16, emulator::shared + at, 16);
  }
}
enum Kind { E4M3, BF16, F16 };
DEVICE float element(const u8* row, int k, Kind kind) {
  if (kind == E4M3) return from_e4m3(row[k]);
  const u16 bits = row[2 * k] | row[2 * k + 1] << 8;
  return kind == F16 ? from_f16(bits) : from_bf16(bits);
}

template <int n>
struct Wgmma {
  static void multiply(float* d, const u8 (&rows)[2][32], u64 b, int add, Kind kind) {
    const int t = emulator::lane() % 4, depth = kind == E4M3 ? 32 : 16;
    for (int j = 0; j < n / 8; j++)
      for (int e = 0; e < 2; e++) {
        u8 column[32];
        operand_row(b, 8 * j + 2 * t + e, column);
        for (int half = 0; half < 2; half++) {
          float sum = 0, &to = d[4 * j + 2 * half + e];
          for (int k = 0; k < depth; k++) sum += element(rows[half], k, kind) * element(column, k, kind);
          to = (add ? to : 0) + sum;
        }
      }
  }
  static void both_shared(float* d, u64 a, u64 b, int add, Kind kind) {
    const int row = 16 * (emulator::warp() % 4) + emulator::lane() / 4;
    u8 rows[2][32];
    operand_row(a, row, rows[0]), operand_row(a, row + 8, rows[1]);
    multiply(d, rows, b, add, kind);
  }
  // A from registers: four a lane, 4 bytes of row g, of row g + 8, and the same 16 bytes further.
  static void one_shared(float* d, const u32* a, u64 b, int add, Kind kind) {
    using namespace emulator;
    for (int i = 0; i < 4; i++) exchanged[warp()][lane()][i] = a[i];
    meet_warp();
    u8 rows[2][32];
    for (int t = 0; t < 4; t++)
      for (int i = 0; i < 4; i++) memcpy(rows[i % 2] + t * 4 + i / 2 * 16, &exchanged[warp()][lane() / 4 * 4 + t][i], 4);
    meet_warp();
    multiply(d, rows, b, add, kind);
  }
  static void e4m3(float* d, u64 a, u64 b, int add) { both_shared(d, a, b, add, E4M3); }
  static void b16(float* d, u64 a, u64 b, int add) { both_shared(d, a, b, add, BF16); }
  static void e4m3_from(float* d, const u32* a, u64 b, int add) { one_shared(d, a, b, add, E4M3); }
  static void b16_from(float* d, const u32* a, u64 b, int add) { one_shared(d, a, b, add, BF16); }
  static void f16_from(float* d, const u32* a, u64 b, int add) { one_shared(d, a, b, add, F16); }
};

template <int count>
void registers_keep() {}
template <int count>
void registers_give() {}

DEVICE void bulk_load_at(u32 to, const void* from, u32 bytes, u32 bar) {
  bulk_load(emulator::shared + to, from, bytes, (u64*)(emulator::shared + bar));
}
DEVICE bool elected() { return emulator::lane() == 0; }
#define INT4_SHIFT 16.0f
DEVICE u32 int4_scale(bf16 scale) { return pack_f16(from_bf16(scale) * INT4_SHIFT, from_bf16(scale) * INT4_SHIFT); }
DEVICE u32 int4_to_f16(u32 word, u32 scale) {
  const float by = from_f16(scale);
  return pack_f16(((int)(word & 15) - 8) * by, ((int)(word >> 16 & 15) - 8) * by);
}

// Four matrices of 8 x 8, between registers and the rows whose addresses the lanes hold.
DEVICE void move_matrices(u8* row, u32* v, bool transposed, bool store) {
  using namespace emulator;
  const int g = lane() / 4, t = lane() % 4;
  exchanged[warp()][lane()][7] = (u64)row;
  meet_warp();
  for (int m = 0; m < 4; m++)
    for (int e = 0; e < 2; e++) {
      const int i = transposed ? 2 * t + e : g, j = transposed ? g : 2 * t + e;
      u16* at = (u16*)exchanged[warp()][m * 8 + i][7] + j;
      if (store) *at = (u16)(v[m] >> 16 * e);
      else v[m] = (e ? v[m] & 0xffff : 0) | (u32)*at << 16 * e;
    }
  meet_warp();
}
DEVICE void store_matrices(void* row, u32 a, u32 b, u32 c, u32 d) {
  u32 v[4] = {a, b, c, d};
  move_matrices((u8*)row, v, false, true);
}
DEVICE void store_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
  u32 v[4] = {a, b, c, d};
  move_matrices((u8*)row, v, true, true);
}
DEVICE void load_matrices(const void* row, u32* v) { move_matrices((u8*)row, v, false, false); }
DEVICE void load_transposed(const void* row, u32* v) { move_matrices((u8*)row, v, true, false); }

DEVICE void named_barrier(int id, int threads) { emulator::meet(emulator::named[id], threads); }
