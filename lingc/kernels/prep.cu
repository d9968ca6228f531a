// Activations as gemm.cu reads them: normed, gated, quantized, and laid out in panels; one warp a row.
//
//   codes   [K bytes / 64][padded][64 bytes]   a row's 16-byte quarter c at c ^ (row / 2 % 4)
//   scales  f32 [K / 128][padded], FP8; [padded], INT4: what sums of a row are to be multiplied by
//
// Constants:
//   WIDTH    K, channels of a row; a multiple of 128
//   FORMAT   0 BF16; 1 FP8, quantized per 128 channels; 2 F16 for INT4 weights, in the order of their fragments: what
//            would be BF16, times the power of two that brings the row's largest to 2^14 or above
//   BEFORE   0 nothing; 1 RMS norm; 2 group norm, norm weight and sigmoid of a gate
//   GROUP    channels of a group of the group norm: a multiple of 256, or a power of two from 8 to 128
//   SCATTER  0: row t goes to row t; 1: to `to[t * slots + i]` for each i of `slots`, and with `shared` >= 0 to
//            shared + t; 2: row r = t * (slots + (shared >= 0)) + i goes to `to[t * slots + i]`, the last to shared + t.
//            A destination below 0 is none.
//
// In FORMAT 2, channel 32 t + 4 s + 2 h + e of each 128 stands at 16 s + 8 h + 2 t + e: lane t of a quad, which
// finds 32 neighbouring channels in the 16 bytes it reads of a row of weights, multiplies four in each step s.
#include "device.cuh"

#define VECTORS ((WIDTH + 255) / 256)  // of 8 channels, a lane
#define PAIRED (FORMAT == 1 && WIDTH % 512 == 0)  // two neighbouring lanes make 16 bytes of codes of two vectors
#define BLOCKS (WIDTH / 128)

// Where byte `at` of a row stands.
DEVICE i64 place(i64 padded, i64 row, int at) {
  return ((i64)(at / 64) * padded + row) * 64 + ((at / 16 % 4) ^ ((int)row / 2 % 4)) * 16 + at % 16;
}

extern "C" __global__ void __launch_bounds__(256, 2)
    prep(const bf16* x, const bf16* gate, const bf16* norm_weight, u8* codes, float* scales, const int* to, int rows, int pitch,
         int gate_pitch, int padded, int slots, int shared, float eps) {
  launch_dependents();
  const int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32;
  wait_dependencies();
  if (row >= rows) return;
  const bf16* from = x + (i64)row * pitch;
  const bf16* gates = gate + (i64)row * gate_pitch + gate_pitch - WIDTH;

  // Lane i has the i-th destination.
  int mine = -1, copies = 1;
  if (SCATTER == 0) {
    mine = row;
  } else if (SCATTER == 1) {
    copies = slots + (shared >= 0);
    if (lane < slots) mine = load_fresh(to + (i64)row * slots + lane);
    else if (lane == slots && shared >= 0) mine = shared + row;
  } else {
    const int per = slots + (shared >= 0), t = row / per, i = row - t * per;
    mine = i < slots ? load_fresh(to + (i64)t * slots + i) : shared + t;
  }

  uint4 raw[BEFORE ? VECTORS : 1];
  float scale[BEFORE ? VECTORS : 1];
  if (BEFORE) {
    float square[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const bool live = WIDTH % 256 == 0 || i * 256 + lane * 8 < WIDTH;
      raw[i] = live ? load_fresh((const uint4*)(from + i * 256) + lane) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      float v[8];
      unpack_bf16(raw[i], v);
      square[i] = 0;
#pragma unroll
      for (int e = 0; e < 8; e++) square[i] = fmaf(v[e], v[e], square[i]);
    }
    // Widened anew below: the compiler would keep all of it, and there are not so many registers.
#pragma unroll
    for (int i = 0; i < VECTORS; i++) asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
    constexpr int NORM = BEFORE == 1 ? WIDTH : GROUP;
    if (BEFORE == 2 && NORM < 256) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) scale[i] = rsqrtf(warp_sum<(NORM < 256 ? NORM : 256) / 8>(square[i]) / NORM + eps);
    } else {
      constexpr int PER = BEFORE == 1 ? VECTORS : NORM / 256;
#pragma unroll
      for (int i = 0; i < VECTORS; i += PER) {
        float sum = 0;
#pragma unroll
        for (int j = i; j < i + PER; j++) sum += square[j % VECTORS];
        const float factor = rsqrtf(warp_sum(sum) / NORM + eps);
#pragma unroll
        for (int j = i; j < i + PER; j++) scale[j % VECTORS] = factor;
      }
    }
  }

  // Eight channels of what is multiplied.
  auto value = [&](int i, float* v) {
    const int channel = i * 256 + lane * 8;
    const bool live = WIDTH % 256 == 0 || channel < WIDTH;
    if (BEFORE) {
      unpack_bf16(raw[BEFORE ? i : 0], v);
      float w[8];
      const uint4* at = (const uint4*)(norm_weight + channel);
      unpack_bf16(!live ? uint4{0, 0, 0, 0} : FORMAT == 2 ? load_fresh(at) : __ldg(at), w);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] = v[e] * scale[BEFORE ? i : 0] * w[e];
      if (BEFORE == 2) {
        unpack_bf16(live ? load_fresh((const uint4*)(gates + channel)) : uint4{0, 0, 0, 0}, w);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] *= sigmoid(w[e]);
      }
    } else {
      unpack_bf16(live ? load_fresh((const uint4*)(from + channel)) : uint4{0, 0, 0, 0}, v);
    }
  };
  constexpr int TOGETHER = BEFORE ? VECTORS : 4;

  float up = 1;
  if (FORMAT == 2) {
    float most = 0;
#pragma unroll TOGETHER
    for (int i = 0; i < VECTORS; i++) {
      float v[8];
      value(i, v);
#pragma unroll
      for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(v[e]));
    }
    const int exponent = max((int)(__float_as_uint(from_bf16(to_bf16(warp_max(most)))) >> 23), 19);
    up = __uint_as_float((u32)(268 - exponent) << 23);  // 2^14 over the largest's power of two
    const float down = __uint_as_float((u32)(exponent - 18) << 23);  // its inverse, over INT4_SHIFT of wgmma.cuh
    for (int c = 0; c < copies; c++) {
      const int row_to = __shfl_sync(FULL_WARP, mine, SCATTER == 1 ? c : 0);
      if (row_to >= 0 && lane == 0) scales[row_to] = down;
    }
    // As above: it is all worked out anew.
#pragma unroll
    for (int i = 0; i < (BEFORE ? VECTORS : 0); i++)
      asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
  }

  // Codes of a vector, and the scale that its 16 lanes share.
  auto quantized = [&](float* v, float& step) {
    float most = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(v[e]));
    // Correctly rounded quotients: bf16 inputs meet ties of E4M3 often.
    const float amax = warp_max<16>(most);
    step = amax > 1e-30f ? __fdiv_rn(amax, E4M3_MAX) : 1.0f;
    const float inverse = __frcp_rn(step);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float q = v[e] * inverse;
      v[e] = fmaf(fmaf(-q, step, v[e]), inverse, q);
    }
    return uint2{to_e4m3(v[0], v[1], v[2], v[3]), to_e4m3(v[4], v[5], v[6], v[7])};
  };

  if (PAIRED) {
    // Even lanes have the first vector's 16 bytes, odd ones the second's; lane i has the scales of blocks i, 32 + i, ...
    constexpr int PAIRS = VECTORS / 2, KEPT = SCATTER == 1 && PAIRED ? PAIRS : 1, ROUNDS = (BLOCKS + 31) / 32;
    constexpr int AHEAD = (BEFORE || SCATTER == 1) && PAIRED ? PAIRS : 2;
    const int odd = lane % 2, panel = odd * 4 + lane / 8, quarter = lane / 2 % 4;
    const i64 pitch = (i64)padded * 64;
    float steps[ROUNDS];
    uint4 kept[KEPT];
    auto at = [&](int row_to) { return codes + panel * pitch + (i64)row_to * 64 + (quarter ^ row_to / 2 % 4) * 16; };
#pragma unroll AHEAD
    for (int j = 0; j < PAIRS; j++) {
      uint2 made[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float v[8], step;
        value(2 * j + h, v);
        made[h] = quantized(v, step);
        const float other = __shfl_sync(FULL_WARP, step, odd * 16);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
          if (2 * j + h == r * 16 + lane / 2) steps[r] = other;
      }
      const u32 x = __shfl_xor_sync(FULL_WARP, odd ? made[0].x : made[1].x, 1);
      const u32 y = __shfl_xor_sync(FULL_WARP, odd ? made[0].y : made[1].y, 1);
      const uint4 whole = odd ? uint4{x, y, made[1].x, made[1].y} : uint4{made[0].x, made[0].y, x, y};
      if (SCATTER == 1) kept[j % KEPT] = whole;
      else if (mine >= 0) *(uint4*)(at(mine) + j * 8 * pitch) = whole;
    }
    for (int c = 0; c < copies; c++) {
      const int row_to = SCATTER == 1 ? __shfl_sync(FULL_WARP, mine, c) : mine;
      if (row_to < 0) continue;
      u8* to = at(row_to);
#pragma unroll
      for (int j = 0; j < (SCATTER == 1 ? PAIRS : 0); j++) *(uint4*)(to + j * 8 * pitch) = kept[j % KEPT];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++)
        if (BLOCKS % 32 == 0 || r * 32 + lane < BLOCKS) scales[(i64)(r * 32 + lane) * padded + row_to] = steps[r];
    }
  }

#pragma unroll TOGETHER
  for (int i = 0; i < (PAIRED ? 0 : VECTORS); i++) {
    const int channel = i * 256 + lane * 8;
    const bool live = WIDTH % 256 == 0 || channel < WIDTH;
    float v[8];
    value(i, v);
    if (FORMAT == 1) {
      float step;
      const uint2 made = quantized(v, step);
      for (int c = 0; c < copies; c++) {
        const int row_to = __shfl_sync(FULL_WARP, mine, SCATTER == 1 ? c : 0);
        if (row_to < 0 || !live) continue;
        *(uint2*)(codes + place(padded, row_to, channel)) = made;
        if (lane % 16 == 0) scales[(i64)(channel / 128) * padded + row_to] = step;
      }
    } else {
      u32 made[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        made[e] = pack_bf16(v[2 * e], v[2 * e + 1]);
        if (FORMAT == 2) made[e] = pack_f16(low_bf16(made[e]) * up, high_bf16(made[e]) * up);
      }
      int at = channel * 2;
      if (FORMAT == 2) {
        // Pair (s, h) of lanes t = 0..3, which stand 4 lanes apart, makes 16 bytes: a transpose of four by four.
        const int t = lane / 4 % 4;
        u32 turned[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int i0 = t ^ k;
          const u32 sent = i0 == 0 ? made[0] : i0 == 1 ? made[1] : i0 == 2 ? made[2] : made[3];
          const u32 got = __shfl_xor_sync(FULL_WARP, sent, k * 4);
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (e == i0) turned[e] = got;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) made[e] = turned[e];
        // Our four channels' pairs were (2 m', 0), (2 m', 1), (2 m' + 1, 0), (2 m' + 1, 1), m' = lane % 4; we keep number t.
        at = channel / 128 * 256 + (lane % 4 * 2 + t / 2) * 32 + t % 2 * 16;
      }
      for (int c = 0; c < copies; c++) {
        const int row_to = __shfl_sync(FULL_WARP, mine, SCATTER == 1 ? c : 0);
        if (row_to >= 0 && live) *(uint4*)(codes + place(padded, row_to, at)) = uint4{made[0], made[1], made[2], made[3]};
      }
    }
  }
}
