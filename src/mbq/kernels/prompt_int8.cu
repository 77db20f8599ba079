// Products of int8 codes of many rows of x with a weight's codes, for Hopper's tensor cores (sm_90a):
//
//   y[m, n] = bias[n] + (sum over k of x[m, k] * code[n, k]) * x_scale[m] * scale[n]
//
// in which the sum is an exact int32 and the rest is rounded as int8_source.py's kernel rounds it: both give the same bits.
//
// Compiled at run time with
//   BITS     4: words hold two codes a byte; 8: one
//   GROUP    0, for codes.cuh, which has the types
//   BF16     y, scale and bias are bfloat16 instead of float16
//   ROWS, STAGES, BUFFERS  as in prompt.cuh
//
// A block multiplies tiles of 128 outputs x ROWS rows of x, 128 inputs at a time. What prompt.cu says of its warpgroups,
// clusters and copy engine is true here. The weight is simpler: it needs no scale before the sums are complete. The copy
// engine brings its words as they lie for Triton's kernel; ldmatrix hands a lane word t of 16 bytes of row g, which is what
// wgmma wants of codes of 8 bits. Of two codes a byte, a shift and an "and" make four of low halves, an "and" those of the
// high ones. Each counts 16 times then, and the scales of x take that back.

#include "codes.cuh"

#define INPUTS 128
#define WEIGHT_ROW (BITS * 16)
#define CHUNK (ROWS % 32 == 0 ? 32 : 48)
typedef int Sum;
#define SUM "r"
#define PRODUCT "k32.s32.s8.s8"
#define FLAGS ""
#define MULTIPLIERS_HAVE 232
#define FETCHERS_HAVE 40
#define LAG 3  // stages that the second warpgroup starts after the first
#define OWN_BYTES (WARPGROUPS * ROWS * 4)  // scales of a tile's rows of x

#include "prompt.cuh"

// ---- the weight ------------------------------------------------------------------------------------------------------
// Of the 16 outputs of a warp, a stage as the operands of its four steps of 32 inputs. "row" is where the row lies that
// ldmatrix asks this lane for, and "turn" the swizzle of its 16-byte chunks.
__device__ __forceinline__ void unpack_stage(u32 (&steps)[4][4], u32 row, u32 turn) {
  const u32 chunk = (threadIdx.x & 31) >> 3;
#pragma unroll
  for (int half = 0; half < 2; half++) {  // rows g, then rows g + 8
    u32 w[4];
    load_blocks(w, row + half * 8 * WEIGHT_ROW + (chunk ^ turn) * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) steps[j / 2][j % 2 * 2 + half] = BITS == 8 ? w[j] : w[j] << 4 & 0xF0F0F0F0u;
    if (BITS == 8) load_blocks(w, row + half * 8 * WEIGHT_ROW + (4 + chunk ^ turn) * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) steps[2 + j / 2][j % 2 * 2 + half] = BITS == 8 ? w[j] : w[j] & 0xF0F0F0F0u;
  }
}

// ---- products --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void store_scale(u32 to, float value) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory"); }

__device__ __forceinline__ float2 load_scales(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}

// One rounding a product, and one for the last and the bias together.
__device__ __forceinline__ float scaled(int sum, float x_scale, float scale, float offset) {
  return __fmaf_rn(__fmul_rn(__int2float_rn(sum), x_scale), scale, offset);
}

__device__ __forceinline__ void multiply_all(const TensorMap* y, const float* x_scale, const T* scale, const T* bias, u32 rows, u32 outputs, u32 stages, const Order& order, u32 start) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = thread & 31, warp = thread >> 5, g = lane >> 2;
  const u32 buffers = start + STAGES * STAGE_BYTES + group * Y_BYTES, scales = start + OWN + group * ROWS * 4;
  const u32 columns = lane % 4 * 8;  // where the scales of a lane's columns lie among those of 8
  const u32 weight_row = X_BYTES + (threadIdx.x / 32 * 16 + lane % 8) * WEIGHT_ROW, turn = BITS == 8 ? lane % 8 : lane % 8 / 2;
  u32 second_starts = group ? ~0u : min(LAG, stages) - 1;  // after this stage
  u32 written = 0, even[4][4], odd[4][4];  // of the last two stages, which wgmma may still read
  wait_for_previous_kernel();  // x's scales are its
  Ring ring(start), last(start);
  if (group) wait_for_first_group();
  for (u32 i = blockIdx.x / BLOCKS; i < order.total; i += gridDim.x / BLOCKS) {
    Sum d[ROWS / 2];
    u32 k = 0;
    while (true) {
      wait(ring.full(), ring.parity);
      unpack_stage(even, ring.x() + weight_row, turn);
      multiply_stage(d, even, ring, k);
      wait_for_products<1>();
      in_use(odd);
      if (k) release(last, thread);
      last = ring;
      ring.advance();
      if (k == second_starts) {
        let_second_group_start();
        second_starts = ~0u;
      }
      if (++k == stages) break;
      wait(ring.full(), ring.parity);
      unpack_stage(odd, ring.x() + weight_row, turn);
      multiply_stage(d, odd, ring, 1);
      wait_for_products<1>();
      in_use(even);
      release(last, thread);
      last = ring;
      ring.advance();
      if (k == second_starts) {
        let_second_group_start();
        second_starts = ~0u;
      }
      if (++k == stages) break;
    }
    const Place place(order, i);
    const u32 output = place.output_tile * OUTPUTS + group * 64;
    float row_scale[(ROWS + 127) / 128], scale_of[2], offset[2];
#pragma unroll
    for (int r = 0; r < (ROWS + 127) / 128; r++) {
      const u32 row = r * 128 + thread;
      row_scale[r] = row < ROWS && place.row + row < rows ? __ldg(x_scale + place.row + row) : 0.f;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 own = output + warp * 16 + h * 8 + g;
      scale_of[h] = own < outputs ? to_float(scale[own]) : 0.f;
      offset[h] = bias && own < outputs ? to_float(bias[own]) : -0.f;  // with -0.f added a number stays what it is
    }
    wait_for_products<0>();
    in_use(even);
    in_use(odd);
    release(last, thread);
#pragma unroll
    for (int e = 0; e < ROWS / 2; e++) asm volatile("" : "+" SUM(d[e])::"memory");
#pragma unroll
    for (int r = 0; r < (ROWS + 127) / 128; r++)
      if (r * 128 + thread < ROWS) store_scale(scales + (r * 128 + thread) * 4, BITS == 8 ? row_scale[r] : row_scale[r] * 0.0625f);

    write_tile(d, y, output, place.row, buffers, written, [&](u32(&out)[4], const Sum* v, int column) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float2 both = load_scales(scales + (column + j * 8) * 4 + columns);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const Sum* sums = v + 4 * j + 2 * h;
          out[2 * j + h] = both_from_floats(scaled(sums[0], both.x, scale_of[h], offset[h]), scaled(sums[1], both.y, scale_of[h], offset[h]));
        }
      }
    });
  }
  if (thread == 0) wait_for_writes<0>();
}

// x [rows, inputs] in boxes of ROWS / 2 rows x 128 inputs, words in boxes of 128 outputs x WEIGHT_ROW bytes, y [rows, outputs]
// in boxes of CHUNK rows x 64 outputs.
extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
prompt_int8(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap words, const __grid_constant__ TensorMap y, const float* x_scale, const T* __restrict__ scale, const T* __restrict__ bias, u32 rows, u32 outputs, u32 stages, Order order) {
  run_block(&x, &words, stages, order, [&](u32 start) { multiply_all(&y, x_scale, scale, bias, rows, outputs, stages, order, start); });
}
