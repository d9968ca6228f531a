// Cosines and sines of the rotary embedding: plugins/rope_table.py has the maths.
//
// The angle is the f32 product that the reference takes. Whole turns are taken off in f64, with a remainder that is
// exact to 1e-11 for angles up to 1e6; what is left is at most half a turn, of which f32 functions are exact to an ulp
// or two.
//
// Constants: RATES, the bits of the f32 frequencies, and COUNT of them.
#include "device.cuh"

__constant__ const u32 rates[COUNT] = {RATES};

extern "C" __global__ void __launch_bounds__(256)
    rope_table(const int* positions, float* cosines, float* sines, int tokens, float scale) {
  launch_dependents();
  wait_dependencies();
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= (i64)tokens * COUNT) return;
  const double angle = (float)load_fresh(positions + i / COUNT) * __uint_as_float(rates[i % COUNT]);
  const double turns = rint(angle * 0.15915494309189535);
  const float rest = (float)fma(-turns, 2.4492935982947064e-16, fma(-turns, 6.283185307179586, angle));
  cosines[i] = cosf(rest) * scale, sines[i] = sinf(rest) * scale;
}
