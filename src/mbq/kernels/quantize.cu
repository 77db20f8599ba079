// A token's int8 codes and scale in one pass, for long prompts: what _quantized_rows of int8_source.py computes, bit for bit.
//
// A block has a row of x, in registers as it is stored, 16 bits a value, so that several blocks share a multiprocessor and
// one loads while another stores. Compiled at run time with
//   BITS, GROUP  any, for codes.cuh, which has the types
//   BF16     x is bfloat16 instead of float16
//   MOST     the largest code
//   GATED    a row is silu(its first inputs) * the others
//   THREADS  of a block, a multiple of 32
//   VECTORS  of 8 inputs that a thread has

#include "codes.cuh"

__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ float low_half(u32 pair) { return to_float((T)(pair & 0xFFFFu)); }
__device__ __forceinline__ float high_half(u32 pair) { return to_float((T)(pair >> 16)); }

__device__ __forceinline__ u32 both_from_floats(float low, float high) {
  u32 d;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// silu(x), in the instructions that Triton makes of x / (1 + exp(-x)).
__device__ __forceinline__ float silu(float x) {
  float power, quotient;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -1.44269504f)));
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(__fadd_rn(power, 1.f)));
  return quotient;
}

// silu(x) * up of both halves, rounded twice.
__device__ __forceinline__ u32 gate(u32 x, u32 up) {
  const u32 activated = both_from_floats(silu(low_half(x)), silu(high_half(x)));
  return both_from_floats(__fmul_rn(low_half(activated), low_half(up)), __fmul_rn(high_half(activated), high_half(up)));
}

// The code nearest to value / scale in the low byte; int8_source.py's _nearest says why.
__device__ __forceinline__ u32 nearest(float value, float scale, float reciprocal) {
  float quotient = __fmul_rn(value, reciprocal);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, value), reciprocal, quotient);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, value), reciprocal, quotient);
  return __float_as_uint(__fadd_rn(quotient, 12582912.f));
}

__device__ __forceinline__ u32 four_codes(u32 a, u32 b, float scale, float reciprocal) {
  const u32 first = __byte_perm(nearest(low_half(a), scale, reciprocal), nearest(high_half(a), scale, reciprocal), 0x0040);
  const u32 second = __byte_perm(nearest(low_half(b), scale, reciprocal), nearest(high_half(b), scale, reciprocal), 0x0040);
  return __byte_perm(first, second, 0x5410);
}

// Rows of x begin every "stride" values, those of codes every "pitch" bytes, at multiples of 16 bytes; inputs is one of 8.
extern "C" __global__ void __launch_bounds__(THREADS) quantize(const T* __restrict__ x, uint2* __restrict__ codes, float* __restrict__ scales, u32 inputs, unsigned long long stride, u32 pitch) {
  __shared__ u32 most_of_warp[THREADS / 32];
  const u32 thread = threadIdx.x, vectors = inputs / 8;
  wait_for_previous_kernel();
  const uint4* row = (const uint4*)(x + blockIdx.x * stride);
  uint4 values[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const u32 at = v * THREADS + thread;
    values[v] = at < vectors ? load_once(row + at) : make_uint4(0, 0, 0, 0);
#if GATED
    const uint4 up = at < vectors ? load_once((const uint4*)(x + blockIdx.x * stride + inputs) + at) : make_uint4(0, 0, 0, 0);
    values[v] = make_uint4(gate(values[v].x, up.x), gate(values[v].y, up.y), gate(values[v].z, up.z), gate(values[v].w, up.w));
#endif
  }
  // Of numbers without their signs the larger has the larger bits.
  u32 most = 0;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const u32 pairs[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
#pragma unroll
    for (int j = 0; j < 4; j++) most = larger_halves(most, pairs[j] & 0x7FFF7FFFu);
  }
  most = max(most & 0xFFFFu, most >> 16);
  most = __reduce_max_sync(~0u, most);
  if (thread % 32 == 0) most_of_warp[thread / 32] = most;
  __syncthreads();
  most = __reduce_max_sync(~0u, thread % 32 < THREADS / 32 ? most_of_warp[thread % 32] : 0);

  const float scale = fmaxf(__fdiv_rn(to_float((T)most), MOST), 1e-5f), reciprocal = __fdiv_rn(1.f, scale);
  if (thread == 0) scales[blockIdx.x] = scale;
  uint2* written = (uint2*)((unsigned char*)codes + (size_t)blockIdx.x * pitch);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const u32 at = v * THREADS + thread;
    const uint2 both = make_uint2(four_codes(values[v].x, values[v].y, scale, reciprocal), four_codes(values[v].z, values[v].w, scale, reciprocal));
    if (at < vectors) written[at] = both;
  }
}
