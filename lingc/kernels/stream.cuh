// A stream of weights through shared memory: one warp's private ring of stages.
//
// The warp that reads a stage also asks for the one that takes its place, so no other warp is ever
// waited for, and the ring can be filled before a kernel waits for the kernels before it: weights
// depend on nobody. A stage arrives by bulk copies that complete on the stage's own barrier.
#pragma once
#include "device.cuh"

template <int length, int bytes>
struct Ring {
  u8* stages;  // `length` stages of `bytes`, aligned to 128
  u64* bars;   // one a stage
  int slot = 0;
  u32 parity = 0;

  DEVICE Ring(u8* stages, u64* bars) : stages(stages), bars(bars) {}

  // By one lane, before anything else.
  DEVICE void init() {
#pragma unroll
    for (int i = 0; i < length; i++) barrier_init(bars + i, 1);
    barrier_init_fence();
  }

  // The oldest stage, once it is there.
  DEVICE const u8* front() {
    barrier_wait(bars + slot, parity);
    return stages + slot * bytes;
  }

  // Warp. After every lane has read the front; `read` is made of a word of each of its loads. Lanes that meet are not
  // enough before the stage is asked for again: a copy has overtaken loads that were begun.
  DEVICE void release(u32 read) { settle(read), __syncwarp(); }

  // After release().
  DEVICE void pop() {
    if (++slot == length) slot = 0, parity ^= 1;
  }
};
