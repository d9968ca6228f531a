// Weights of four bits times x in integers.
//
// x becomes integers of 16 bits with a scale for each 128 channels: of elements that are not small beside the largest of
// their block, more than bf16 keeps. The tensor cores multiply bytes, x's high and low ones as two columns, and add up without
// rounding. A weight then costs one instruction for four, where a conversion to bf16 takes eleven for eight.
#pragma once
#include "device.cuh"

// Eight channels of x: 256 high + low = x / scale, to nearest. Bytes lie in the order of `int4_to_s8`: channels 0, 4, 1, 5
// of the shifted word, then 2, 6, 3, 7.
struct Bytes {
  uint2 high, low;
};

// Where in a slice of x the high bytes of its n-th eight channels stand; the low ones follow 64 bytes further. What the
// lanes of a row read at once lies together: with groups of 32 lane t multiplies channels 8 t to 8 t + 7 of each 32, which
// one product holds, else 32 t to 32 t + 31 of 128.
template <int group>
DEVICE u32 s16_place(u32 n) {
  const u32 i = n % 16, t = group == 32 ? i % 4 : i / 4, turn = group == 32 ? i / 4 : i % 4;
  return n / 16 * 256 + turn / 2 * 128 + t * 16 + turn % 2 * 8;
}

// Scale of 128 channels that lie in `lanes` neighbouring lanes, and its inverse, 0 where all are nearly so. High bytes stay
// within 127. Integers have no NaN, so the scale is one where a channel is.
template <int lanes, int count>
DEVICE float s16_scale(const float (&v)[count], float& inverse) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < count; i++) most = max_or_nan(most, fabsf(v[i]));
#pragma unroll
  for (int i = lanes / 2; i > 0; i /= 2) most = max_or_nan(most, __shfl_xor_sync(FULL_WARP, most, i));
  inverse = most > 1e-30f ? __fdividef(32639.0f, most) : 0.0f;
  return most * (1.0f / 32639);
}

DEVICE Bytes to_s16(const float* v, float inverse) {
  u32 pairs[4];  // of channels i and i + 4 the low bytes, 128 too much, then the high ones
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // 1.5 * 2^23 leaves the integer in the low bits; 128 more rounds what stands above the low byte.
    const float a = fmaf(v[i], inverse, 12583040.0f), b = fmaf(v[i + 4], inverse, 12583040.0f);
    pairs[i] = select_bytes(__float_as_uint(a), __float_as_uint(b), 0x5140);
  }
  const u32 low0 = select_bytes(pairs[0], pairs[1], 0x5410), low1 = select_bytes(pairs[2], pairs[3], 0x5410);
  return {{select_bytes(pairs[0], pairs[1], 0x7632), select_bytes(pairs[2], pairs[3], 0x7632)},
          {low0 ^ 0x80808080u, low1 ^ 0x80808080u}};
}

// Of a piece, what lane (g, t) multiplies of rows g and g + 8, with the rows' scales.
template <int group>
struct Nibbles {
  u32 top[4], low[4];
  float top_scale[128 / group], low_scale[128 / group];

  // Returns what says that it is done, for `settle`.
  DEVICE u32 read(const u8* piece, const bf16* scales, int lane) {
    const int g = lane / 4, t = lane % 4;
    u32 done = 0;
    if (group == 32) {  // a word of each quarter: one product may hold one group only
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const u8* at = piece + g * 64 + (q ^ (g / 2)) * 16 + t * 4;
        top[q] = *(const u32*)at, low[q] = *(const u32*)(at + 512);
        done ^= top[q] ^ low[q];
      }
    } else {
      const uint4 a = *(const uint4*)(piece + piece_offset(lane)), b = *(const uint4*)(piece + piece_offset(lane) + 512);
      top[0] = a.x, top[1] = a.y, top[2] = a.z, top[3] = a.w;
      low[0] = b.x, low[1] = b.y, low[2] = b.z, low[3] = b.w;
      done ^= a.x ^ b.x;
    }
#pragma unroll
    for (int i = 0; i < 128 / group; i++) {
      top_scale[i] = from_bf16(scales[i * 16 + g]), low_scale[i] = from_bf16(scales[i * 16 + g + 8]);
      done ^= __float_as_uint(top_scale[i]) ^ __float_as_uint(low_scale[i]);
    }
    return done;
  }

  // Warp. Adds rows g and g + 8 times a token to `tops` and `lows`. v and w are the bytes of x that the lane brings, from
  // its place in the piece and 128 bytes further: column g's, which is high bytes of a token or low ones of the token in
  // front, of lane t's channels. The lane gets columns 2 t and 2 t + 1; `factor` is the scale of their token / 16.
  DEVICE void multiply(float& tops, float& lows, uint4 v, uint4 w, float factor) const {
    const u32 bytes[8] = {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w};
    int c[4] = {};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      mma_s8(c, int4_to_s8(top[q] << 4), int4_to_s8(low[q] << 4), int4_to_s8(top[q]), int4_to_s8(low[q]), bytes[2 * q],
             bytes[2 * q + 1]);
      if (group == 32 || q == 3) {
        tops += (float)(c[0] * 256 + c[1]) * (factor * top_scale[group == 32 ? q : 0]);
        lows += (float)(c[2] * 256 + c[3]) * (factor * low_scale[group == 32 ? q : 0]);
        c[0] = c[1] = c[2] = c[3] = 0;
      }
    }
  }
};
