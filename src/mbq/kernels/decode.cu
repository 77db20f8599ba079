// The products of a packed weight with few rows of x, and the packed weight as a dense matrix.
//
//   y[m, n] = bias[n] + sum over k of x[m, k] * scale[n, group of k] * (code[n, k] - zero[n, group of k])
//
// Compiled at run time with
//   BITS     2, 3, 4 or 8: bits a code
//   GROUP    32, 64 or 128 inputs share a scale and a zero; 0: all of a row do
//   BF16     1: x, scale, bias and y are bfloat16; 0: float16
//   COLUMNS  8 or 16: the most rows of x (the columns of the mma)
//   WARPS    warps a block
//   DEPTH    units a warp has in flight
//   EXACT    1: inputs are a multiple of 128
//   SPLIT    1, 2 or 4: blocks that share a tile's inputs; more than 1 from sm_90 on
//
// Decode reads every weight once, so time is bytes over bandwidth, unless the instructions that turn codes into floats
// take longer. Three things keep those few:
//
// - A warp's work is a *unit*, 32 rows x 128 inputs. Its codes lie in memory in the order in which the tensor core wants
//   them: lane 4g + t owns rows g, g + 8, g + 16, g + 24 and, of each 32 inputs, 8t .. 8t + 7. A lane loads BITS times 16
//   bytes that only it needs, no shared memory, no shuffle. (mbq/kernels/cuda.py packs and draws the words.)
// - A pair of codes becomes a pair of floats in one instruction, mask and merge: the code lands in the mantissa at bit j,
//   under the exponent for which bit j counts 1. The float is 2^(MANTISSA - j) + code. Half of the time no shift is needed.
// - Nobody subtracts that offset, or the zero, from every weight. For a group
//       sum x (code - zero) = sum x (offset + code) - (sum x offset + zero * sum x)
//   and the last two sums are products of x with a column of offsets and a column of ones, a quarter as many mmas again.
//
// Columns of the mma that hold no row of x repeat the last one; what they give is not stored.
//
// A block owns consecutive tiles of 32 rows, its warps equal runs of the tiles' units, which are consecutive in memory.
// A run meets two tiles at most; partial sums meet in shared memory once, at the end, and are added in a fixed order.
// A block reads all of x, which with many rows is more than its weights. So SPLIT blocks, a thread block cluster, own the
// same tiles, and each takes its part of every tile's units and of x. At the end they read each other's partial sums.
// The weights of the first units are loaded before the previous kernel's end is waited for (programmatic dependent launch).
// Integer divisions, tens of instructions each in front of the first load, are the host's.

#include "codes.cuh"

#define NT (COLUMNS / 8)
#define STEPS (8 / SETS)  // mma steps of 16 inputs a set

// ---- instructions ----------------------------------------------------------------------------------------------------
#ifndef EMULATED  // tests/emulation.h has these for a CPU
// c [16 x 8] += a [16 x 16] b [16 x 8]; lane 4g + t holds of c rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

__device__ __forceinline__ float from_lane(float value, u32 lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

extern __shared__ float partial[];  // linear's sums: [warp, odd or even tile, row of x, row of the tile]

// That of a block of the cluster. All have to have started, and none may end before the others have read.
__device__ __forceinline__ const float* partial_of(u32 rank) {
#if SPLIT > 1
  const float* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((const float*)partial), "r"(rank));
  return there;
#else
  return partial;
#endif
}

// Until the partial sums of all blocks of the cluster are there.
__device__ __forceinline__ void wait_for_partial_sums() {
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Until no block of the cluster reads any more.
__device__ __forceinline__ void wait_for_readers() {
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#endif

// ---- products ----------------------------------------------------------------------------------------------------------
// Steps s and s + 1 of a unit, two pairs of inputs each. b[n] are a lane's 32 inputs of one row of x, as 16 pairs.
//   acc   sum x * (offset + code)
//   sum   c0 + c2: sum x, c1 + c3: sum x * offset, of row g of x. These are products too, of x as it lies in registers with a
//         column of ones and a column of offsets; "odd": the lane holds the latter
template <int s, int end>
__device__ __forceinline__ void steps(float (&acc)[2][NT][4], float (&sum)[NT][4], const u32 (&w)[4][BITS], const u32 (&b)[NT][16], bool odd) {
  if constexpr (s % 2 == 0) {
    const u32 low = odd ? BOTH(EXPONENT(bit_of(2 * s))) : ONE, high = odd ? BOTH(EXPONENT(bit_of(2 * s + 2))) : ONE;
#pragma unroll
    for (int n = 0; n < NT; n++) mma(sum[n], b[n][2 * s], b[n][2 * s + 1], b[n][2 * s + 2], b[n][2 * s + 3], low, high);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u32 a0 = pair<2 * s>(w[2 * half]), a1 = pair<2 * s>(w[2 * half + 1]);
    const u32 a2 = pair<2 * s + 1>(w[2 * half]), a3 = pair<2 * s + 1>(w[2 * half + 1]);
#pragma unroll
    for (int n = 0; n < NT; n++) mma(acc[half][n], a0, a1, a2, a3, b[n][2 * s], b[n][2 * s + 1]);
  }
  if constexpr (s + 1 < end) steps<s + 1, end>(acc, sum, w, b, odd);
}

// ---- a unit ----------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void set_of(float (&scale)[4], float (&zero)[4], uint4 set) {
  const u32 pairs[4] = {set.x, set.y, set.z, set.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    scale[i] = to_float((T)pairs[i]);
    zero[i] = to_float((T)(pairs[i] >> 16));
  }
}

// y += the unit's products with b
template <int set> __device__ __forceinline__ void multiply(float (&y)[2][NT][4], const u32 (&w)[4][BITS], const Unit& unit, const u32 (&b)[NT][16], u32 g, u32 t) {
  float sum[NT][4] = {}, acc[2][NT][4] = {}, scale[4], zero[4];
  steps<set * STEPS, set * STEPS + STEPS>(acc, sum, w, b, g & 1);
  set_of(scale, zero, unit.sets[set]);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float own_all = sum[n][0] + sum[n][2], own_weighted = sum[n][1] + sum[n][3];
#pragma unroll
    for (int e = 0; e < 2; e++) {  // column 2t + e, which is another lane's g
      const float all = from_lane(own_all, 8 * t + 4 * e), weighted = from_lane(own_weighted, 8 * t + 4 * e);
#pragma unroll
      for (int i = 0; i < 4; i++) {  // rows g + 8i
        float& total = y[i / 2][n][i % 2 * 2 + e];
        total = fmaf(scale[i], acc[i / 2][n][i % 2 * 2 + e] - fmaf(zero[i], all, weighted), total);
      }
    }
  }
  if constexpr (set + 1 < SETS) multiply<set + 1>(y, w, unit, b, g, t);
}

// How the work is divided; the host knows (mbq/kernels/cuda.py).
struct Plan {
  u32 units;              // of 128 inputs, rounded up: of a tile; a multiple of SPLIT
  u32 tiles, more;        // of 32 outputs: of a cluster of SPLIT blocks; the first "more" clusters have one more
  u32 inverse;            // n / (units / SPLIT) is the high word of n * inverse, unless the divisor is 1
  u32 log_rows;           // 2^log_rows is rows, rounded up
};

// x [rows, inputs], y [rows, outputs]. x is no __restrict__: the previous kernel may still write it when this one starts.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
linear(const T* x, Weight weight, const T* __restrict__ bias, T* __restrict__ y, u32 rows, u32 outputs, u32 inputs, Plan plan) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 cluster = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
  const u32 first_tile = plan.tiles * cluster + min(cluster, plan.more), own_tiles = plan.tiles + (cluster < plan.more);
  const u32 units = plan.units / SPLIT, others = plan.units - units;  // of a tile, this block's and the others'
  const u32 work = own_tiles * units, begin = work * warp / WARPS, end = work * (warp + 1) / WARPS;
  u32 tile = units == 1 ? begin : __umulhi(begin, plan.inverse), k = begin - tile * units;

  Unit queue[DEPTH];
  Cursor cursor(weight, (size_t)first_tile * plan.units + tile * others + rank * units + begin, first_tile + tile, lane);
  const u32 tile_end = (tile + 1) * units;  // with a scale a row, the next tile's follow from there on
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    if (SPLIT > 1 && begin + d == tile_end) cursor.advance(others);
    if (begin + d < end) cursor.load(queue[d], d, begin + d >= tile_end);
  }
  cursor.advance(DEPTH);
  wait_for_previous_kernel();

  const T* own_x[NT];  // a lane's inputs of the rows that are its columns
#pragma unroll
  for (int n = 0; n < NT; n++) own_x[n] = x + (size_t)min(n * 8 + g, rows - 1) * inputs + rank * units * UNIT + 8 * t;
  const u32 own_inputs = inputs - rank * units * UNIT;  // and those of later blocks
  float sum[2][NT][4] = {};
  auto put_down = [&]() {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const u32 column = n * 8 + 2 * t + (e & 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (column < rows) partial[((warp * 2 + (tile & 1)) * rows + column) * TILE + half * 16 + (e >> 1) * 8 + g] = sum[half][n][e];
          sum[half][n][e] = 0.f;
        }
      }
  };
#pragma unroll 1
  for (u32 first = begin; first < end; first += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const u32 unit = first + d;
      if (unit >= end) break;
      u32 b[NT][16], w[4][BITS];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (EXACT || k * UNIT + 32 * c + 8 * t < own_inputs) v = *(const uint4*)(own_x[n] + k * UNIT + 32 * c);
          b[n][4 * c] = v.x;
          b[n][4 * c + 1] = v.y;
          b[n][4 * c + 2] = v.z;
          b[n][4 * c + 3] = v.w;
        }
      words_of(w, queue[d]);
      multiply<0>(sum, w, queue[d], b, g, t);
      if (SPLIT > 1 && k + DEPTH == units) cursor.advance(others);
      if (unit + DEPTH < end) cursor.load(queue[d], d, unit + DEPTH >= tile_end);
      if (++k == units) {
        put_down();
        k = 0;
        tile++;
      }
    }
    cursor.advance(DEPTH);
  }
  if (k && begin < end) put_down();
  wait_for_partial_sums();

  // A warp adds up the parts of a tile and a row of x, those of the warps whose runs met the tile, the same in all blocks.
  for (u32 i = rank * WARPS + warp; i < own_tiles << plan.log_rows; i += SPLIT * WARPS) {
    const u32 m = i & ((1u << plan.log_rows) - 1), from = (i >> plan.log_rows) * units, output = (first_tile + (i >> plan.log_rows)) * TILE + lane;
    if (m >= rows) continue;
    float total = bias && output < outputs ? to_float(bias[output]) : 0.f;
#pragma unroll
    for (u32 other = 0; other < WARPS; other++) {
      const u32 its_begin = work * other / WARPS, its_end = work * (other + 1) / WARPS;
      if (its_begin < its_end && its_begin < from + units && its_end > from) {
#pragma unroll
        for (u32 block = 0; block < SPLIT; block++) total += partial_of(block)[((other * 2 + ((i >> plan.log_rows) & 1)) * rows + m) * TILE + lane];
      }
    }
    if (output < outputs) y[(size_t)m * outputs + output] = from_float(total);
  }
  wait_for_readers();
}

// The dense weight [outputs, inputs]: scale * (code - zero), rounded once. A warp writes a unit.
template <int c> __device__ __forceinline__ void write(T* y, u32 left, const u32 (&w)[BITS], const u32 (&sets)[SETS]) {
  u32 out[4];
  const u32 set = sets[c * SETS / 4], scale = BOTH(set & 0xFFFFu), minus_zero = BOTH(set >> 16) ^ BOTH(0x8000u);
  unpack<c, 0>(out, w, scale, minus_zero);
  if (EXACT || 32 * c < left) *(uint4*)(y + 32 * c) = make_uint4(out[0], out[1], out[2], out[3]);
  if constexpr (c < 3) write<c + 1>(y, left, w, sets);
}

extern "C" __global__ void __launch_bounds__(256)
dense(Weight weight, T* __restrict__ y, u32 outputs, u32 inputs, u32 tiles, u32 units) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 at = blockIdx.x * 8 + (threadIdx.x >> 5), tile = at / units;
  const u32 first = (at - tile * units) * UNIT + 8 * t;
  if (tile >= tiles) return;
  Unit unit;
  Cursor(weight, at, tile, lane).load(unit, 0, false);
  u32 w[4][BITS];
  words_of(w, unit);
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 output = tile * TILE + 8 * i + g;
    u32 sets[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) sets[s] = i == 0 ? unit.sets[s].x : i == 1 ? unit.sets[s].y : i == 2 ? unit.sets[s].z : unit.sets[s].w;
    if (output < outputs && first < inputs) write<0>(y + (size_t)output * inputs + first, inputs - first, w[i], sets);
  }
}
