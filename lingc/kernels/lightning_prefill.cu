// Lightning attention over whole sequences, by chunks of 64 tokens, for heads of 128 x 128 (sm_90a).
//
// A sequence is cut into segments of `span` tokens so that one long sequence fills a device. `segment_ends` finds the
// state after each segment but a sequence's last, as if the segment began from zero (the first begins from the
// sequence's state). `outputs` starts each segment from the decayed sum of the ends before it.
//
// A block is one head of one segment. Two warpgroups keep the state, transposed and in registers, each 64 of its
// value channels: S^T [v, k]. So the state is the operand that wgmma takes from registers, and only the decayed scores
// P [i, j] of a chunk go through shared memory. A third warpgroup loads chunks ahead and makes their scores:
//
//     o^T = (S^T q^T) since(i) + v^T P^T        since(i) = scale exp(-s (i + 1))
//     S^T = exp(-s n) S^T + (v until(j))^T k    until(j) = exp(-s (n - 1 - j))
//
// q, k and v are exact in bf16. What is not (S, P, v until) goes into the products as two bf16 numbers, high and low,
// which leaves 2^-18. A chunk's sum is added to the state in f32 outside the tensor cores, which would truncate, and
// exp(-s n) has two parts too: over thousands of chunks both would show.
#include "wgmma.cuh"

#define CHUNK 64
#define WIDTH 128                 // of a head's keys and of its values
#define TILE (CHUNK * WIDTH * 2)  // bytes of a chunk of q, k or v
#define HALF (TILE / 2)           // 64 of its channels: 64 rows of 128 bytes, 16-byte pieces swizzled
#define MATRIX (WIDTH * WIDTH)    // numbers of one state
#define KEEPERS 256               // threads that keep the state
#define THREADS 384
#define KEEPER_REGISTERS 208
#define LOADER_REGISTERS 88
#define LOG2E 1.4426950408889634f

// ---------------------------------------------------------------- operands

// Rows of 128 bytes under the 128-byte swizzle, 8 rows together. Read along the row (K-major), or across rows with the
// next 64 channels HALF bytes further (MN-major).
DEVICE u64 along_rows(u32 address) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4); }
DEVICE u64 across_rows(u32 address) {
  return (1ull << 62) | (64ull << 32) | ((u64)(HALF >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
DEVICE u32 swizzled(u32 row, u32 piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// d[64, 128] (+)= A B, A from registers, B [16, 128] read across rows.
DEVICE void product_across(float* d, const u32* a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64_0 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"
      : D32(0), D32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Two numbers as bf16 pairs, high + low.
DEVICE void halves(float a, float b, u32& high, u32& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_bf16(high), b - high_bf16(high));
}

// ---------------------------------------------------------------- where a segment lies

struct Segment {
  int sequence;  // `sequences` for the tokens that no sequence has; more where there is no such segment
  int number;    // in the sequence
  int base;      // of the sequence's states in `starts`, which only sequences of several segments have
  int start, stop;  // of the sequence
  int begin, end;   // of the segment
};

// A whole warp; offsets has sequences + 1 entries.
DEVICE Segment locate(int index, const int* offsets, int sequences, int tokens, int span) {
  const int lane = threadIdx.x % 32;
  int before = 0, held = 0;
  for (int first = 0; first <= sequences; first += 32) {
    const int b = first + lane;
    const int from = b <= sequences ? load_fresh(offsets + b) : tokens;
    const int to = b < sequences ? load_fresh(offsets + b + 1) : tokens;
    const int count = b <= sequences ? (to - from + span - 1) / span : 0;
    const int states = count > 1 ? count : 0;
    int after = count, below = states;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(FULL_WARP, after, i), more = __shfl_up_sync(FULL_WARP, below, i);
      if (lane >= i) after += other, below += more;
    }
    after += before, below += held;
    const u32 beyond = __ballot_sync(FULL_WARP, b <= sequences && after > index);
    if (beyond) {
      const int one = __ffs(beyond) - 1;
      Segment s;
      s.sequence = first + one;
      s.number = index - __shfl_sync(FULL_WARP, after - count, one);
      s.base = __shfl_sync(FULL_WARP, below - states, one);
      s.start = __shfl_sync(FULL_WARP, from, one);
      s.stop = __shfl_sync(FULL_WARP, to, one);
      s.begin = s.start + s.number * span;
      s.end = min(s.begin + span, s.stop);
      return s;
    }
    before = __shfl_sync(FULL_WARP, after, 31), held = __shfl_sync(FULL_WARP, below, 31);
  }
  Segment none = {};
  none.sequence = sequences + 1;
  return none;
}

// exp(-rate * steps) = high + low.
DEVICE void decay_over(float rate, int steps, float& high, float& low) {
  const double exact = exp(-(double)rate * (double)steps);
  high = (float)exact;
  low = (float)(exact - (double)high);
}

// ---------------------------------------------------------------- chunks in shared memory

DEVICE void copy_async(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// One arrival of this thread once its copies so far are there.
DEVICE void arrive_with_copies(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// 128 threads copy 64 rows of 256 bytes; rows from `rows` on become zero. Not unrolled: the warpgroup that loads has few
// registers, and addresses of all copies would take most of them.
DEVICE void load_tile(u32 to, const bf16* from, int pitch, int thread, int rows) {
  const int row = thread / 16, piece = thread % 16;
  const bf16* source = from + (i64)row * pitch + piece * 8;
  u32 target = to + piece / 8 * HALF + swizzled(row, piece % 8);
#pragma unroll 1
  for (int i = row; i < CHUNK; i += 8) {
    copy_async(target, i < rows ? source : from, i < rows ? 16 : 0);
    target += 1024, source += 8 * pitch;
  }
}

struct Ring {
  u64 *full, *empty;
  int stage, phase;
  DEVICE void next(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// ---------------------------------------------------------------- state

// Of S^T [128 v, 128 k]: warpgroup w has rows 64 w + 16 warp + g and 8 more; kept[4 j], kept[4 j + 1] are columns
// 8 j + 2 t and the next of the first row, the two after of the second.
struct Place {
  int row, column;
  DEVICE Place() {
    const int lane = threadIdx.x % 32;
    row = threadIdx.x / 32 * 16 + lane / 4;
    column = lane % 4 * 2;
  }
};

// From or to [v, k].
DEVICE void read_transposed(float* kept, const float* from) {
  const Place at;
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float* p = from + (at.row + 8 * r) * WIDTH + at.column + 8 * j;
      const uint2 v = load_fresh((const uint2*)p);
      kept[4 * j + 2 * r] = __uint_as_float(v.x);
      kept[4 * j + 2 * r + 1] = __uint_as_float(v.y);
    }
}
DEVICE void write_transposed(const float* kept, float* to) {
  const Place at;
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      *(float2*)(to + (at.row + 8 * r) * WIDTH + at.column + 8 * j) =
          make_float2(kept[4 * j + 2 * r], kept[4 * j + 2 * r + 1]);
}
// From or to [k, v], as slots have it.
DEVICE void read_slot(float* kept, const float* from) {
  const Place at;
#pragma unroll
  for (int i = 0; i < 64; i++)
    kept[i] = load_fresh(from + (at.column + i / 4 * 8 + i % 2) * WIDTH + at.row + i % 4 / 2 * 8);
}
DEVICE void write_slot(const float* kept, float* to) {
  const Place at;
#pragma unroll
  for (int i = 0; i < 64; i++) to[(at.column + i / 4 * 8 + i % 2) * WIDTH + at.row + i % 4 / 2 * 8] = kept[i];
}

// v^T of 64 tokens, 16 value channels a warp, as wgmma's operand of registers: four of each 16 tokens.
DEVICE void load_values(u32* values, const u8* tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const u8* half = tile + threadIdx.x / 128 * HALF;
  const int row = lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; i++) load_transposed(half + swizzled(16 * i + row, piece), values + 4 * i);
}

// v^T until(j), high and low, as the same operand; `fast` is the rate for powers of two. From the last tokens back, eight
// at a time. Rows past `count` are zero, but must not meet an infinite factor.
struct Until {
  float last[2], eight;  // of columns 2 t and the next in the last eight tokens; of eight tokens
  DEVICE Until(float fast) {
    const int column = threadIdx.x % 4 * 2;
    last[0] = exp2f(-fast * (float)(7 - column)), last[1] = exp2f(-fast * (float)(6 - column));
    eight = exp2f(-fast * 8.0f);
  }
};
DEVICE void weigh_values(const u32* values, u32* high, u32* low, const Until& until, float fast, int count) {
  float first = until.last[0], second = until.last[1];
#pragma unroll
  for (int m = 7; m >= 0; m--) {
    if (count < CHUNK) {
      const int lag = count - 1 - 8 * m - threadIdx.x % 4 * 2;
      first = exp2f(-fast * (float)max(lag, 0)), second = exp2f(-fast * (float)max(lag - 1, 0));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = m / 2 * 4 + m % 2 * 2 + r;
      halves(low_bf16(values[i]) * first, high_bf16(values[i]) * second, high[i], low[i]);
    }
    first *= until.eight, second *= until.eight;
  }
}

// added = (v until)^T k, in flight when it returns.
DEVICE void multiply_keys(float* added, const u32* high, const u32* low, u32 keys) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u64 b = across_rows(keys + i * 2048);
    product_across(added, high + 4 * i, b, i > 0);
    product_across(added, low + 4 * i, b, 1);
  }
  wgmma_commit();
}

DEVICE void add_up(float* kept, const float* added, float high, float low) {
#pragma unroll
  for (int i = 0; i < 64; i++) kept[i] = fmaf(high, kept[i], fmaf(low, kept[i], added[i]));
}

// Here and not later: what fills the time of products in flight.
template <int count>
DEVICE void hold(u32* v) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+r"(v[i]));
}

// With TURNS the two warpgroups begin their chunks' products one after the other, so that one computes on while the
// other has the tensor cores. Barriers 3 and 4 of the block; group 0 begins.
DEVICE void give_turn(int group) {
#ifdef TURNS
  asm volatile("bar.arrive %0, %1;" ::"r"(4 - group), "n"(KEEPERS) : "memory");
#endif
}
DEVICE void take_turn(int group) {
#ifdef TURNS
  named_barrier(3 + group, KEEPERS);
#endif
}

// ---------------------------------------------------------------- ends

#ifdef ENDS
#define STAGES 4
#define STAGE (2 * TILE)

// starts f32 [segments, heads, V, K], of sequences of several segments alone: of the first the state that it begins
// from, since `outputs` may write the slot before it has read it for every segment; of another one the end of the segment
// before. Grid: (heads, segments).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    segment_ends(const bf16* k, const bf16* v, const float* decay, const float* state, const int* slots,
                 const int* offsets, const int* positions, float* starts, int tokens, int sequences, int span,
                 int pitch, int v_pitch) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u64 full[STAGES], empty[STAGES];
  const int head = blockIdx.x, heads = gridDim.x, index = blockIdx.y;
  launch_dependents();
  wait_dependencies();
  const Segment at = locate(index, offsets, sequences, tokens, span);
  if (at.sequence >= sequences || at.end >= at.stop) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i, 128), barrier_init(empty + i, KEEPERS / 32);
    barrier_init_fence();
  }
  __syncthreads();
  const int chunks = span / CHUNK;  // whole ones: another segment follows
  Ring ring = {full, empty, 0, 0};
  if (threadIdx.x >= KEEPERS) {
    registers_give<LOADER_REGISTERS>();
    const int thread = threadIdx.x - KEEPERS;
    const bf16* keys = k + (i64)at.begin * pitch + head * WIDTH;
    const bf16* values = v + (i64)at.begin * v_pitch + head * WIDTH;
    for (int c = 0; c < chunks; c++) {
      barrier_wait(empty + ring.stage, ring.phase ^ 1);
      const u32 to = shared_address(shared) + ring.stage * STAGE;
      load_tile(to, keys + (i64)c * CHUNK * pitch, pitch, thread, CHUNK);
      load_tile(to + TILE, values + (i64)c * CHUNK * v_pitch, v_pitch, thread, CHUNK);
      arrive_with_copies(full + ring.stage);
      ring.next(STAGES);
    }
    return;
  }
  registers_keep<KEEPER_REGISTERS>();
  const float rate = load_fresh(decay + head), fast = rate * LOG2E;
  float high, low, kept[64], added[64];
  decay_over(rate, CHUNK, high, low);
#pragma unroll
  for (int i = 0; i < 64; i++) kept[i] = 0.0f;
  const Until until(fast);
  float* mine = starts + ((i64)(at.base + at.number) * heads + head) * MATRIX;
  if (at.number == 0) {
    const int slot = load_fresh(slots + at.sequence);
    if (slot >= 0 && load_fresh(positions + at.start) != 0) read_slot(kept, state + ((i64)slot * heads + head) * MATRIX);
    write_transposed(kept, mine);
  }
  const int group = threadIdx.x / 128;
  if (group == 1) give_turn(1);
  for (int c = 0; c < chunks; c++) {
    const u8* tile = shared + ring.stage * STAGE;
    u32 values[16];
    barrier_wait(full + ring.stage, ring.phase);
    fence_async();
    u32 upper[16], lower[16];
    load_values(values, tile + TILE);
    weigh_values(values, upper, lower, until, fast, CHUNK);
    hold<16>(upper), hold<16>(lower);
    take_turn(group);
    multiply_keys(added, upper, lower, shared_address(tile));
    give_turn(group);
    wgmma_wait<0>();
    pin<64>(added);
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + ring.stage);
    add_up(kept, added, high, low);
    ring.next(STAGES);
  }
  write_transposed(kept, mine + (i64)heads * MATRIX);
}
#else

// ---------------------------------------------------------------- outputs

#define STAGES 3
#define STAGE (3 * TILE)
#define SCORES (2 * HALF)  // bytes: high and low, [i, j]

// Loads chunks and makes their scores.
DEVICE void score(u8* shared, u8* scores, Ring ring, u64* scored, u64* used, const bf16* q, const bf16* k,
                  const bf16* v, int pitch, int v_pitch, int length, float fast, float scale) {
  const int thread = threadIdx.x - KEEPERS, lane = thread % 32, warp = thread / 32;
  const int chunks = (length + CHUNK - 1) / CHUNK;
  // Of row i = 16 warp + g and column j = 8 n + 2 t the lag is i - j; of the next column and of row i + 8 it is one
  // less and eight more. So 18 factors serve all: [m] for lags `near` + 8 - 8 m and one less.
  const int near = 16 * warp + lane / 4 - lane % 4 * 2;
  float even[9], odd[9];
#pragma unroll
  for (int m = 0; m < 9; m++) {
    const int lag = near + 8 - 8 * m;
    even[m] = lag >= 0 ? scale * exp2f(-fast * (float)lag) : 0.0f;
    odd[m] = lag >= 1 ? scale * exp2f(-fast * (float)(lag - 1)) : 0.0f;
  }
  const u32 base = shared_address(shared);
  Ring load = ring;
  int next = 0;
  auto fetch = [&] {
    const i64 row = (i64)next * CHUNK;
    const int rows = length - next * CHUNK;
    const u32 to = base + load.stage * STAGE;
    barrier_wait(load.empty + load.stage, load.phase ^ 1);
    load_tile(to, q + row * pitch, pitch, thread, rows);
    load_tile(to + TILE, k + row * pitch, pitch, thread, rows);
    load_tile(to + 2 * TILE, v + row * v_pitch, v_pitch, thread, rows);
    asm volatile("cp.async.commit_group;" ::: "memory");
    load.next(STAGES);
    next++;
  };
  // Says that a chunk is there, to wgmma too; the chunk after it may still be on its way.
  Ring ready = ring;
  auto publish = [&](int c) {
    if (c >= chunks) return;
    if (next > c + 1)
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    fence_async();
    barrier_arrive(ready.full + ready.stage);
    ready.next(STAGES);
  };
  for (int i = 0; i < STAGES - 1 && next < chunks; i++) fetch();
  publish(0);
  const int row = 16 * warp + lane / 8 % 2 * 8 + lane % 8, piece = lane / 16;
  for (int c = 0; c < chunks; c++) {
    float made[32];
    const u32 queries = base + ring.stage * STAGE, keys = queries + TILE;
    barrier_wait(ring.full + ring.stage, ring.phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++)
      Wgmma<64>::b16(made, along_rows(queries + i / 4 * HALF + i % 4 * 32), along_rows(keys + i / 4 * HALF + i % 4 * 32),
                     i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin<32>(made);
    barrier_wait(used + c % 2, (c / 2 & 1) ^ 1);
    u8* to = scores + c % 2 * SCORES;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      u32 high[4], low[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const int at = 4 * (n + m / 2) + m % 2 * 2, lag = n + m / 2 + 1 - m % 2;
        halves(made[at] * even[lag], made[at + 1] * odd[lag], high[m], low[m]);
      }
      store_matrices(to + swizzled(row, n + piece), high[0], high[1], high[2], high[3]);
      store_matrices(to + HALF + swizzled(row, n + piece), low[0], low[1], low[2], low[3]);
    }
    fence_async();
    barrier_arrive(scored + c % 2);
    ring.next(STAGES);
    if (next < chunks) fetch();
    publish(c + 1);
  }
}

// Keeps the state and makes outputs.
DEVICE void keep(u8* shared, u8* scores, u8* out, Ring ring, u64* scored, u64* used, float* kept, bf16* o, int o_pitch,
                 int length, float rate, float scale) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, group = threadIdx.x / 128;
  const float fast = rate * LOG2E;
  float high, low;
  decay_over(rate, CHUNK, high, low);
  float since[2];  // of columns 2 t and the next; 8 more tokens is one more `eight`
  since[0] = scale * exp2f(-fast * (float)(lane % 4 * 2 + 1));
  since[1] = scale * exp2f(-fast * (float)(lane % 4 * 2 + 2));
  const Until until(fast);
  u8* mine = out + group * HALF;
  bf16* to = o + group * 64;
  const int row = lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
  const int chunks = (length + CHUNK - 1) / CHUNK;
  if (group == 1) give_turn(1);
  for (int c = 0; c < chunks; c++) {
    const u8* tile = shared + ring.stage * STAGE;
    const int count = min(length - c * CHUNK, CHUNK);
    float made[32];
    u32 state_high[32], state_low[32];
#pragma unroll
    for (int i = 0; i < 32; i++) halves(kept[2 * i], kept[2 * i + 1], state_high[i], state_low[i]);
    hold<32>(state_high), hold<32>(state_low);
    barrier_wait(ring.full + ring.stage, ring.phase);
    take_turn(group);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u64 b = along_rows(shared_address(tile) + i / 4 * HALF + i % 4 * 32);
      Wgmma<64>::b16_from(made, state_high + 4 * i, b, i > 0);
      Wgmma<64>::b16_from(made, state_low + 4 * i, b, 1);
    }
    wgmma_commit();
    give_turn(group);
    u32 values[16];
    load_values(values, tile + 2 * TILE);
    wgmma_wait<0>();
    pin<32>(made);
    float first = since[0], second = since[1];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      made[4 * n] *= first, made[4 * n + 1] *= second, made[4 * n + 2] *= first, made[4 * n + 3] *= second;
      first *= until.eight, second *= until.eight;
    }
    barrier_wait(scored + c % 2, c / 2 & 1);
    const u32 p = shared_address(scores) + c % 2 * SCORES;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Wgmma<64>::b16_from(made, values + 4 * i, along_rows(p + i * 32), 1);
      Wgmma<64>::b16_from(made, values + 4 * i, along_rows(p + HALF + i * 32), 1);
    }
    wgmma_commit();
    u32 upper[16], lower[16], rounded[16];
    weigh_values(values, upper, lower, until, fast, count);
    hold<16>(upper), hold<16>(lower);
    wgmma_wait<0>();
    pin<32>(made);
    if (lane == 0) barrier_arrive(used + c % 2);
#pragma unroll
    for (int i = 0; i < 16; i++) rounded[i] = pack_bf16(made[2 * i], made[2 * i + 1]);
    float added[64];
    multiply_keys(added, upper, lower, shared_address(tile) + TILE);
    // Outputs, transposed on their way, while the products run.
    named_barrier(1 + group, 128);
#pragma unroll
    for (int n = 0; n < 4; n++)
      store_transposed(mine + swizzled(16 * n + row, piece), rounded[4 * n], rounded[4 * n + 1], rounded[4 * n + 2],
                       rounded[4 * n + 3]);
    named_barrier(1 + group, 128);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = thread / 8 + 16 * i;
      if (token < count)
        *(uint4*)(to + (i64)(c * CHUNK + token) * o_pitch + thread % 8 * 8) =
            *(const uint4*)(mine + swizzled(token, thread % 8));
    }
    if (count < CHUNK) decay_over(rate, count, high, low);
    wgmma_wait<0>();
    pin<64>(added);
    if (lane == 0) barrier_arrive(ring.empty + ring.stage);
    add_up(kept, added, high, low);
    ring.next(STAGES);
  }
}

// Tokens that no sequence has get zeros. Grid: (heads, segments and one).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    outputs(const bf16* q, const bf16* k, const bf16* v, const float* decay, float* state, const int* slots,
            const int* offsets, const int* positions, const float* starts, bf16* o, int tokens, int sequences, int span,
            int pitch, int v_pitch, float scale) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u64 full[STAGES], empty[STAGES], scored[2], used[2];
  const int head = blockIdx.x, heads = gridDim.x, o_pitch = heads * WIDTH;
  launch_dependents();
  wait_dependencies();
  const Segment at = locate(blockIdx.y, offsets, sequences, tokens, span);
  if (at.sequence > sequences) return;
  const int length = at.end - at.begin;
  o += (i64)at.begin * o_pitch + head * WIDTH;
  if (at.sequence == sequences) {
    for (int i = threadIdx.x; i < length * 16; i += THREADS)
      *(uint4*)(o + (i64)(i / 16) * o_pitch + i % 16 * 8) = make_uint4(0, 0, 0, 0);
    return;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i, 128), barrier_init(empty + i, KEEPERS / 32);
    for (int i = 0; i < 2; i++) barrier_init(scored + i, 128), barrier_init(used + i, KEEPERS / 32);
    barrier_init_fence();
  }
  __syncthreads();
  u8* scores = shared + STAGES * STAGE;
  u8* out = scores + 2 * SCORES;
  const Ring ring = {full, empty, 0, 0};
  const float rate = load_fresh(decay + head);
  if (threadIdx.x >= KEEPERS) {
    registers_give<LOADER_REGISTERS>();
    const i64 row = (i64)at.begin * pitch + head * WIDTH;
    score(shared, scores, ring, scored, used, q + row, k + row, v + (i64)at.begin * v_pitch + head * WIDTH, pitch,
          v_pitch, length, rate * LOG2E, scale);
    return;
  }
  registers_keep<KEEPER_REGISTERS>();
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; i++) kept[i] = 0.0f;
  const int slot = load_fresh(slots + at.sequence);
  float* place = state + ((i64)slot * heads + head) * MATRIX;
  const float* held = starts + ((i64)at.base * heads + head) * MATRIX;
  if (at.number == 0 && at.end < at.stop) {
    read_transposed(kept, held);
  } else if (at.number == 0) {
    if (slot >= 0 && load_fresh(positions + at.start) != 0) read_slot(kept, place);
  } else {
    float high, low;
    decay_over(rate, span, high, low);
    for (int i = 0; i < at.number; i++) {
      float more[64];
      held += (i64)heads * MATRIX;
      read_transposed(more, held);
      add_up(kept, more, high, low);
    }
  }
  keep(shared, scores, out, ring, scored, used, kept, o, o_pitch, length, rate, scale);
  if (at.end == at.stop && slot >= 0) write_slot(kept, place);
}
#endif
