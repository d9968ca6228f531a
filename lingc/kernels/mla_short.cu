// MLA of a few tokens over a short context, all of it in one launch.
//
// Eight blocks are a cluster for two heads and up to four tokens of one sequence: the eight columns of an
// mma.sync product. Block r has 64 of the 512 latent channels of w_k and w_v, and every eighth part of the cached
// rows. What one block makes goes to the others through shared memory:
//
//   queries  q_n @ w_k for its channels, to all;           then scores, shares and sums of latents over its rows
//   sums     of 64 channels, to the block that has them;   then their part of w_v @ sum
//   results  of 32 rows of w_v, to the block that adds them up and writes them
//
// The tokens' own rows of the cache are made by whoever reads them, from a, and written by the first cluster.
// Rows of the cache are in shared memory as they are, 1152 bytes each, but for the 16-byte chunks of every 128
// bytes: chunk c of row r stands at c ^ (r % 8).
#include "device.cuh"

#define NOPE 128
#define ROPE 64
#define LATENT 512
#define VALUE 128
#define KEY (NOPE + ROPE)
#define WIDTH (LATENT + ROPE)
#define ROW_BYTES (WIDTH * 2)
#define PEERS 8
#define WARPS 8
#define OWN (LATENT / PEERS)  // channels of a block
#define COLUMNS 8             // token * 2 + head
#define TOKENS 4
#define TILE_BYTES (TILE * ROW_BYTES)
#define EACH (TILE / 32)            // rows of a tile that a lane has the shares of
#define PARTS (WARPS * 16 / TILE)   // warps that share the scores of 16 rows
#define STEPS (WIDTH / 16 / PARTS)  // 16 channels each
#define QUERY_PITCH (ROW_BYTES + 16)
#define SCORE_PITCH (TILE + 4)
#define SHARE_PITCH (TILE * 2 + 16)

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

struct Shared {
  union {
    u8 tile[BUFFERS][TILE_BYTES];
    u8 weight[2][NOPE][OWN * 2];  // w_k, until it is in registers
  };
  union {
    u8 query[COLUMNS][QUERY_PITCH];
    float4 results[PEERS][2][32];  // when no block needs queries any more
  };
  float4 sums[PEERS][4][32];
  u8 made[COLUMNS][OWN * 2];
  float scores[PARTS][COLUMNS][SCORE_PITCH];
  u8 share[COLUMNS][SHARE_PITCH];
  u8 sum[COLUMNS][OWN * 2 + 16];
  float2 stats[PEERS][COLUMNS];
  float rescale[COLUMNS];
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch gives too little shared memory");

DEVICE void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy_or_zero(u32 to, const void* from, bool copied) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copied ? 16 : 0) : "memory");
}
template <int pending>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

DEVICE void load_matrices(u32 row, u32* v) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}
DEVICE void load_transposed(u32 row, u32* v) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

DEVICE void store_shared(u32 address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
DEVICE void store_shared(u32 address, u32 v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

DEVICE u32 peer_address(const void* p, u32 peer) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(peer));
  return r;
}
DEVICE void peer_store(u32 address, uint4 v) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEVICE void peer_store(u32 address, float2 v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
DEVICE void peer_store(u32 address, const float* v) {
  peer_store(address, uint4{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }

DEVICE float power(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// ---------------------------------------------------------------- what a cluster has to do

struct Work {
  int sequence;      // -1: nothing
  int start;         // the sequence's first token
  int token, count;  // of the cluster
  int past;          // rows before the sequence's first token of this step
  int begin, end;    // rows of the block
};

// In a warp. Bounds hold whatever the tables hold, so that it may be asked before they are known to be right.
DEVICE Work find_work(const int* offsets, const int* positions, int tokens, int sequences, int pages, u32 rank) {
  int lane = threadIdx.x % 32;
  Work work;
  work.sequence = -1;
  int before = 0;
  for (int b = 0; b <= sequences; b += 32) {  // the last: tokens that no sequence has
    int from = b + lane <= sequences ? load_fresh(offsets + b + lane) : tokens;
    int to = b + lane < sequences ? load_fresh(offsets + b + lane + 1) : tokens;
    from = min(max(from, 0), tokens), to = min(max(to, from), tokens);
    int own = (to - from + TOKENS - 1) / TOKENS, sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      int v = __shfl_up_sync(FULL_WARP, sum, i);
      if (lane >= i) sum += v;
    }
    int at = (int)blockIdx.y - before - (sum - own);
    u32 mine = __ballot_sync(FULL_WARP, at >= 0 && at < own);
    if (mine) {
      int who = __ffs(mine) - 1;
      work.sequence = b + who;
      work.start = __shfl_sync(FULL_WARP, from, who);
      work.token = __shfl_sync(FULL_WARP, from + at * TOKENS, who);
      work.count = min(TOKENS, __shfl_sync(FULL_WARP, to, who) - work.token);
      break;
    }
    before += __shfl_sync(FULL_WARP, sum, 31);
  }
  if (work.sequence < 0) return work;
  work.past = min(max(load_fresh(positions + work.start), 0), pages * PAGE - 1);
  int length = min(work.past + work.token + work.count - work.start, pages * PAGE);
  if (work.sequence == sequences) length = 0;
  int rows = ((length + PEERS - 1) / PEERS + 7) / 8 * 8;
  work.begin = min((int)rank * rows, length), work.end = min(work.begin + rows, length);
  return work;
}

// ---------------------------------------------------------------- rows into shared memory

struct Rows {
  const bf16 *a, *kv_weight;
  const float *cos, *sin;
  bf16* cache;
  const int *rows, *table;
  int pitch, pages, page_count;
  float eps;
};

DEVICE u32 turned(u32 pair, float c, float s, float by) {
  float a = low_bf16(pair), b = high_bf16(pair);
  return pack_bf16((a * c - b * s) * by, (b * c + a * s) * by);
}

// The row that a token adds to the cache, by a warp: lane has 8 latent channels twice and two of the rope key.
DEVICE void own_row(const Rows& in, int token, u32 to, int r, bool written) {
  int lane = threadIdx.x % 32;
  const bf16* own = in.a + (i64)token * in.pitch + in.pitch - WIDTH;
  uint4 raw[2], weight[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    raw[i] = load_fresh((const uint4*)own + lane + 32 * i);
    weight[i] = ((const uint4*)in.kv_weight)[lane + 32 * i];
  }
  u32 key = load_fresh((const u32*)(own + LATENT) + lane);
  i64 angle = (i64)token * (ROPE / 2) + lane;
  float c = load_fresh(in.cos + angle), s = load_fresh(in.sin + angle), x[16], w[16], sum = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) unpack_bf16(raw[i], x + 8 * i), unpack_bf16(weight[i], w + 8 * i);
#pragma unroll
  for (int i = 0; i < 16; i++) sum += x[i] * x[i];
  float by = rsqrtf(warp_sum(sum) * (1.0f / LATENT) + in.eps);
  bf16* row = in.cache + (i64)(written ? load_fresh(in.rows + token) : 0) * WIDTH;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint4 y;
    const float *v = x + 8 * i, *u = w + 8 * i;
    y.x = pack_bf16(v[0] * by * u[0], v[1] * by * u[1]), y.y = pack_bf16(v[2] * by * u[2], v[3] * by * u[3]);
    y.z = pack_bf16(v[4] * by * u[4], v[5] * by * u[5]), y.w = pack_bf16(v[6] * by * u[6], v[7] * by * u[7]);
    int chunk = lane + 32 * i;
    store_shared(to + r * ROW_BYTES + chunk / 8 * 128 + ((chunk % 8) ^ (r % 8)) * 16, y);
    if (written) ((uint4*)row)[chunk] = y;
  }
  u32 y = turned(key, c, s, 1.0f);
  store_shared(to + r * ROW_BYTES + LATENT * 2 + ((lane / 4) ^ (r % 8)) * 16 + lane % 4 * 4, y);
  if (written) ((u32*)(row + LATENT))[lane] = y;
}

// Rows x … x + 7 of the sequence to rows r … r + 7 of a tile, by a warp; zeros from work.end on.
DEVICE void load_eight(const Rows& in, const Work& work, u32 to, int x, int r, bool writes) {
  int lane = threadIdx.x % 32, row = lane / 8, q = lane % 8;
  int page = x < work.end ? min(max(load_fresh(in.table + x / PAGE), 0), in.page_count - 1) : 0;
  const u8* from = (const u8*)in.cache + ((i64)page * PAGE + x % PAGE) * ROW_BYTES + row * ROW_BYTES + q * 16;
  u32 at = to + (r + row) * ROW_BYTES + ((q ^ row) * 16), high = 4 * ROW_BYTES + ((q ^ row ^ 4) - (q ^ row)) * 16;
  // Rows of this step: of tokens that have a row, made here; they may not be in the cache yet.
  int fresh = x + 8 > work.past && x < work.end ? 0xff : 0;
  if (fresh) {
    int token = work.start + x + lane - work.past;
    bool mine = lane < 8 && x + lane >= work.past && x + lane < work.end && load_fresh(in.rows + max(token, 0)) >= 0;
    fresh = __ballot_sync(FULL_WARP, mine);
  }
  bool low = x + row < work.end && !(fresh >> row & 1), up = x + row + 4 < work.end && !(fresh >> (row + 4) & 1);
  bool put_low = !(fresh >> row & 1), put_up = !(fresh >> (row + 4) & 1);
#pragma unroll
  for (int b = 0; b < WIDTH / 64; b++) {
    if (put_low) copy_or_zero(at + b * 128, from + b * 128, low);
    if (put_up) copy_or_zero(at + high + b * 128, from + 4 * ROW_BYTES + b * 128, up);
  }
  for (int i = 0; fresh >> i; i++)
    if (fresh >> i & 1) {
      int token = work.start + x + i - work.past;
      own_row(in, token, to, r + i, writes && token >= work.token);
    }
}

// ---------------------------------------------------------------- kernel

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    mla_short(const bf16* __restrict__ a, const bf16* __restrict__ q, const bf16* __restrict__ kv_weight,
              const float* __restrict__ cos, const float* __restrict__ sin, bf16* cache, const int* __restrict__ rows,
              const int* __restrict__ page_table, const int* __restrict__ offsets, const int* __restrict__ positions,
              const bf16* __restrict__ w_k, const bf16* __restrict__ w_v, bf16* y, int tokens, int sequences,
              int pages, int page_count, int pitch, float eps, float scale) {
  launch_dependents();
  cluster_arrive();  // whoever writes to a neighbour's memory knows that the neighbour runs
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *(Shared*)memory;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 rank = blockIdx.x % PEERS;
  int heads = blockIdx.x / PEERS * 2;  // the first of two

  // [head][nope][64 channels]: chunk c of row n where eight rows of a transposed matrix meet no bank twice.
  for (int i = threadIdx.x; i < 2 * NOPE * 8; i += WARPS * 32) {
    int h = i / (NOPE * 8), n = i / 8 % NOPE, c = i % 8, swizzle = (n & 1) | (n / 8 % 4) << 1;
    if (heads + h < HEADS)
      copy_async(shared_address(&shared.weight[h][n][(c ^ swizzle) * 16]),
                 w_k + ((i64)(heads + h) * NOPE + n) * LATENT + rank * OWN + c * 8);
  }
  copies_commit();
  uint4 v_weight[2][2][2];  // 16 rows, g or g + 8, 32 channels
  int h = warp / 4;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        v_weight[i][j][k] =
            heads + h < HEADS
                ? *(const uint4*)(w_v + ((i64)(heads + h) * VALUE + warp % 4 * 32 + i * 16 + j * 8 + g) * LATENT +
                                  rank * OWN + k * 32 + t * 8)
                : uint4{0, 0, 0, 0};
  // Offsets, positions and page numbers are the step's inputs, and the rows before it are older than the step.
  Work work = find_work(offsets, positions, tokens, sequences, pages, rank);
  Rows in = {a, kv_weight, cos, sin, cache, rows, page_table + (i64)max(work.sequence, 0) * pages, pitch, pages, page_count,
             eps};
  bool writes = heads == 0;
  int turns = work.sequence < 0 ? 0 : (work.end - work.begin + TILE - 1) / TILE;
  copies_wait<0>();
  __syncthreads();
  u32 w[8][4];  // k of lane t: as in mla_absorb
  int m = lane / 8, r = lane % 8;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    int n = 32 * (k / 2) + 8 * (r / 2) + r % 2 + 4 * (k % 2) + 2 * (m / 2);
    int c = warp % 4 * 2 + m % 2, swizzle = (n & 1) | (n / 8 % 4) << 1;
    load_transposed(shared_address(&shared.weight[h][n][(c ^ swizzle) * 16]), w[k]);
  }
  __syncthreads();
  bool mine = turns > 0 && warp * 8 < TILE, early = mine && work.begin + warp * 8 + 8 <= work.past;
  if (early) load_eight(in, work, shared_address(shared.tile[0]), work.begin + warp * 8, warp * 8, writes);
  cluster_wait();
  wait_dependencies();
  if (work.sequence < 0) return;
  {
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = g < work.count && heads + h < HEADS
                 ? load_fresh((const uint4*)(q + ((i64)(work.token + g) * HEADS + heads + h) * KEY) + 4 * i + t)
                 : uint4{0, 0, 0, 0};
    // Rope of column `warp`, by every block for itself.
    int token = warp / 2, head = heads + warp % 2;
    u32 pair = 0;
    float c = 0, s = 0;
    if (token < work.count && head < HEADS) {
      pair = load_fresh((const u32*)(q + ((i64)(work.token + token) * HEADS + head) * KEY + NOPE) + lane);
      i64 angle = (i64)(work.token + token) * (ROPE / 2) + lane;
      c = load_fresh(cos + angle), s = load_fresh(sin + angle);
    }
    if (mine && !early)
      load_eight(in, work, shared_address(shared.tile[0]), work.begin + warp * 8, warp * 8, writes);
    copies_commit();
    if (work.sequence == sequences && writes && rank == 0 && warp < work.count && load_fresh(rows + work.token + warp) >= 0)
      own_row(in, work.token + warp, shared_address(shared.tile[0]), warp, true);
    *(u32*)&shared.query[warp][LATENT * 2 + lane * 4] = turned(pair, c, s, scale);
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 *u = w[2 * i], *v = w[2 * i + 1];
      mma_bf16(d[0], u[0], u[1], u[2], u[3], x[i].x, x[i].y);
      mma_bf16(d[1], v[0], v[1], v[2], v[3], x[i].z, x[i].w);
    }
    if (t < TOKENS / 2)
#pragma unroll
      for (int i = 0; i < 4; i++)
        *(bf16*)&shared.made[(2 * t + i % 2) * 2 + h][(warp % 4 * 16 + i / 2 * 8 + g) * 2] =
            to_bf16((d[0][i] + d[1][i]) * scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int column = threadIdx.x / 8 % COLUMNS, c = threadIdx.x % 8, peer = threadIdx.x / 64 * 2 + i;
    peer_store(peer_address(&shared.query[column][rank * OWN * 2 + c * 16], peer), *(uint4*)&shared.made[column][c * 16]);
  }
  cluster_sync();

  int seen = min(work.end, work.past + work.token - work.start + min(warp / 2, work.count - 1) + 1);  // column `warp`
  float top = NEGATIVE_INFINITY, total = 0, o[4][4] = {};
  for (int i = 0; i < turns; i++) {
    u32 tile = shared_address(shared.tile[i % BUFFERS]);
    int x = work.begin + i * TILE;
    if (BUFFERS > 1 && i + 1 < turns) {
      if (warp * 8 < TILE)
        load_eight(in, work, shared_address(shared.tile[(i + 1) % BUFFERS]), x + TILE + warp * 8, warp * 8, writes);
      copies_commit();
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    {  // scores of 16 rows, over a part of the channels
      float d[2][4] = {};
      int row = warp / PARTS * 16 + lane % 16;
      u32 from = tile + row * ROW_BYTES;
#pragma unroll
      for (int k = 0; k < STEPS; k++) {
        int step = warp % PARTS * STEPS + k, chunk = 2 * step + lane / 16;
        const u32* b = (const u32*)&shared.query[g][step * 32 + t * 4];
        u32 v[4];
        load_matrices(from + chunk / 8 * 128 + ((chunk % 8) ^ (row % 8)) * 16, v);
        mma_bf16(d[k % 2], v[0], v[1], v[2], v[3], b[0], b[4]);
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
        shared.scores[warp % PARTS][2 * t + j % 2][warp / PARTS * 16 + j / 2 * 8 + g] = d[0][j] + d[1][j];
    }
    __syncthreads();
    {  // shares of column `warp`
      float s[EACH], most = top;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        s[j] = 0;
#pragma unroll
        for (int k = 0; k < PARTS; k++) s[j] += shared.scores[k][warp][EACH * lane + j];
        if (x + EACH * lane + j >= seen) s[j] = NEGATIVE_INFINITY;
        most = fmaxf(most, s[j]);
      }
      most = warp_max(most);
      float from = most == NEGATIVE_INFINITY ? 0.0f : most, by = power(top - from);
      top = most, total *= by;
#pragma unroll
      for (int j = 0; j < EACH; j++) s[j] = power(s[j] - from), total += s[j];
#if EACH == 2
      *(u32*)&shared.share[warp][lane * 4] = pack_bf16(s[0], s[1]);
#else
      *(bf16*)&shared.share[warp][lane * 2] = to_bf16(s[0]);
#endif
      if (lane == 0) shared.rescale[warp] = by;
    }
    __syncthreads();
    {  // sums of 64 channels
      float by[2] = {shared.rescale[2 * t], shared.rescale[2 * t + 1]};
#pragma unroll
      for (int c = 0; c < 4; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[c][j] *= by[j % 2];
      u32 share = shared_address(shared.share[lane % 8]) + lane / 8 * 16;
#pragma unroll
      for (int k = 0; k < TILE / 16; k += 2) {
        u32 b[4];
        load_matrices(share + k * 32, b);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int c = 0; c < 4; c++) {
            u32 v[4];
            int row = (k + j) * 16 + lane / 16 * 8 + lane % 8, chunk = c * 2 + lane / 8 % 2;
            load_transposed(tile + row * ROW_BYTES + warp * 128 + ((chunk ^ (row % 8)) * 16), v);
            mma_bf16(o[c], v[0], v[1], v[2], v[3], b[2 * j], b[2 * j + 1]);
          }
      }
    }
    if (i + 1 < turns) {
      __syncthreads();
      if (BUFFERS == 1) {
        if (warp * 8 < TILE) load_eight(in, work, shared_address(shared.tile[0]), x + TILE + warp * 8, warp * 8, writes);
        copies_commit();
      }
    }
  }

  // Sums to the block that has their channels.
  total = warp_sum(total);
  if (lane < PEERS) {
    peer_store(peer_address(&shared.stats[rank][warp], lane), float2{top, total});
  }
#pragma unroll
  for (int c = 0; c < 4; c++) peer_store(peer_address(&shared.sums[rank][c][lane], warp), o[c]);
  cluster_sync();
  if (warp < 4) {
    float2 stat[PEERS][2];
    float most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, all[2] = {0, 0};
#pragma unroll
    for (int p = 0; p < PEERS; p++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        stat[p][j] = shared.stats[p][2 * t + j];
        most[j] = fmaxf(most[j], stat[p][j].x);
      }
    float v[4] = {0, 0, 0, 0};
#pragma unroll
    for (int p = 0; p < PEERS; p++) {
      float f[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        f[j] = stat[p][j].x == NEGATIVE_INFINITY ? 0.0f : power(stat[p][j].x - most[j]);
        all[j] += f[j] * stat[p][j].y;
      }
      float4 part = shared.sums[p][warp][lane];
      v[0] += f[0] * part.x, v[1] += f[1] * part.y, v[2] += f[0] * part.z, v[3] += f[1] * part.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
      *(bf16*)&shared.sum[2 * t + j % 2][(warp * 16 + j / 2 * 8 + g) * 2] =
          to_bf16(all[j % 2] > 0 ? v[j] / all[j % 2] : 0.0f);
  }
  __syncthreads();

  // Their part of the results, to the block that has these.
  float d[2][4] = {};
#pragma unroll
  for (int k = 0; k < 2; k++) {
    uint4 b = g < TOKENS ? *(uint4*)&shared.sum[g % TOKENS * 2 + h][k * 64 + t * 16] : uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint4 u = v_weight[i][0][k], v = v_weight[i][1][k];
      mma_bf16(d[i], u.x, v.x, u.y, v.y, b.x, b.y);
      mma_bf16(d[i], u.z, v.z, u.w, v.w, b.z, b.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) peer_store(peer_address(&shared.results[rank][i][lane], warp), d[i]);
  cluster_sync();
  if (warp < 2 && heads + rank / 4 < HEADS) {
    float v[4] = {0, 0, 0, 0};
#pragma unroll
    for (int p = 0; p < PEERS; p++) {
      float4 part = shared.results[p][warp][lane];
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int token = 2 * t + j % 2, row = rank % 4 * 32 + warp * 16 + j / 2 * 8 + g;
      if (token < work.count)
        y[((i64)(work.token + token) * HEADS + heads + rank / 4) * VALUE + row] = to_bf16(v[j]);
    }
  }
}
