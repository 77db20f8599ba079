// Reads memory and adds it up: the floor under the time of any kernel that has to read these bytes.
//
// Compiled at run time with
//   THREADS  threads a block
//   VECTORS  16-byte loads that a thread has in flight
//
// A persistent grid: the blocks, a few a processor, walk over the memory together. The sum, one word a block, keeps the
// compiler from leaving the loads out, and shows that every byte was read once. As in decode.cu, the next kernel may
// start to load before this one has ended (programmatic dependent launch); only the one write waits.

typedef unsigned int u32;

// A load with its predicate, so that no branch stands between loads.
__device__ __forceinline__ uint4 load_once(const uint4* address, bool inside) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
      "}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(address), "r"((u32)inside));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
read(const uint4* __restrict__ data, long long vectors, u32* __restrict__ sums) {
  __shared__ u32 parts[THREADS / 32];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const long long step = (long long)gridDim.x * THREADS;
  u32 sum = 0;
  for (long long first = (long long)blockIdx.x * THREADS + threadIdx.x; first < vectors; first += step * VECTORS) {
    uint4 v[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) v[i] = load_once(data + first + i * step, first + i * step < vectors);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) sum += v[i].x + v[i].y + v[i].z + v[i].w;
  }
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (threadIdx.x) return;
  for (int warp = 1; warp < THREADS / 32; warp++) sum += parts[warp];
  sums[blockIdx.x] = sum;
}
