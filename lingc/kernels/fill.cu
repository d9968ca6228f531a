// Numbers drawn on the device, which depend on the seed and the place alone.
//
// KIND 0: bf16, 1: f32, both offset + scale * n with n of mean 0 and deviation 1, at most 3.5;
// 2: E4M3 codes of at most 1.875, no NaN among them; 3: nibbles from 1 to 15, which are of mean 0
// less 8: a weight that is not makes all tokens alike, and sends them to the same experts.
// `bytes` is a multiple of 4. Nothing comes before it that it would have to wait for: launched
// alone, never dependent.

#include "device.cuh"

DEVICE u64 mix(u64 x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The sum of four uniform numbers of 16 bits: a variance of 4/12.
DEVICE float normal(u64 bits) {
  const u32 sum = (u32)(bits & 0xffff) + (u32)(bits >> 16 & 0xffff) + (u32)(bits >> 32 & 0xffff) +
                  (u32)(bits >> 48);
  return ((float)sum * (1.0f / 65535.0f) - 2.0f) * 1.7320508f;
}

DEVICE u32 nearest_bf16(float x) {  // even of two as near; never NaN here
  const u32 bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

extern "C" __global__ void fill(unsigned char* out, long long bytes, int seed, float scale,
                                float offset) {
  const u64 words = (u64)bytes / 4, stride = (u64)gridDim.x * blockDim.x;
  const u64 start = mix((u64)(u32)seed) ^ 0x5851f42d4c957f2dull;
  u32* to = (u32*)out;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride) {
    const u64 drawn = mix(start + 2 * i);
#if KIND == 0
    const u32 low = nearest_bf16(offset + scale * normal(drawn));
    to[i] = low | nearest_bf16(offset + scale * normal(mix(start + 2 * i + 1))) << 16;
#elif KIND == 1
    to[i] = __float_as_uint(offset + scale * normal(drawn));
#elif KIND == 2
    to[i] = (u32)drawn & 0xbfbfbfbfu;
#else
    const u32 word = (u32)drawn;
    const u32 zero = ~(word | word >> 1 | word >> 2 | word >> 3) & 0x11111111u;
    to[i] = word | zero << 3;
#endif
  }
}
