// What no kernel can beat: reading and copying, with nothing to compute.
//
// One block a piece of PIECE bytes, 16 bytes a load, all loads of a thread in flight at once.

#define UNROLL (PIECE / (16 * THREADS))

struct alignas(16) Quad { unsigned x, y, z, w; };

__device__ __forceinline__ Quad load(const Quad* at) {
  Quad q;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(at));
  return q;
}

extern "C" __global__ void __launch_bounds__(THREADS) read_all(const unsigned char* from, float* to) {
  asm volatile("griddepcontrol.launch_dependents;");
  const Quad* at = (const Quad*)(from + (size_t)blockIdx.x * PIECE) + threadIdx.x;
  Quad q[UNROLL];
#pragma unroll
  for (int i = 0; i < UNROLL; i++) q[i] = load(at + i * THREADS);
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < UNROLL; i++) sum += q[i].x ^ q[i].y ^ q[i].z ^ q[i].w;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Never true of random bytes, and the compiler cannot know: the loads stay.
  if (sum == 0x9e3779b9u) to[0] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_all(const unsigned char* from, unsigned char* to) {
  asm volatile("griddepcontrol.launch_dependents;");
  const Quad* at = (const Quad*)(from + (size_t)blockIdx.x * PIECE) + threadIdx.x;
  Quad q[UNROLL];
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int i = 0; i < UNROLL; i++) q[i] = load(at + i * THREADS);
  Quad* out = (Quad*)(to + (size_t)blockIdx.x * PIECE) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < UNROLL; i++) out[i * THREADS] = q[i];
}
