// Keys and values of many rows of the latent cache, as mla_prefill.cu reads them, on warpgroup products (sm_90a).
//
// One block has 128 rows of one sequence, whose latents stay in shared memory, and some heads. In turns it multiplies
// them by a head's matrix of keys, rows by channels, and by its matrix of values, channels by rows: either way the result
// is [128 lines][128 columns], which goes out in runs of 32 columns,
//
//   k     [heads, sequences, tiles][NOPE / 32][128 rows][64 bytes]
//   v     [heads, sequences, tiles][4 runs of 32 rows][VALUE channels][64 bytes]
//   rope  [sequences, tiles][ROPE / 32][128 rows][64 bytes]
//
// a line's 16-byte quarter c at c ^ (line / 2 % 4). Rows behind a sequence's last are zero up to the end of its last
// tile; tiles beyond are not written. Two warpgroups multiply, two more bring the matrices, 128 latent channels at a time,
// one stage each: a stage goes through registers, and who makes it known to the tensor cores waits for all its loads.
//
// Constants: PAGE rows; LATENT, a multiple of 128; NOPE and VALUE, 128 both; ROPE, a multiple of 32; HEAD_PITCH, from one
// head's matrix to the next, in elements; EACH heads of a block.
#include "wgmma.cuh"

#define ROWS 128
#define WIDTH (LATENT + ROPE)
#define LATENT_BYTES (ROWS * LATENT * 2)
#define STAGE_BYTES (128 * 128 * 2)
#define STAGES 2
#define STEPS (LATENT / 128)  // stages of a matrix
#define CONSUMERS 256
#define THREADS (CONSUMERS + STAGES * 128)
#define GATHERED 6  // loads of a thread that are on their way together

static_assert(NOPE == 128 && VALUE == 128 && LATENT % 128 == 0 && ROPE % 32 == 0, "");

// Where 16-byte piece `piece` of a line stands, of LINES lines a panel.
template <int LINES>
DEVICE u32 place(int line, int piece) {
  return piece / 4 * (LINES * 64) + line * 64 + (piece % 4 ^ line / 2 % 4) * 16;
}

// Latents of the block's rows to shared memory, rope keys to where they are read.
DEVICE void gather(u8* latents, u8* rope, const bf16* cache, const int* pages, int begin, int length, bool turned) {
  constexpr int PIECES = WIDTH / 8;
  for (int first = threadIdx.x; first < ROWS * PIECES; first += GATHERED * THREADS) {
    int page[GATHERED];
    uint4 of[GATHERED];
#pragma unroll
    for (int j = 0; j < GATHERED; j++) {
      const int x = begin + (first + j * THREADS) / PIECES;
      page[j] = first + j * THREADS < ROWS * PIECES && x < length ? load_fresh(pages + x / PAGE) : -1;
    }
#pragma unroll
    for (int j = 0; j < GATHERED; j++) {
      const int row = (first + j * THREADS) / PIECES, piece = (first + j * THREADS) % PIECES;
      of[j] = uint4{0, 0, 0, 0};
      if (page[j] >= 0)
        of[j] = load_fresh((const uint4*)(cache + ((i64)page[j] * PAGE + (begin + row) % PAGE) * WIDTH) + piece);
    }
#pragma unroll
    for (int j = 0; j < GATHERED; j++) {
      const int row = (first + j * THREADS) / PIECES, piece = (first + j * THREADS) % PIECES;
      if (row >= ROWS) continue;
      if (piece < LATENT / 8) *(uint4*)(latents + place<ROWS>(row, piece)) = of[j];
      else if (turned) *(uint4*)(rope + place<ROWS>(row, piece - LATENT / 8)) = of[j];
    }
  }
}

DEVICE void produce(u8* stages, u64* full, u64* empty, const bf16* w_k, const bf16* w_v, int heads) {
  const int thread = threadIdx.x % 128, slot = (threadIdx.x - CONSUMERS) / 128;
  for (int i = slot; i < heads * 2 * STEPS; i += STAGES) {
    const int part = i / STEPS;
    const bf16* from = (part % 2 ? w_v : w_k) + (i64)(part / 2) * HEAD_PITCH + i % STEPS * 128;
    uint4 of[16];
#pragma unroll
    for (int j = 0; j < 16; j++)
      of[j] = __ldg((const uint4*)(from + (i64)(j * 8 + thread / 16) * LATENT) + thread % 16);
    barrier_wait(empty + slot, (i / STAGES & 1) ^ 1);
#pragma unroll
    for (int j = 0; j < 16; j++) *(uint4*)(stages + slot * STAGE_BYTES + place<128>(j * 8 + thread / 16, thread % 16)) = of[j];
    fence_async();
    barrier_arrive(full + slot);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mla_expand(const bf16* cache, const int* page_table, const int* offsets, const int* positions, const bf16* w_k,
               const bf16* w_v, u8* k, u8* v, u8* rope, int pages, int first_head, int heads) {
  extern __shared__ __align__(1024) u8 memory[];
  u8 *latents = memory, *stages = latents + LATENT_BYTES, *made = stages + STAGES * STAGE_BYTES;
  u64 *full = (u64*)(made + STAGE_BYTES), *empty = full + STAGES;
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i, 128), barrier_init(empty + i, CONSUMERS / 32);
    barrier_init_fence();
  }
  wait_dependencies();
  const int tile = blockIdx.x, sequence = blockIdx.y, sequences = gridDim.y, tiles = gridDim.x, begin = tile * ROWS;
  const int start = load_fresh(offsets + sequence), stop = load_fresh(offsets + sequence + 1);
  const int length = stop > start ? min(load_fresh(positions + stop - 1) + 1, pages * PAGE) : 0;
  if (begin >= length) return;
  gather(latents, rope + ((i64)sequence * tiles + tile) * (ROWS * ROPE * 2), cache, page_table + (i64)sequence * pages, begin,
         length, blockIdx.z == 0);
  fence_async();
  __syncthreads();
  const int own = blockIdx.z * EACH, count = min(EACH, heads - own);
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), group = warp / 4;
  if (warp >= CONSUMERS / 32) {
    registers_give<112>();
    const i64 first = (i64)(first_head + own) * HEAD_PITCH;
    produce(stages, full, empty, w_k + first, w_v + first, count);
    return;
  }
  registers_keep<144>();
  const int lane = threadIdx.x % 32;
  const u32 latents_at = (u32)operand_at(shared_address(latents)), stages_at = (u32)operand_at(shared_address(stages));
  int slot = 0;
  u32 phase = 0;
  for (int part = 0; part < count * 2; part++) {
    const bool is_value = part % 2;
    float sum[64];
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
      barrier_wait(full + slot, phase);
      const u32 whole = latents_at + d * (4 * ROWS * 64 >> 4), weights = stages_at + slot * (STAGE_BYTES >> 4);
      const u32 lines = (is_value ? weights : whole) + group * (64 * 64 >> 4), columns = is_value ? whole : weights;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; i++)
        Wgmma<128>::b16(sum, descriptor(lines + i / 2 * (128 * 64 >> 4) + i % 2 * 2),
                        descriptor(columns + i / 2 * (128 * 64 >> 4) + i % 2 * 2), d > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + slot);
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    pin<64>(sum);
    // Each warp turns its 16 lines by itself.
    const int line = group * 64 + warp % 4 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < 16; i += 2)
      store_matrices(made + place<128>(line, i + lane / 16), pack_bf16(sum[4 * i], sum[4 * i + 1]),
                     pack_bf16(sum[4 * i + 2], sum[4 * i + 3]), pack_bf16(sum[4 * i + 4], sum[4 * i + 5]),
                     pack_bf16(sum[4 * i + 6], sum[4 * i + 7]));
    __syncwarp();
    u8* to = (is_value ? v : k) + (((i64)(own + part / 2) * sequences + sequence) * tiles + tile) * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int at = i / 2 * (128 * 64) + (group * 64 + warp % 4 * 16) * 64 + i % 2 * 512 + lane * 16;
      *(uint4*)(to + at) = *(const uint4*)(made + at);
    }
    __syncwarp();
  }
}
