// MLA of a few tokens, second launch: attention in the space of the latents over a split of the cached rows.
//
//   partial[split, column] = sum_x 2^(s[x] - m) c[x],  stats = (m, sum_x 2^(s[x] - m)),  s[x] = query . (c | k_r)[x]
//
// A column is a head of a token; a unit is the COLUMNS of one token (of 32 of its heads where it has more), whose
// operand tile `mla_absorb` made. Cached rows are the long side of both products: s^T = rows x queries, and
// o^T = latents^T x shares, wgmma of 64 rows with a tile of rows read once from shared memory for both.
//
// A block has a warpgroup that copies and one that multiplies, for one unit; PAIRED: two, for two units of one
// sequence, which both read every tile. One warpgroup keeps up with the memory, and leaves registers for the
// blocks of the launches before and after.
// A run of rows depends on the sequence's length and the grid alone. The CLUSTER runs of neighbouring blocks are
// added up in the end, through shared memory: together they are a split.
// The first EARLY tiles are announced to L2 before the launches before have ended, from page numbers that may be
// stale: nothing is read by that. The others are announced AHEAD tiles before they are copied.
//
// A partial row holds channel c at c / 128 * 128 + (c / 16 % 4 * 8 + c % 8) * 4 + c / 8 % 2 * 2 + c / 64 % 2.
#include "device.cuh"

#define WIDTH 576
#define ROW_BYTES (WIDTH * 2)
#define BLOCKS 9  // of 64 channels
#define LATENT_BLOCKS 8
#define EIGHT (8 * ROW_BYTES)  // eight rows: 9 swizzled atoms of 8 rows by 128 bytes
#define TILE 64
#define TILE_BYTES (TILE * ROW_BYTES)
#define SLOTS 2
#define UNITS (PAIRED ? 2 : 1)
#define COPIERS UNITS  // which warpgroup copies
#define QUERY_BYTES (COLUMNS * ROW_BYTES)
#define SHARE_BYTES (COLUMNS * 128)
#define GROUP 128
#define OWN (COLUMNS / 2)   // results of a product that a thread holds
#define MINE (COLUMNS / 4)  // columns that they are of
#define GROWTH 8.0f         // powers of two that a share may pass 1 by before the maximum is moved

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// ---------------------------------------------------------------- products

// Operand under the 128-byte swizzle, `stride` bytes from 8 rows to the next 8.
DEVICE u64 operand(u32 address, u32 stride) {
  return (1ull << 62) | ((u64)(stride >> 4) << 32) | ((u64)(stride >> 4) << 16) | (u64)((address & 0x3ffff) >> 4);
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#if COLUMNS == 8
#define REGISTERS "%0,%1,%2,%3"
#define OUTPUTS D4(0)
#define A "%4"
#define B "%5"
#define ADD "%6"
#define TURN "%7"
#elif COLUMNS == 16
#define REGISTERS "%0,%1,%2,%3,%4,%5,%6,%7"
#define OUTPUTS D4(0), D4(4)
#define A "%8"
#define B "%9"
#define ADD "%10"
#define TURN "%11"
#else
#define REGISTERS "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define OUTPUTS D4(0), D4(4), D4(8), D4(12)
#define A "%16"
#define B "%17"
#define ADD "%18"
#define TURN "%19"
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

// d[64, COLUMNS] (+)= A [64, 16] B [COLUMNS, 16]^T; `transposed` A is stored [16, 64].
template <int transposed>
DEVICE void multiply(float* d, u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) "k16.f32.bf16.bf16 {" REGISTERS "}, " A ", " B
               ", p, 1, 1, " TURN ", 0;}"
               : OUTPUTS
               : "l"(a), "l"(b), "r"(add), "n"(transposed));
}

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// ---------------------------------------------------------------- barriers of a warpgroup

DEVICE void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE bool group_any(int id, bool v) {
  u32 r;
  asm volatile(
      "{.reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q;}"
      : "=r"(r)
      : "r"((u32)v), "r"(id), "n"(GROUP)
      : "memory");
  return r;
}

DEVICE void cluster_sync() {
  if (CLUSTER > 1)
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE u32 cluster_address(u32 address, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE float2 cluster_load(u32 address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
DEVICE void cluster_store(u32 address, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}

DEVICE float power(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// ---------------------------------------------------------------- what a block has to do

struct Work {
  int sequence;  // -1: nothing
  int unit, units;
  int length;             // of the sequence, as far as its units see
  int split, first, end;  // where the split begins, and the run of rows in it
  int seen[2];            // how many rows each unit may see
};

// In a warp. Bounds hold whatever the tables hold, so that it may be asked before they are known to be right.
DEVICE Work find_work(const int* offsets, const int* positions, int tokens, int sequences, int pages) {
  int lane = threadIdx.x % 32;
  Work work;
  work.sequence = -1;
  int before = 0;  // pairs, or units, of the sequences before
  for (int b = 0; b <= sequences; b += 32) {  // the last: tokens that no sequence has
    int from = b + lane <= sequences ? load_fresh(offsets + b + lane) : tokens;
    int to = b + lane < sequences ? load_fresh(offsets + b + lane + 1) : tokens;
    from = min(max(from, 0), tokens), to = min(max(to, from), tokens);
    int n = (to - from) * HEAD_BLOCKS;
    int own = PAIRED ? (n + 1) / 2 : n, sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      int v = __shfl_up_sync(FULL_WARP, sum, i);
      if (lane >= i) sum += v;
    }
    int at = (int)blockIdx.x - before - (sum - own);
    u32 mine = __ballot_sync(FULL_WARP, at >= 0 && at < own);
    if (mine) {
      int who = __ffs(mine) - 1;
      int unit = from * HEAD_BLOCKS + at * UNITS, units = min(UNITS, n - at * UNITS);
      work.sequence = b + who;
      work.unit = __shfl_sync(FULL_WARP, unit, who);
      work.units = __shfl_sync(FULL_WARP, units, who);
      break;
    }
    before += __shfl_sync(FULL_WARP, sum, 31);
  }
  if (work.sequence < 0) return work;
  int length = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int unit = work.unit + min(i, work.units - 1);
    work.seen[i] = min(max(load_fresh(positions + unit / HEAD_BLOCKS) + 1, 0), pages * PAGE);
    length = max(length, work.seen[i]);
  }
  if (work.sequence == sequences) length = 0;
  int runs = gridDim.y, rows = max(SMALLEST, ((length + runs - 1) / runs + 7) / 8 * 8);
  work.split = min((int)blockIdx.y / CLUSTER * CLUSTER * rows, length);
  work.first = min((int)blockIdx.y * rows, length);
  work.end = min(work.first + rows, length);
  work.length = length;
  return work;
}

// ---------------------------------------------------------------- the warpgroup that copies

struct Pages {
  const int* table;  // of the sequence
  int pages, limit;
  int first, held;

  DEVICE Pages(const int* table, int pages, int limit, int row) : table(table), pages(pages), limit(limit) {
    first = row / PAGE;
    load();
  }
  DEVICE void load() {
    int at = first + (int)threadIdx.x % 32;
    held = at < pages ? min(max(load_fresh(table + at), 0), limit - 1) : 0;
  }
  // Row of the cache of the eight rows that begin at row `x` of the sequence; x never falls by a page.
  DEVICE i64 row(int x) {
    int at = x / PAGE - first;
    if (at >= 32) {
      first += 32, at -= 32;
      load();
    }
    return (i64)__shfl_sync(FULL_WARP, held, at) * PAGE + x % PAGE;
  }
};

DEVICE void copy_rows(u32 to, const u8* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Announces tile `i`; each of the four warps two of its eight rows of eight.
DEVICE void announce(Pages& pages, const u8* cache, const Work& work, int i) {
  int warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int x = work.first + i * TILE + (warp + 4 * half) * 8;
    if (x >= work.end) return;
    const u8* from = cache + pages.row(x) * ROW_BYTES;
    if (threadIdx.x % 32 == 0) bulk_prefetch(from, EIGHT);
  }
}

// ---------------------------------------------------------------- kernel

struct Shared {
  u64 full[SLOTS], empty[SLOTS], asked;
  float tops[UNITS][4][COLUMNS];
  float2 stats[UNITS][COLUMNS];
};

extern "C" __global__ void __launch_bounds__((UNITS + 1) * GROUP, PAIRED ? 1 : 2)
    mla_attend(const u8* __restrict__ queries, const u8* __restrict__ cache, const int* __restrict__ page_table,
               const int* __restrict__ offsets, const int* __restrict__ positions, float* partial, float* stats,
               int tokens, int sequences, int pages, int page_count) {
  launch_dependents();
  extern __shared__ __align__(1024) u8 memory[];
  u8* rows = memory;
  u8* asked = memory + SLOTS * TILE_BYTES;
  u8* shares = asked + UNITS * QUERY_BYTES;
  Shared& shared = *(Shared*)(shares + UNITS * SHARE_BYTES);
  int group = threadIdx.x / GROUP, thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++)
      barrier_init(shared.full + i, GROUP), barrier_init(shared.empty + i, 4 * UNITS);
    barrier_init(&shared.asked, 1);
    barrier_init_fence();
  }
  if (group == COPIERS && EARLY > 0) {
    Work work = find_work(offsets, positions, tokens, sequences, pages);
    if (work.sequence >= 0 && work.first < work.end) {
      Pages numbers(page_table + (i64)work.sequence * pages, pages, page_count, work.first);
      for (int i = 0; i < EARLY; i++) announce(numbers, cache, work, i);
    }
  }
  __syncthreads();
  wait_dependencies();
  Work work = find_work(offsets, positions, tokens, sequences, pages);
  if (work.sequence < 0) return;
  int tiles = (work.end - work.first + TILE - 1) / TILE;
  i64 columns = (i64)tokens * HEAD_BLOCKS * COLUMNS, split = blockIdx.y / CLUSTER * columns;
  u32 rank = blockIdx.y % CLUSTER;
  if (work.split >= work.length) {  // nothing for the whole cluster
    if (rank == 0 && thread < COLUMNS && group < work.units)
      ((float2*)stats)[split + (i64)(work.unit + group) * COLUMNS + thread] = float2{NEGATIVE_INFINITY, 0};
    return;
  }

  if (group == COPIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    Pages numbers(page_table + (i64)work.sequence * pages, pages, page_count, work.first);
    Pages later = numbers;
    for (int i = EARLY; i < AHEAD; i++) announce(later, cache, work, i);
    // A lane copies 16 bytes of row lane / 8 (and that + 4) of eight, of each block of 128 bytes.
    int r = lane / 8, q = lane % 8;
    u32 to = shared_address(rows) + r * 128 + ((q ^ r) * 16), high = 512 + ((q ^ r ^ 4) - (q ^ r)) * 16;
    for (int i = 0; i < tiles; i++) {
      int slot = i % SLOTS;
      if (i >= SLOTS) barrier_wait(shared.empty + slot, (i / SLOTS - 1) & 1);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int eight = warp + 4 * half, x = work.first + i * TILE + eight * 8;
        const u8* from = cache + (x < work.end ? numbers.row(x) : 0) * ROW_BYTES + r * ROW_BYTES + q * 16;
        u32 at = to + slot * TILE_BYTES + eight * EIGHT;
        u32 low_bytes = x + r < work.end ? 16 : 0, high_bytes = x + r + 4 < work.end ? 16 : 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          copy_rows(at + b * 1024, from + b * 128, low_bytes);
          copy_rows(at + high + b * 1024, from + 4 * ROW_BYTES + b * 128, high_bytes);
        }
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(shared.full + slot))
                   : "memory");
      if (AHEAD > 0) announce(later, cache, work, i + AHEAD);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    cluster_sync();
    cluster_sync();
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
  if (threadIdx.x == 0) {
    barrier_expect(&shared.asked, work.units * QUERY_BYTES);
    bulk_load(asked, queries + (i64)work.unit * QUERY_BYTES, work.units * QUERY_BYTES, &shared.asked);
  }
  int g = lane / 4, t = lane % 4, id = 1 + group;
  bool idle = group >= work.units;
  int seen = min(work.end, group ? work.seen[1] : work.seen[0]);
  u32 query = shared_address(asked) + group * QUERY_BYTES;
  u32 share = shared_address(shares) + group * SHARE_BYTES;
  float o[LATENT_BLOCKS][OWN] = {}, top[MINE], sum[MINE] = {};
#pragma unroll
  for (int i = 0; i < MINE; i++) top[i] = NEGATIVE_INFINITY;
  barrier_wait(&shared.asked, 0);
  for (int i = 0; i < tiles; i++) {
    int slot = i % SLOTS, x = work.first + i * TILE;
    u32 tile = shared_address(rows) + slot * TILE_BYTES;
    barrier_wait(shared.full + slot, i / SLOTS & 1);
    if (!idle && x < seen) {
      fence_async();
      float s[OWN];
      products_begin();
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          multiply<0>(s, operand(tile + b * 1024 + k * 32, EIGHT), operand(query + b * (COLUMNS * 128) + k * 32, 1024),
                      b + k > 0);
      products_end();
      if (x + TILE > seen) {
#pragma unroll
        for (int j = 0; j < OWN; j++)
          if (x + warp * 16 + g + j / 2 % 2 * 8 >= seen) s[j] = NEGATIVE_INFINITY;
      }
      // s[4 j + 2 r + e]: row 16 warp + g + 8 r, column 8 j + 2 t + e. The maximum moves only when a score passes it
      // by far, column by column, so that no column knows of another.
      bool grows = false;
#pragma unroll
      for (int j = 0; j < OWN; j++) grows |= s[j] > top[j / 4 * 2 + j % 2] + GROWTH;
      if (group_any(id, grows)) {
        float most[MINE];
#pragma unroll
        for (int c = 0; c < MINE; c++) {
          most[c] = fmaxf(s[c / 2 * 4 + c % 2], s[c / 2 * 4 + c % 2 + 2]);
#pragma unroll
          for (int step = 4; step < 32; step *= 2) most[c] = fmaxf(most[c], __shfl_xor_sync(FULL_WARP, most[c], step));
          if (g == 0) shared.tops[group][warp][c / 2 * 8 + 2 * t + c % 2] = most[c];
        }
        group_sync(id, GROUP);
#pragma unroll
        for (int c = 0; c < MINE; c++) {
          float v = NEGATIVE_INFINITY;
#pragma unroll
          for (int w = 0; w < 4; w++) v = fmaxf(v, shared.tops[group][w][c / 2 * 8 + 2 * t + c % 2]);
          v = v > top[c] + GROWTH ? v : top[c];
          float by = v == top[c] ? 1.0f : power(top[c] - v);
          top[c] = v, sum[c] *= by;
#pragma unroll
          for (int b = 0; b < LATENT_BLOCKS; b++) o[b][c / 2 * 4 + c % 2] *= by, o[b][c / 2 * 4 + c % 2 + 2] *= by;
        }
      }
#pragma unroll
      for (int j = 0; j < OWN; j++) {
        float from = top[j / 4 * 2 + j % 2];
        s[j] = power(s[j] - (from == NEGATIVE_INFINITY ? 0.0f : from));
        sum[j / 4 * 2 + j % 2] += s[j];
      }
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++) {
        u32 at = share + (j * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
                     "r"(pack_bf16(s[4 * j], s[4 * j + 1])), "r"(pack_bf16(s[4 * j + 2], s[4 * j + 3]))
                     : "memory");
      }
      fence_async();
      group_sync(id, GROUP);
      products_begin();
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int b = 0; b < LATENT_BLOCKS; b++)
          multiply<1>(o[b], operand(tile + b * 1024 + k * 2 * EIGHT, EIGHT), operand(share + k * 32, 1024), 1);
      products_end();
    }
    if (lane == 0) barrier_arrive(shared.empty + slot);
  }

  // Sums over the rows of all warps.
#pragma unroll
  for (int c = 0; c < MINE; c++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum[c] += __shfl_xor_sync(FULL_WARP, sum[c], step);
    if (g == 0) shared.tops[group][warp][c / 2 * 8 + 2 * t + c % 2] = sum[c];
  }
  group_sync(id, GROUP);
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    int column = c / 2 * 8 + 2 * t + c % 2;
    sum[c] = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) sum[c] += shared.tops[group][w][column];
    if (warp == 0 && g == 0) shared.stats[group][column] = float2{top[c], sum[c]};
  }

  // Blocks of the cluster add up: each has 8 / CLUSTER of the 8 blocks of channels in the end.
  float4* given = (float4*)rows + group * (LATENT_BLOCKS * OWN / 4 * GROUP);
  if (CLUSTER > 1) {
    cluster_sync();
#pragma unroll
    for (int c = 0; c < MINE; c++) {
      u32 at = shared_address(&shared.stats[group][c / 2 * 8 + 2 * t + c % 2]);
      float2 of[CLUSTER];
      float most = NEGATIVE_INFINITY, total = 0;
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) {
        of[i] = cluster_load(cluster_address(at, i));
        most = fmaxf(most, of[i].x);
      }
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) total += of[i].y * (of[i].x == NEGATIVE_INFINITY ? 0.0f : power(of[i].x - most));
      float by = top[c] == NEGATIVE_INFINITY ? 0.0f : power(top[c] - most);
      top[c] = most, sum[c] = total;
#pragma unroll
      for (int b = 0; b < LATENT_BLOCKS; b++) o[b][c / 2 * 4 + c % 2] *= by, o[b][c / 2 * 4 + c % 2 + 2] *= by;
    }
#pragma unroll
    for (int i = 0; i < CLUSTER; i++) {
      u32 to = cluster_address(shared_address(given + (rank * (LATENT_BLOCKS / CLUSTER) * OWN / 4) * GROUP + thread), i);
#pragma unroll
      for (int b = 0; b < LATENT_BLOCKS / CLUSTER; b++)
#pragma unroll
        for (int j = 0; j < OWN; j += 4) {
          const float* v = o[i * (LATENT_BLOCKS / CLUSTER) + b] + j;
          cluster_store(to + (b * OWN + j) / 4 * GROUP * 16, float4{v[0], v[1], v[2], v[3]});
        }
    }
    cluster_sync();
  }
  if (idle) return;
  i64 column = split + (i64)(work.unit + group) * COLUMNS;
  if (rank == 0 && warp == 0 && g == 0) {
#pragma unroll
    for (int c = 0; c < MINE; c++)
      ((float2*)stats)[column + c / 2 * 8 + 2 * t + c % 2] = float2{top[c], sum[c]};
  }
#pragma unroll
  for (int b = 0; b < LATENT_BLOCKS / CLUSTER; b += 2) {
    float v[2][OWN];
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int j = 0; j < OWN; j += 4) {
        if (CLUSTER == 1) {
#pragma unroll
          for (int i = 0; i < 4; i++) v[k][j + i] = o[b + k][j + i];
          continue;
        }
        float4 all = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
          float4 one = given[((i * (LATENT_BLOCKS / CLUSTER) + b + k) * OWN + j) / 4 * GROUP + thread];
          all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
        }
        v[k][j] = all.x, v[k][j + 1] = all.y, v[k][j + 2] = all.z, v[k][j + 3] = all.w;
      }
    int quarter = (rank * (LATENT_BLOCKS / CLUSTER) + b) / 2;
#pragma unroll
    for (int c = 0; c < MINE; c++) {
      int j = c / 2 * 4 + c % 2;
      i64 at = (column + c / 2 * 8 + 2 * t + c % 2) * 512 + quarter * 128 + (warp * 8 + g) * 4;
      *(float4*)(partial + at) = float4{v[0][j], v[1][j], v[0][j + 2], v[1][j + 2]};
    }
  }
}
