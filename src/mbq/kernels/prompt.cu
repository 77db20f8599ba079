// The products of a packed weight with many rows of x, for Hopper's tensor cores (sm_90a):
//
//   y[m, n] = bias[n] + sum over k of x[m, k] * scale[n, group of k] * (code[n, k] - zero[n, group of k])
//
// with the weight rounded once, to x's type, as the dense weight of decode.cu is. That weight never lies in memory.
//
// Compiled at run time with
//   BITS, GROUP, BF16  as in codes.cuh
//   ROWS     rows of x a tile: a multiple of 32, or 240
//   STAGES   of x in shared memory
//
// A block multiplies tiles of 128 outputs x ROWS rows of x, 64 inputs at a time, a *stage*:
//
// - Two warpgroups have 64 outputs each. Their wgmmas take the weight, the operand of 64 rows (M), from registers, and x,
//   that of ROWS columns (N), from shared memory. A warp unpacks its own 16 outputs, the next stage's while the tensor
//   cores multiply the last.
// - The words are packed for decode.cu: of a run of 32 inputs, a lane holds 8 neighbours of an output. wgmma wants 2 of each
//   8. So the 4 lanes of an output turn their 4 x 4 pairs over, as codes, of 2 outputs and 2 runs at once: 16 bytes a lane
//   through shared memory, where shuffles of 16-bit weights would be 16 with 48 selections.
// - x comes by the copy engine (TMA), which one thread asks for. The two blocks of a cluster have the same rows of x and
//   other outputs, and each fetches half of the rows for both.
// - The result lies across: accumulators hold outputs along rows. stmatrix turns 8 x 8 blocks, and the copy engine writes
//   them out, except what lies beyond y's edges.
//
// Blocks stay (a grid as large as the GPU) and take tile after tile: x of the next tile comes while the last is written.
// The second warpgroup starts a unit later than the first, so that one multiplies while the other writes.

#include "codes.cuh"

#define INPUTS 64
#define WEIGHT_ROW 0
#define BUFFERS 2
#define CHUNK (ROWS % 64 == 0 ? 64 : ROWS % 48 == 0 ? 48 : 32)
typedef float Sum;
#define SUM "f"
#define PRODUCT "k16.f32." TYPE "." TYPE
#define FLAGS ", 1, 1, 0"
#define TURN_BYTES 512  // a warp's, to turn codes over
#define MULTIPLIERS_HAVE 240
#define FETCHERS_HAVE 24
#define OWN_BYTES (4 * WARPGROUPS * TURN_BYTES)

#include "prompt.cuh"

// ---- the weight ------------------------------------------------------------------------------------------------------
// What a lane loads of a unit: two rows of its four.
struct HalfUnit {
  uint2 words[BITS];
  uint2 sets[SETS];
};

// The units of a warp's 16 outputs, tile after tile.
struct Walk {
  const Order& order;
  const u32 units;
  u32 i, k, output_tile;
  __device__ __forceinline__ Walk(const Order& order, u32 units) : order(order), units(units), i(blockIdx.x / BLOCKS), k(0), output_tile(Place(order, i).output_tile) {}

  // Loads where it is and goes on, after the last to the last again. Beyond the last output it is the last tile again, which
  // nobody stores.
  __device__ __forceinline__ void load(HalfUnit& into, const Weight& weight, u32 tiles) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile = min(output_tile * (OUTPUTS / TILE) + warp / 2, tiles - 1);
    const Cursor cursor(weight, (size_t)tile * units + k, tile, lane);
    const uint2 *words = (const uint2*)cursor.words + warp % 2, *sets = (const uint2*)cursor.sets + warp % 2;
#pragma unroll
    for (int j = 0; j < BITS; j++) into.words[j] = __ldg(words + j * 64);
#pragma unroll
    for (int s = 0; s < SETS; s++) into.sets[s] = __ldg(sets + s * 16);
    if (k + 1 < units) {
      k++;
    } else if (i + gridDim.x / BLOCKS < order.total) {
      k = 0;
      i += gridDim.x / BLOCKS;
      output_tile = Place(order, i).output_tile;
    }
  }
};

// A pair of codes takes WIDTH bits of both halves of a register while it changes lanes: a lane's two rows, of RUNS runs.
#define WIDTH (BITS == 8 ? 8 : 4)
#define RUNS (8 / WIDTH)
constexpr int READABLE = (MANTISSA - BITS) / WIDTH + 1;  // fields that lie in the mantissa as they stand

// Pair q of a row as field f, beside the fields of "others".
template <int q, int f> __device__ __forceinline__ u32 gather(const u32 (&w)[BITS], u32 others) {
  constexpr int slot = slot_of(q), at = f * WIDTH;
#if BITS == 3
  if constexpr (split(slot))
    return and_or(w[2] >> (13 - at), BOTH(4u << at), and_or(w[1] >> (14 - at), BOTH(2u << at), and_or(w[0] >> (15 - at), BOTH(1u << at), others)));
#endif
  if constexpr (!split(slot)) {
    constexpr int right = slot % PER_WORD * BITS - at, left = right < 0 ? -right : 0;
    const u32 word = w[slot / PER_WORD];
    return and_or(right < 0 ? word << left : word >> (right + left), BOTH(((1u << BITS) - 1) << at), others);
  }
}

// Pairs p of run c, or of runs c and c + 1.
template <int c, int p> __device__ __forceinline__ u32 gather_all(const u32 (&w)[2][BITS]) {
  u32 codes = gather<4 * c + p, 1>(w[1], gather<4 * c + p, 0>(w[0], 0));
  if constexpr (RUNS == 2) codes = gather<4 * c + 4 + p, 3>(w[1], gather<4 * c + 4 + p, 2>(w[0], codes));
  return codes;
}

// scale * (code - zero) of field f, rounded once. "set" is scale (low half) and zero.
template <int f> __device__ __forceinline__ u32 value(u32 codes, u32 set) {
  constexpr int bit = f % READABLE * WIDTH, shift = f / READABLE * READABLE * WIDTH;
  const u32 scale = BOTH(set & 0xFFFFu), minus_zero = BOTH(set >> 16) ^ BOTH(0x8000u);
  const u32 minus_both = multiply_add(ONE, minus_zero, BOTH(EXPONENT(bit) | 0x8000u));
  const u32 pair = and_or(codes >> shift, BOTH(((1u << BITS) - 1) << bit), BOTH(EXPONENT(bit)));
  return multiply_add(multiply_add(ONE, pair, minus_both), scale, BOTH(0x8000u));
}

// Four lanes' v[0 .. 3] turned over: lane t's v[s] is now what lane s had as v[t]. "area" is the warp's, of TURN_BYTES.
__device__ __forceinline__ void turn_over(u32 (&v)[4], u32 area) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = lane & 7, chunk = lane >> 3;
  __syncwarp();
  store(area + g * 64 + (t ^ (g >> 1 & 3)) * 16, v);
  __syncwarp();
  load_blocks(v, area + row * 64 + (chunk ^ (row >> 1 & 3)) * 16);
}

template <int f> __device__ __forceinline__ void place(u32 (&steps)[4][4], int run, const u32 (&codes)[4], uint2 set) {
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    u32 (&step)[4] = steps[run * 2 + chunk / 2];
    step[chunk % 2 * 2] = value<f>(codes[chunk], set.x);
    step[chunk % 2 * 2 + 1] = value<f + 1>(codes[chunk], set.y);
  }
}

// A stage's weight, runs c and c + 1 of a unit, as the operands of its four steps of 16 inputs.
template <int c> __device__ __forceinline__ void unpack_stage(u32 (&steps)[4][4], const HalfUnit& unit, u32 area) {
  u32 w[2][BITS];
#pragma unroll
  for (int j = 0; j < BITS; j++) {
    w[0][j] = unit.words[j].x;
    w[1][j] = unit.words[j].y;
  }
  u32 codes[4] = {gather_all<c, 0>(w), gather_all<c, 1>(w), gather_all<c, 2>(w), gather_all<c, 3>(w)};
  turn_over(codes, area);
  place<0>(steps, c % 2, codes, unit.sets[c * SETS / 4]);
  if constexpr (RUNS == 2) place<2>(steps, 1, codes, unit.sets[(c + 1) * SETS / 4]);
  if constexpr (RUNS == 1 && c % 2 == 0) unpack_stage<c + 1>(steps, unit, area);
}

// ---- products --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void multiply_all(const Weight& weight, u32 tiles, const TensorMap* y, const T* bias, u32 outputs, u32 units, const Order& order, u32 start) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = thread & 31, warp = thread >> 5, g = lane >> 2;
  const u32 clusters = gridDim.x / BLOCKS;
  const u32 buffers = start + STAGES * STAGE_BYTES + group * Y_BYTES;
  u32 written = 0, even[4][4], odd[4][4];  // of the last two stages, which wgmma may still read
  const u32 area = start + OWN + (threadIdx.x >> 5) * TURN_BYTES;
  HalfUnit next;
  Walk walk(order, units);
  walk.load(next, weight, tiles);
  Ring ring(start), last(start);
  if (group) wait_for_first_group();
  for (u32 i = blockIdx.x / BLOCKS; i < order.total; i += clusters) {
    Sum d[ROWS / 2];
    for (u32 k = 0; k < units; k++) {
      const HalfUnit unit = next;
      walk.load(next, weight, tiles);
      unpack_stage<0>(even, unit, area);
      wait(ring.full(), ring.parity);
      multiply_stage(d, even, ring, k);
      wait_for_products<1>();
      in_use(odd);
      if (k) release(last, thread);
      last = ring;
      ring.advance();
      unpack_stage<2>(odd, unit, area);
      wait(ring.full(), ring.parity);
      multiply_stage(d, odd, ring, 1);
      wait_for_products<1>();
      in_use(even);
      release(last, thread);
      last = ring;
      ring.advance();
      if (!group && k == 0 && i == blockIdx.x / BLOCKS) let_second_group_start();
    }
    wait_for_products<0>();
    in_use(odd);
    release(last, thread);
#pragma unroll
    for (int e = 0; e < ROWS / 2; e++) asm volatile("" : "+" SUM(d[e])::"memory");

    const Place place(order, i);
    const u32 output = place.output_tile * OUTPUTS + group * 64;
    float offset[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 own = output + warp * 16 + h * 8 + g;
      offset[h] = bias && own < outputs ? to_float(bias[own]) : 0.f;
    }
    write_tile(d, y, output, place.row, buffers, written, [&](u32(&out)[4], const float* v, int) {
#pragma unroll
      for (int e = 0; e < 4; e++) out[e] = both_from_floats(v[2 * e] + offset[e & 1], v[2 * e + 1] + offset[e & 1]);
    });
  }
  if (thread == 0) wait_for_writes<0>();
}

// x [rows, inputs] in boxes of ROWS / 2 rows x 64 inputs, y [rows, outputs] in boxes of CHUNK rows x 64 outputs.
extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
prompt(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, Weight weight, const T* __restrict__ bias, u32 outputs, u32 tiles, u32 units, Order order) {
  run_block(&x, nullptr, 2 * units, order, [&](u32 start) { multiply_all(weight, tiles, &y, bias, outputs, units, order, start); });
}
