// What the launches of MLA for a few tokens share.
//
// Each of them takes a few microseconds, and would spend a good part of these on its first way through its code, whose
// instructions come from far. So what follows the wait for the launches before is gone through once before it, as a
// rehearsal, whose loads and stores of global memory are off, but not branched around: `load_if`, `store_if`.
#pragma once
#include "device.cuh"

DEVICE uint4 load_if(bool yes, const void* p) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"((u32)yes)
      : "memory");
  return v;
}
DEVICE u32 load_word_if(bool yes, const void* p) {
  u32 v;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.cg.u32 %0, [%1];}"
               : "=&r"(v)
               : "l"(p), "r"((u32)yes)
               : "memory");
  return v;
}
DEVICE float2 load_if(bool yes, const float2* p, float2 otherwise) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.cg.v2.f32 {%0, %1}, [%2];}"
               : "+f"(otherwise.x), "+f"(otherwise.y)
               : "l"(p), "r"((u32)yes)
               : "memory");
  return otherwise;
}
DEVICE void store_if(bool yes, void* p, uint4 v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(p), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "r"((u32)yes)
               : "memory");
}
DEVICE void store_if(bool yes, void* p, float2 v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.f32 [%0], {%1, %2};}" ::"l"(p), "f"(v.x), "f"(v.y),
               "r"((u32)yes)
               : "memory");
}
DEVICE void store_if(bool yes, void* p, u32 v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u32 [%0], %1;}" ::"l"(p), "r"(v), "r"((u32)yes)
               : "memory");
}
DEVICE void store_if(bool yes, void* p, bf16 v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.b16 [%0], %1;}" ::"l"(p), "h"(v), "r"((u32)yes)
               : "memory");
}

// A value that the compiler knows nothing of.
DEVICE int hidden(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// A weight, asked for where this stands.
DEVICE uint4 load_weight(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE float power(float v) {  // of two
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// What pack_f16 made of two values.
DEVICE void unpack_f16(u32 pair, float& low, float& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(pair));
}
