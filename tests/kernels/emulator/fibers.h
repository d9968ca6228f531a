// A block of a CUDA kernel on the CPU: every thread a fiber, one block after another.
//
// Fibers change over where threads wait for each other, warps in a random order, so that a missing barrier has its
// chance to show. Copies arrive late, and until then their destination holds 0xff. What blocks of one launch do to each
// other shows only from a lower to a higher number; clusters are not there.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef u16 bf16;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y, z; };

using std::max;
using std::min;

namespace emulator {

constexpr int STACK = 128 * 1024, PATIENCE = 100000;  // rounds in which nobody gets anywhere

struct Meeting {  // of a number of threads, again and again
  int there = 0;
  unsigned turn = 0;
};
struct Fiber {
  ucontext_t context;
  int thread;
  bool done;
  std::vector<char> stack;
};
struct Copy {
  void* to;
  const void* from;
  u32 bytes;
  u64* bar;
  int delay;
};

inline Fiber* current;
inline ucontext_t home;
inline Index block, grid;
inline int threads;
inline u8* shared;
inline Meeting warps[32], named[16];
inline u64 exchanged[32][32][8];  // [warp][lane]
inline std::vector<Copy> copies;
// Of each thread: barriers of copies that it has waited for. It may be reading their bytes until it settles that.
inline std::vector<u64*> reading[1024];
inline u32 state;
inline long idle;

inline u32 random() { return (state = state * 1664525u + 1013904223u) >> 8; }
inline void yield() { swapcontext(&current->context, &home); }
inline int lane() { return current->thread % 32; }
inline int warp() { return current->thread / 32; }

inline bool arrive(Meeting& at, int count) {
  if (++at.there < count) return false;
  at.there = 0, at.turn++, idle = 0;
  return true;
}
inline void meet(Meeting& at, int count) {
  const unsigned turn = at.turn;
  if (!arrive(at, count))
    while (at.turn == turn) yield();
}
inline void meet_warp() { meet(warps[warp()], 32); }

// What a kernel did wrong; the launch ends with it.
inline char problem[256];
inline void fail(const char* what) {
  if (!problem[0]) snprintf(problem, sizeof problem, "block %d, thread %d: %s", block.x, current ? current->thread : -1, what);
  while (current) yield();
}

// An mbarrier, in its own eight bytes.
struct Barrier {
  u16 count, missing;
  u32 bytes : 31, phase : 1;
};
inline void settle(Barrier& bar) {
  if (bar.missing || bar.bytes) return;
  bar.missing = bar.count, bar.phase ^= 1, idle = 0;
}
inline void arrive(Barrier& bar, u32 bytes) {
  if (!bar.missing) fail("arrives at a barrier that nobody is missing from");
  bar.missing--, bar.bytes += bytes;
  settle(bar);
}

// A copy may overtake what a warp reads: it is not in the order that lanes meeting make.
inline void may_be_copied_to(u64* bar) {
  for (int i = 0; i < 32; i++)
    for (const u64* one : reading[warp() * 32 + i])
      if (one == bar) fail("asks for a slot that its warp may still be reading");
}

inline void deliver() {
  for (size_t i = 0; i < copies.size();) {
    Copy& one = copies[i];
    if (--one.delay >= 0) { i++; continue; }
    memcpy(one.to, one.from, one.bytes);
    Barrier& bar = *(Barrier*)one.bar;
    bar.bytes -= one.bytes;
    settle(bar);
    one = copies.back(), copies.pop_back();
  }
}

template <class Body>
void run(Index size, int count, int shared_bytes, Body body) {
  static std::vector<Fiber> fibers;
  static Body* now;
  now = &body, grid = size, threads = count, state = 1;
  if ((int)fibers.size() < count) fibers = std::vector<Fiber>(count);
  u8* memory = (u8*)aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024);
  problem[0] = 0;
  for (int b = 0; b < size.x * size.y * size.z && !problem[0]; b++) {
    block = Index{b % size.x, b / size.x % size.y, b / size.x / size.y}, shared = memory, idle = 0;
    memset(memory, 0xff, shared_bytes);
    for (auto& one : warps) one = Meeting();
    for (auto& one : named) one = Meeting();
    for (int i = 0; i < count; i++) {
      reading[i].clear();
      Fiber& one = fibers[i];
      one.stack.resize(STACK), one.thread = i, one.done = false;
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.data(), one.context.uc_stack.ss_size = STACK;
      one.context.uc_link = nullptr;
      makecontext(&one.context, +[] { (*now)(), current->done = true, yield(); }, 0);
    }
    for (int left = count; left > 0;) {
      const int first = random() % (count / 32);
      for (int w = 0; w < count / 32; w++) {
        if (left > 32 && random() % 4 == 0) continue;
        for (int i = 0; i < 32; i++) {
          Fiber& one = fibers[(first + w) % (count / 32) * 32 + i];
          if (one.done) continue;
          current = &one;
          swapcontext(&home, &one.context);
          current = nullptr;
          if (one.done) left--, idle = 0;
        }
      }
      deliver();
      if (++idle > PATIENCE) fail("everyone waits");
      if (problem[0]) break;
    }
    if (!problem[0] && !copies.empty()) fail("ends with copies under way");
    copies.clear();
  }
  free(memory);
}

template <class... Types, size_t... n>
void call(void (*kernel)(Types...), void** arguments, std::index_sequence<n...>) {
  kernel(*(Types*)arguments[n]...);
}
template <class... Types>
void launch(void (*kernel)(Types...), Index size, int count, int shared_bytes, void** arguments) {
  run(size, count, shared_bytes, [=] { call(kernel, arguments, std::index_sequence_for<Types...>()); });
}

}  // namespace emulator

#define __global__
#define __shared__ static
#define __constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define threadIdx (Index{emulator::current->thread, 0, 0})
#define blockIdx emulator::block
#define gridDim emulator::grid
#define blockDim (Index{emulator::threads, 1, 1})
