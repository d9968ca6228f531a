// MLA of a few tokens, second launch: attention in the space of the latents over a split of the cached rows.
//
//   partial[split, column] = sum_x 2^(s[x] - m) c[x] / l,  stats = (m, l = sum_x 2^(s[x] - m)),
//   s[x] = query . (c | k_r)[x]
//
// A column is a head of a token; a unit is the COLUMNS of one token (of 32 of its heads where it has more), whose
// operand tile `mla_absorb` made. Cached rows are the long side of both products: s^T = rows x queries, and
// o^T = latents^T x shares, wgmma of 64 rows with a tile of rows read once from shared memory for both.
//
// A block has a warpgroup that copies and one that multiplies, for one unit; PAIRED: two, for two units of one
// sequence, which both read every tile. One warpgroup keeps up with the memory, and leaves registers for the
// blocks of the launches before and after.
// A run of rows depends on the sequence's length and the grid alone.
// What other steps wrote is read before the launches before have ended: offsets, positions, page numbers, and the
// cached rows up to the sequence's first of this step. So the tiles that shared memory has room for are under way
// while `mla_absorb` runs, and EARLY more are announced to L2.
//
// A partial row holds, in f16, channel (4 k + e / 2) * 64 + w * 16 + e % 2 * 8 + g at k * 256 + (w * 8 + g) * 8 + e.
#include "mla_few.cuh"

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

// Operand under the 128-byte swizzle, `stride` bytes from 8 rows to the next 8, in two words. Neighbours of an operand
// are some 16 bytes further in the first word: one addition, where a descriptor anew would take ten instructions.
DEVICE u32 operand_low(u32 address, u32 stride) { return (address & 0x3ffff) >> 4 | stride >> 4 << 16; }
DEVICE u32 operand_high(u32 stride) { return 1u << 30 | stride >> 4; }

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#if COLUMNS == 8
#define REGISTERS "%0,%1,%2,%3"
#define OUTPUTS D4(0)
#define A "{%4, %5}"
#define B "{%6, %7}"
#define ADD "%8"
#define TURN "%9"
#elif COLUMNS == 16
#define REGISTERS "%0,%1,%2,%3,%4,%5,%6,%7"
#define OUTPUTS D4(0), D4(4)
#define A "{%8, %9}"
#define B "{%10, %11}"
#define ADD "%12"
#define TURN "%13"
#else
#define REGISTERS "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define OUTPUTS D4(0), D4(4), D4(8), D4(12)
#define A "{%16, %17}"
#define B "{%18, %19}"
#define ADD "%20"
#define TURN "%21"
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

// d[64, COLUMNS] (+)= A [64, 16] B [COLUMNS, 16]^T; `transposed` A is stored [16, 64].
template <int transposed>
DEVICE void multiply(float* d, u32 a, u32 a_high, u32 b, u32 b_high, int add) {
  asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, " ADD ", 0; mov.b64 a, " A "; mov.b64 b, " B ";\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) "k16.f32.bf16.bf16 {" REGISTERS "}, a, b"
               ", p, 1, 1, " TURN ", 0;}"
               : OUTPUTS
               : "r"(a), "r"(a_high), "r"(b), "r"(b_high), "r"(add), "n"(transposed));
}

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Keeps the compiler from reading results of products before these have ended.
template <int count>
DEVICE void pin(float* d) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(d[i])::"memory");
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

// ---------------------------------------------------------------- what a block has to do

struct Work {
  int sequence;  // -1: nothing
  int unit, units;
  int length;             // of the sequence, as far as its units see
  int past;               // rows that the sequence had before this step
  int first, end;         // of the run of rows
  int seen[2];            // how many rows each unit may see
};

// In a warp.
DEVICE Work find_work(const int* offsets, const int* positions, int tokens, int sequences, int pages) {
  int lane = threadIdx.x % 32;
  Work work;
  work.sequence = -1;
  int before = 0, start = 0;  // pairs, or units, of the sequences before; the sequence's first token
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
      start = __shfl_sync(FULL_WARP, from, who);
      break;
    }
    before += __shfl_sync(FULL_WARP, sum, 31);
  }
  if (work.sequence < 0) return work;
  work.past = load_fresh(positions + start);
  int length = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int unit = work.unit + min(i, work.units - 1);
    work.seen[i] = min(max(load_fresh(positions + unit / HEAD_BLOCKS) + 1, 0), pages * PAGE);
    length = max(length, work.seen[i]);
  }
  if (work.sequence == sequences) length = 0;
  int runs = gridDim.y, rows = max(SMALLEST, ((length + runs - 1) / runs + 7) / 8 * 8);
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
};

extern "C" __global__ void __launch_bounds__((UNITS + 1) * GROUP, PAIRED ? 1 : 2)
    mla_attend(const u8* __restrict__ queries, const u8* __restrict__ cache, const int* __restrict__ page_table,
               const int* __restrict__ offsets, const int* __restrict__ positions, u8* partial, float* stats,
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
  Work work = find_work(offsets, positions, tokens, sequences, pages);
  __syncthreads();
  if (work.sequence < 0) {
    wait_dependencies();
    return;
  }
  int tiles = (work.end - work.first + TILE - 1) / TILE;
  i64 columns = (i64)tokens * HEAD_BLOCKS * COLUMNS, split = blockIdx.y * columns;
  if (work.first >= work.end) {
    wait_dependencies();
    if (thread < COLUMNS && group < work.units)
      ((float2*)stats)[split + (i64)(work.unit + group) * COLUMNS + thread] = float2{NEGATIVE_INFINITY, 0};
    return;
  }

  if (group == COPIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    Pages numbers(page_table + (i64)work.sequence * pages, pages, page_count, work.first);
    Pages later = numbers;
    bool waited = false;
    // A lane copies 16 bytes of row lane / 8 (and that + 4) of eight, of each block of 128 bytes.
    int r = lane / 8, q = lane % 8;
    u32 to = shared_address(rows) + r * 128 + ((q ^ r) * 16), high = 512 + ((q ^ r ^ 4) - (q ^ r)) * 16;
    for (int i = 0; i < tiles; i++) {
      int slot = i % SLOTS;
      if (!waited && (i == SLOTS || min(work.first + i * TILE + TILE, work.end) > work.past)) {
        for (int j = SLOTS; j < SLOTS + EARLY; j++) announce(later, cache, work, j);
        wait_dependencies();
        waited = true;
      }
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
    }
    if (!waited) wait_dependencies();
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
  int g = lane / 4, t = lane % 4, id = 1 + group;
  bool idle = group >= work.units;
  int seen = min(work.end, group ? work.seen[1] : work.seen[0]);
  int unit = PAIRED ? group : 0;
  u32 high = operand_high(1024), query = operand_low(shared_address(asked) + unit * QUERY_BYTES, 1024);
  u32 share_at = shared_address(shares) + unit * SHARE_BYTES, share = operand_low(share_at, 1024);
  i64 column = split + (i64)(work.unit + group) * COLUMNS;
  // The first is a rehearsal, on the memory of the queries.
#pragma unroll 1
  for (int pass = hidden(0); pass < 2; pass++) {
    bool real = pass == 1;
    if (real) {
      wait_dependencies();
      if (threadIdx.x == 0) {
        barrier_expect(&shared.asked, work.units * QUERY_BYTES);
        bulk_load(asked, queries + (i64)work.unit * QUERY_BYTES, work.units * QUERY_BYTES, &shared.asked);
      }
    }
    float o[LATENT_BLOCKS][OWN], top[MINE], sum[MINE];
#pragma unroll
    for (int b = 0; b < LATENT_BLOCKS; b++)
#pragma unroll
      for (int j = 0; j < OWN; j++) o[b][j] = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) top[i] = NEGATIVE_INFINITY, sum[i] = 0;
    if (real) barrier_wait(&shared.asked, 0);
    u32 eight = real ? EIGHT : 0, tile_high = operand_high(eight);
    int count = real ? tiles : 1;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      int slot = i % SLOTS, x = work.first + i * TILE;
      u32 tile = operand_low(real ? shared_address(rows) + slot * TILE_BYTES : shared_address(asked), eight);
      if (real) barrier_wait(shared.full + slot, i / SLOTS & 1);
      if (!idle && x < seen) {
        fence_async();
        float s[OWN];
        products_begin();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            multiply<0>(s, tile + b * 64 + k * 2, tile_high, query + b * (COLUMNS * 8) + k * 2, high, b + k > 0);
        products_end();
        pin<OWN>(s);
        if (x + TILE > seen) {
#pragma unroll
          for (int j = 0; j < OWN; j++)
            if (x + warp * 16 + g + j / 2 % 2 * 8 >= seen) s[j] = NEGATIVE_INFINITY;
        }
        // s[4 j + 2 r + e]: row 16 warp + g + 8 r, column 8 j + 2 t + e. The maximum moves only when a score passes it
        // by far, column by column, so that no column knows of another.
        bool grows = !real;
#pragma unroll
        for (int j = 0; j < OWN; j++) grows |= s[j] > top[j / 4 * 2 + j % 2] + GROWTH;
        if (group_any(id, grows)) {
          float most[MINE];
#pragma unroll
          for (int c = 0; c < MINE; c++) {
            most[c] = fmaxf(s[c / 2 * 4 + c % 2], s[c / 2 * 4 + c % 2 + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2)
              most[c] = fmaxf(most[c], __shfl_xor_sync(FULL_WARP, most[c], step));
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
          u32 at = share_at + (j * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
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
            multiply<1>(o[b], tile + b * 64 + k * (eight / 8), tile_high, share + k * 2, high, 1);
        products_end();
#pragma unroll
        for (int b = 0; b < LATENT_BLOCKS; b++) pin<OWN>(o[b]);
      }
      if (real && lane == 0) barrier_arrive(shared.empty + slot);
    }

    // Sums over the rows of all warps.
#pragma unroll
    for (int c = 0; c < MINE; c++) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[c] += __shfl_xor_sync(FULL_WARP, sum[c], step);
      if (g == 0) shared.tops[group][warp][c / 2 * 8 + 2 * t + c % 2] = sum[c];
    }
    group_sync(id, GROUP);
    bool stores = real && !idle;
#pragma unroll
    for (int c = 0; c < MINE; c++) {
      int at = c / 2 * 8 + 2 * t + c % 2, j = c / 2 * 4 + c % 2;
      float all = 0;
#pragma unroll
      for (int w = 0; w < 4; w++) all += shared.tops[group][w][at];
      store_if(stores && warp == 0 && g == 0, (float2*)stats + column + at, float2{top[c], all});
      float by = all > 0 ? __fdividef(1.0f, all) : 0;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        u32 v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = pack_f16(o[4 * k + e][j] * by, o[4 * k + e][j + 2] * by);
        store_if(stores, partial + (column + at) * 1024 + k * 512 + (warp * 8 + g) * 16, uint4{v[0], v[1], v[2], v[3]});
      }
    }
    if (!real) group_sync(id, GROUP);
  }
}
