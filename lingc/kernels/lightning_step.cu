// One step of lightning attention for each sequence: norm and rope of q and k, commit of accepted tokens, the update
// and the read of the f32 state. Maths: plugins/lightning_decode_qkv.py and plugins/lightning_verify_qkv.py.
//
// A block holds BLOCK_COLUMNS columns of one head's state of one sequence in registers, for all rows: COLUMNS columns a
// warp, SPLIT warps share a column's rows. grid = (128 / BLOCK_COLUMNS, heads, sequences).
//
// Before griddepcontrol.wait a block reads, besides weights, the state, `pending`, `slots`, `accepted` and `positions`.
// That is safe where whatever writes those ended before the first kernel of this chain of dependent launches began:
// they change once a step, and a step begins with a launch that is not dependent.
//
// Macros: COLUMNS (of a warp), SPLIT, WARPS, PAIRS (that rope turns), PENDING (tokens that may wait for a commit); TOKENS
// (of a sequence) for verify, and SEQUENTIAL: whether verify takes them one by one, to the bits that decode makes.
#include "device.cuh"

#ifndef SEQUENTIAL
#define SEQUENTIAL 0
#endif

constexpr int WIDTH = 128;                               // channels of a head, rows and columns of its state
constexpr int LANES = COLUMNS / 4;                       // lanes side by side on a row
constexpr int ROW_LANES = 32 / LANES;                    // lanes one below another
constexpr int STRIPES = ROW_LANES * SPLIT;               // threads that share a column
constexpr int ROWS = WIDTH / STRIPES;                    // neighbouring rows of a thread
constexpr int BLOCK_COLUMNS = COLUMNS * WARPS / SPLIT;
constexpr int THREADS = 32 * WARPS;
constexpr float SCALE = 0.08838834764831845f;            // 128^-0.5
static_assert(ROWS % 4 == 0 && WARPS % SPLIT == 0 && WIDTH % BLOCK_COLUMNS == 0 && PAIRS >= 4 && PAIRS <= WIDTH / 2 && (PAIRS & PAIRS - 1) == 0);

// Where a thread stands in the block's part of the state.
struct Place {
  int lane, warp, stripe, row, column;
  DEVICE Place() {
    lane = threadIdx.x % 32, warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0);  // plainly one for all its lanes
    stripe = warp % SPLIT * ROW_LANES + lane / LANES;
    row = stripe * ROWS;
    column = blockIdx.x * BLOCK_COLUMNS + warp / SPLIT * COLUMNS + lane % LANES * 4;
  }
};

DEVICE float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}
DEVICE float4 load_floats(const float* p) { return as_floats(load_fresh((const uint4*)p)); }
DEVICE float4 as_values(uint2 v) { return {low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y)}; }
DEVICE float4 load_values(const bf16* p) { return as_values(load_fresh((const uint2*)p)); }

DEVICE void store_floats(float* p, float4 v) {  // to global memory, which the compiler does not see of a pinned address
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// ---------------------------------------------------------------- norm and rope of q and k

// Keeps a value where it is computed. The compiler would move it behind griddepcontrol.wait, where it costs time.
template <typename T>
DEVICE void pin(T*& p) {
  asm volatile("" : "+l"(p));
}
DEVICE void pin(float& v) { asm volatile("" : "+f"(v)); }

// A warp's work on a token's q or k: four channels a lane.
//
// Only as many warps do it as there are vectors, since all blocks read the same cosines and sines: the few cache lines
// would be worn by one warp after another.
struct Vector {
  const bf16* from;
  const float *cos, *sin;
  float weight[4];
  uint2 raw;
  float4 c, s;

  DEVICE void prepare(const bf16* x, const bf16* norm_weight, const float* all_cos, const float* all_sin, int token,
                      int lane) {
    from = x + 4 * lane, cos = all_cos + (i64)token * PAIRS + 4 * lane % PAIRS;
    sin = all_sin + (i64)token * PAIRS + 4 * lane % PAIRS;
    const uint2 w = *(const uint2*)(norm_weight + 4 * lane);
    weight[0] = low_bf16(w.x), weight[1] = high_bf16(w.x), weight[2] = low_bf16(w.y), weight[3] = high_bf16(w.y);
    pin(from), pin(cos), pin(sin);
  }

  DEVICE void load(int lane) {
    raw = load_fresh((const uint2*)from);
    c = {1, 1, 1, 1}, s = {0, 0, 0, 0};
    if (4 * lane < 2 * PAIRS) c = load_floats(cos), s = load_floats(sin);
  }

  // Four channels, rounded to bf16.
  //
  // The compiler would put the loads of c and s off until they are wanted, and so wait for memory twice: here the first
  // sum wants them too. No sine has all its bits set, so nothing comes of it.
  DEVICE uint2 made(int lane, float eps) const {
    const float x[4] = {low_bf16(raw.x), high_bf16(raw.x), low_bf16(raw.y), high_bf16(raw.y)};
    const float cosine[4] = {c.x, c.y, c.z, c.w}, sine[4] = {s.x, s.y, s.z, s.w};
    const float sign = 4 * lane < PAIRS ? -1.0f : 1.0f;
    float squares = x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]);
    if ((__float_as_uint(c.x) & __float_as_uint(s.x)) == 0xffffffffu) squares = s.x;
    const float scale = rsqrtf(warp_sum(squares) * (1.0f / WIDTH) + eps);
    float z[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float own = x[i] * weight[i], other = __shfl_xor_sync(FULL_WARP, own, PAIRS / 4);
      z[i] = (own * cosine[i] + other * (sign * sine[i])) * scale;
    }
    return {pack_bf16(z[0], z[1]), pack_bf16(z[2], z[3])};
  }
};

// ---------------------------------------------------------------- state

// Pending tokens of a block, brought all at once: one wait for memory, however many they are.
struct Waiting {
  bf16 k[PENDING][WIDTH], v[PENDING][BLOCK_COLUMNS];

  // `k` and `v` are the first token's, v's from the block's first column on; `stride` elements from one to the next.
  DEVICE void fetch(const bf16* from_k, const bf16* from_v, i64 stride, int count) {
    constexpr int K_PIECES = WIDTH / 8, PIECES = K_PIECES + BLOCK_COLUMNS / 8;
    for (int i = threadIdx.x; i < count * PIECES; i += THREADS) {
      const int token = i / PIECES, piece = i % PIECES, c = 8 * (piece - K_PIECES);
      const bf16* from = piece < K_PIECES ? from_k + 8 * piece : from_v + c;
      bf16* to = piece < K_PIECES ? k[token] + 8 * piece : v[token] + c;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from + token * stride)
                   : "memory");
    }
  }
  DEVICE void arrived() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }
};

// d s + k v with d - 1 given, which f32 holds far more exactly than d where the decay is slow: rounding d = exp(-1e-4)
// would be seen after ten thousand tokens.
DEVICE void add_row(float4& s, float k, float4 v, float decay_less_1) {
  s.x = fmaf(k, v.x, fmaf(decay_less_1, s.x, s.x));
  s.y = fmaf(k, v.y, fmaf(decay_less_1, s.y, s.y));
  s.z = fmaf(k, v.z, fmaf(decay_less_1, s.z, s.z));
  s.w = fmaf(k, v.w, fmaf(decay_less_1, s.w, s.w));
}

struct State {
  float4 at[ROWS];

  DEVICE void load(const float* from) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) at[i] = load_floats(from + i * WIDTH);
  }
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < ROWS; i++) at[i] = {0, 0, 0, 0};
  }
  DEVICE void store(float* to) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) store_floats(to + i * WIDTH, at[i]);
  }
  DEVICE void commit(const Waiting& tokens, int count, const Place& place, float decay_less_1) {
    for (int i = 0; i < count; i++) {
      const float4 v = as_values(*(const uint2*)(tokens.v[i] + place.column % BLOCK_COLUMNS));
#pragma unroll
      for (int r = 0; r < ROWS; r += 4) {
        const float4 k = as_values(*(const uint2*)(tokens.k[i] + place.row + r));
        add_row(at[r], k.x, v, decay_less_1), add_row(at[r + 1], k.y, v, decay_less_1);
        add_row(at[r + 2], k.z, v, decay_less_1), add_row(at[r + 3], k.w, v, decay_less_1);
      }
    }
  }
  // One token: the update, and this thread's part of the read. `q4s` and `k4s` from the thread's first row on.
  DEVICE void step(const float* q4s, const float* k4s, float4 v, float decay_less_1, float* sums) {
#pragma unroll
    for (int j = 0; j < ROWS; j += 4) {
      const float4 q4 = *(const float4*)(q4s + j), k4 = *(const float4*)(k4s + j);
      const float q[4] = {q4.x, q4.y, q4.z, q4.w}, k[4] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float4& r = at[j + i];
        add_row(r, k[i], v, decay_less_1);
        sums[0] = fmaf(q[i], r.x, sums[0]), sums[1] = fmaf(q[i], r.y, sums[1]);
        sums[2] = fmaf(q[i], r.z, sums[2]), sums[3] = fmaf(q[i], r.w, sums[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] *= SCALE;
  }
};

// Adds `values` over the lanes one below another. Each of them ends with its own share, the `count` values from
// `first` on; lanes that hold the same share have one `writer` among them.
template <int N, int stride = 16>
struct Reduce {
  static DEVICE void run(float* values, int lane, int& first, int& count, bool& writer) {
    if constexpr (stride < LANES) {
      count = N;
    } else if constexpr (N % 2 == 0) {
      const bool upper = lane & stride;
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        const float given = upper ? values[i] : values[i + N / 2];
        const float kept = upper ? values[i + N / 2] : values[i];
        values[i] = kept + __shfl_xor_sync(FULL_WARP, given, stride);
      }
      first += upper ? N / 2 : 0;
      Reduce<N / 2, stride / 2>::run(values, lane, first, count, writer);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) values[i] += __shfl_xor_sync(FULL_WARP, values[i], stride);
      writer = writer && !(lane & stride);
      Reduce<N, stride / 2>::run(values, lane, first, count, writer);
    }
  }
};

__device__ constexpr int left_of(int values) {  // values that a thread has after `Reduce`
  for (int stride = 16; stride >= LANES; stride /= 2) values = values % 2 ? values : values / 2;
  return values;
}

// Adds each thread's sums[token][4 columns] over the rows and writes o. `store` is run where it holds up nobody: stores
// of a state fill the queue to memory, and what waits on the sums would wait behind them.
template <int N, typename Store>
DEVICE void write_outputs(float* sums, const Place& at, bf16* o, int pitch, const Store& store) {
  constexpr int LEFT = left_of(4 * N);
  int first = 0, count = 0;
  bool writer = true;
  Reduce<4 * N>::run(sums, at.lane, first, count, writer);
  if constexpr (SPLIT == 1) {
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
      const int token = (first + i) / 4, c = (first + i) % 4;
      if (writer) o[(i64)token * pitch + at.column + c] = to_bf16(sums[i]);
    }
    store();
  } else {
    __shared__ float parts[SPLIT][N][BLOCK_COLUMNS];
    constexpr int ALL = N * BLOCK_COLUMNS;
    const int within = at.column % BLOCK_COLUMNS;
    if (writer) {
#pragma unroll
      for (int i = 0; i < LEFT; i++) parts[at.warp % SPLIT][(first + i) / 4][within + (first + i) % 4] = sums[i];
    }
    const bool last = 32 * at.warp < ALL;  // a warp with results to write
    if (!last) store();
    __syncthreads();
    if (!last) return;
#pragma unroll
    for (int turn = 0; turn < (ALL + THREADS - 1) / THREADS; turn++) {
      const int i = turn * THREADS + threadIdx.x;
      if (ALL % THREADS && i >= ALL) break;
      const int token = i / BLOCK_COLUMNS, c = i % BLOCK_COLUMNS;
      float sum = parts[0][token][c];
#pragma unroll
      for (int j = 1; j < SPLIT; j++) sum += parts[j][token][c];
      o[(i64)token * pitch + blockIdx.x * BLOCK_COLUMNS + c] = to_bf16(sum);
    }
    store();
  }
}

// ---------------------------------------------------------------- decode

#ifndef TOKENS
extern "C" __global__ void __launch_bounds__(32 * WARPS)
lightning_decode(const bf16* qkvg, const bf16* q_weight, const bf16* k_weight, const float* cos, const float* sin,
                 const float* decay, float* state, const bf16* pending_k, const bf16* pending_v, const int* slots,
                 const int* accepted, const int* positions, bf16* o, int pitch, float eps) {
  launch_dependents();
  __shared__ alignas(16) float normed[2][WIDTH];  // q, k
  __shared__ alignas(16) Waiting waiting;
  const Place at;
  const int head = blockIdx.y, heads = gridDim.y, b = blockIdx.z;
  const int slot = load_fresh(slots + b), position = load_fresh(positions + b), verified = load_fresh(accepted + b);
  const float decay_less_1 = expm1f(-decay[head]);
  const i64 owner = (i64)slot * heads + head, width = (i64)heads * WIDTH;
  float* mine = state + owner * (WIDTH * WIDTH) + at.row * WIDTH + at.column;
  const bf16* row = qkvg + (i64)b * pitch + head * WIDTH;
  const bf16* values = row + 2 * width + at.column;
  Vector vector;
  if (at.warp < 2) vector.prepare(row + at.warp * width, at.warp ? k_weight : q_weight, cos, sin, b, at.lane);
  pin(values), pin(mine);
  State s;
  if (slot >= 0 && position != 0) {
    const i64 token = ((i64)slot * PENDING * heads + head) * WIDTH;
    const int count = min(verified, PENDING);
    waiting.fetch(pending_k + token, pending_v + token + blockIdx.x * BLOCK_COLUMNS, width, count);
    s.load(mine);
    if (count > 0) {
      waiting.arrived();
      s.commit(waiting, count, at, decay_less_1);
    }
  } else {
    s.clear();
  }

  wait_dependencies();
  if (at.warp < 2) vector.load(at.lane);
  const float4 v = load_values(values);
  if (at.warp < 2) {
    const float4 made = as_values(vector.made(at.lane, eps));
    *(float4*)(normed[at.warp] + 4 * at.lane) = made;
  }
  __syncthreads();

  float sums[4] = {0, 0, 0, 0};
  s.step(normed[0] + at.row, normed[1] + at.row, v, decay_less_1, sums);
  write_outputs<1>(sums, at, o + b * width + head * WIDTH, (int)width, [&] {
    if (slot >= 0) s.store(mine);
  });
}
#else

// ---------------------------------------------------------------- verify

// Block form: with S the state at the start of the step, committed,
//   o[i] = exp(-s (i + 1)) q[i] S + sum_{j <= i} exp(-s (i - j)) (q[i] . k[j]) v[j].
// SEQUENTIAL: as in decode, token after token in registers, of which memory gets none.
// The blocks of a head are a cluster: the first may write pending_k only when all have read it.
static_assert(TOKENS <= 8 && STRIPES >= 4 && (!SEQUENTIAL || STRIPES >= TOKENS));

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

constexpr int BF16_PITCH = WIDTH + 32;  // neighbouring rows lie half the banks apart

extern "C" __global__ void __launch_bounds__(32 * WARPS)
lightning_verify(const bf16* qkvg, const bf16* q_weight, const bf16* k_weight, const float* cos, const float* sin,
                 const float* decay, float* state, bf16* pending_k, bf16* pending_v, const int* slots,
                 const int* accepted, const int* positions, bf16* o, int pitch, float eps) {
  launch_dependents();
  __shared__ alignas(16) float wide_q[TOKENS][WIDTH];             // scaled and decayed since the start of the step
  __shared__ alignas(16) bf16 rounded[2][TOKENS][BF16_PITCH];     // q, k
#if SEQUENTIAL
  __shared__ alignas(16) float wide_k[TOKENS][WIDTH];
#else
  __shared__ alignas(16) float scores[WARPS][8][8];               // [j][i]
#endif
  __shared__ alignas(16) Waiting waiting;
  const Place at;
  const int head = blockIdx.y, heads = gridDim.y, b = blockIdx.z, first = b * TOKENS;
  const int slot = load_fresh(slots + b), position = load_fresh(positions + first);
  const int verified = load_fresh(accepted + b);
  const float rate = decay[head], decay_less_1 = expm1f(-rate);
  const i64 owner = (i64)slot * heads + head;
  float* mine = state + owner * (WIDTH * WIDTH) + at.row * WIDTH + at.column;
  const i64 token = ((i64)slot * PENDING * heads + head) * WIDTH, width = (i64)heads * WIDTH;
  // A warp makes every WARPS-th of the vectors q[0], k[0], q[1], …, and a stripe adds every STRIPES-th token's v, or all.
  constexpr int TURNS = (2 * TOKENS + WARPS - 1) / WARPS, APART = SEQUENTIAL ? 1 : STRIPES;
  constexpr int OWN = (TOKENS + APART - 1) / APART;
  const int own = SEQUENTIAL ? 0 : at.stripe;  // the first of them
  const bf16* row = qkvg + (i64)first * pitch + head * WIDTH;
  Vector vectors[TURNS];
  float factors[TURNS];  // of q
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int which = at.warp + i * WARPS, t = which / 2, half = which % 2;
    factors[i] = SEQUENTIAL ? 1.0f : SCALE * expf(-rate * (t + 1)), pin(factors[i]);
    if (which < 2 * TOKENS)
      vectors[i].prepare(row + (i64)t * pitch + half * width, half ? k_weight : q_weight, cos, sin, first + t, at.lane);
  }
  const bf16* values = row + (i64)own * pitch + 2 * width + at.column;
  pin(values), pin(mine);
#if !SEQUENTIAL
  const int g = at.lane / 4, t = at.lane % 4;
  float weights[2];  // of the scores of q[g] with k[2 t] and k[2 t + 1]
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int lag = g - 2 * t - i;
    weights[i] = lag >= 0 ? SCALE * expf(-rate * lag) : 0.0f, pin(weights[i]);
  }
#endif
  State s;
  bool changed = slot >= 0 && position == 0;
  if (slot >= 0 && position != 0) {
    const int count = min(verified, PENDING);
    waiting.fetch(pending_k + token, pending_v + token + blockIdx.x * BLOCK_COLUMNS, width, count);
    s.load(mine);
    if (count > 0) {
      waiting.arrived();
      s.commit(waiting, count, at, decay_less_1);
    }
    changed = count > 0;
  } else {
    s.clear();
  }
  cluster_arrive();

  wait_dependencies();
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    if (at.warp + i * WARPS < 2 * TOKENS) vectors[i].load(at.lane);
  }
  uint2 v[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (own + i * APART < TOKENS) v[i] = load_fresh((const uint2*)(values + (i64)i * APART * pitch));
  }
  if (changed) s.store(mine);
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int which = at.warp + i * WARPS, t = which / 2, half = which % 2;
    if (which < 2 * TOKENS) {
      const uint2 made = vectors[i].made(at.lane, eps);
      *(uint2*)(rounded[half][t] + 4 * at.lane) = made;
      if (half == 0) {
        const float4 q = as_values(made);
        const float f = factors[i];
        *(float4*)(wide_q[t] + 4 * at.lane) = {q.x * f, q.y * f, q.z * f, q.w * f};
      }
#if SEQUENTIAL
      else
        *(float4*)(wide_k[t] + 4 * at.lane) = as_values(made);
#endif
    }
  }
  __syncthreads();

  float sums[4 * TOKENS];
#pragma unroll
  for (int i = 0; i < 4 * TOKENS; i++) sums[i] = 0.0f;
#if SEQUENTIAL
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    s.step(wide_q[i] + at.row, wide_k[i] + at.row, as_values(v[i]), decay_less_1, sums + 4 * i);
    if (slot >= 0 && at.stripe == i) *(uint2*)(pending_v + token + i * width + at.column) = v[i];
  }
#else
  // Every warp makes the scores for itself, under way while it reads the state.
  float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
  {
    const uint4* q = (const uint4*)rounded[0][min(g, TOKENS - 1)];
    const uint4* k = (const uint4*)rounded[1][min(g, TOKENS - 1)];
#pragma unroll
    for (int i = 0; i < WIDTH / 32; i++) {  // the order of channels within 32 is that of q and k alike
      const uint4 a = q[4 * i + t], e = k[4 * i + t];
      mma_bf16(even, a.x, 0, a.y, 0, e.x, e.y);
      mma_bf16(odd, a.z, 0, a.w, 0, e.z, e.w);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r += 4) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      const float4 q4 = *(const float4*)(wide_q[i] + at.row + r);
      const float q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float4& from = s.at[r + j];
        sums[4 * i] = fmaf(q[j], from.x, sums[4 * i]), sums[4 * i + 1] = fmaf(q[j], from.y, sums[4 * i + 1]);
        sums[4 * i + 2] = fmaf(q[j], from.z, sums[4 * i + 2]), sums[4 * i + 3] = fmaf(q[j], from.w, sums[4 * i + 3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) scores[at.warp][2 * t + i][g] = weights[i] > 0.0f ? (even[i] + odd[i]) * weights[i] : 0.0f;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int j = at.stripe + i * STRIPES;
    if (j < TOKENS) {
      const float* with = scores[at.warp][j];
      const float4 x = as_values(v[i]);
#pragma unroll
      for (int c = 0; c < TOKENS; c++) {
        if (c < j) continue;
        sums[4 * c] = fmaf(with[c], x.x, sums[4 * c]), sums[4 * c + 1] = fmaf(with[c], x.y, sums[4 * c + 1]);
        sums[4 * c + 2] = fmaf(with[c], x.z, sums[4 * c + 2]), sums[4 * c + 3] = fmaf(with[c], x.w, sums[4 * c + 3]);
      }
      if (slot >= 0) *(uint2*)(pending_v + token + j * width + at.column) = v[i];
    }
  }
#endif
  write_outputs<TOKENS>(sums, at, o + first * width + head * WIDTH, (int)width, [] {});
  cluster_wait();
  if (blockIdx.x == 0 && slot >= 0) {
    for (int i = threadIdx.x; i < TOKENS * (WIDTH / 8); i += 32 * WARPS) {
      const int t = i / (WIDTH / 8), c = i % (WIDTH / 8) * 8;
      *(uint4*)(pending_k + token + t * width + c) = *(const uint4*)(rounded[1][t] + c);
    }
  }
}
#endif
