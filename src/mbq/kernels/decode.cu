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
//   STAGES   units a warp has room for in shared memory
//   EXACT    1: inputs are a multiple of 128
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
//   and the two sums on the right are one more mma, whose rows 0-7 are ones and rows 8-15 the offsets.
//
// What is left is latency, so:
//
// - A warp copies what it will need, STAGES - 1 units ahead, to shared memory that only it reads: no registers wait, no
//   barrier, and as many warps fit as registers allow. The first copies are under way before the previous kernel's end is
//   waited for (programmatic dependent launch).
// - Columns of the mma that hold no row of x repeat the last one; what they give is not stored.
//
// A block owns consecutive tiles of 32 rows, its warps equal runs of the tiles' units, which are consecutive in memory.
// A run meets two tiles at most; partial sums meet in shared memory once, at the end, and are added in a fixed order.

typedef unsigned int u32;
typedef unsigned short T;  // the bits of a float16 or bfloat16

#define TILE 32
#define UNIT 128
#define NT (COLUMNS / 8)
#if GROUP == 0
#define SETS 1  // sets of scales a unit; with one scale a row every unit uses the same
#else
#define SETS (UNIT / GROUP)
#endif
#define STEPS (8 / SETS)  // mma steps of 16 inputs a set

#if BF16
#define MANTISSA 7
#define EXPONENT(j) ((134u - (j)) << 7)  // 2^(7 - j)
#define ONE 0x3F803F80u
#define TYPE "bf16"
#else
#define MANTISSA 10
#define EXPONENT(j) ((25u - (j)) << 10)  // 2^(10 - j)
#define ONE 0x3C003C00u
#define TYPE "f16"
#endif
#define BOTH(x) ((x) | (x) << 16)

// ---- instructions ----------------------------------------------------------------------------------------------------
#ifndef EMULATED  // tests/emulation.h has these for a CPU
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ float to_float(T bits) {
#if BF16
  return __uint_as_float((u32)bits << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ __forceinline__ T from_float(float value) {
  T bits;
  asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

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

// 16 bytes to shared memory; a group of such copies ends with commit().
__device__ __forceinline__ void copy(uint4* to, const uint4* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
  *to = *from;
#endif
}

__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last ``pending`` groups have arrived.
template <int pending> __device__ __forceinline__ void arrived() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

__device__ __forceinline__ float exchanged(float value, u32 apart) { return __shfl_xor_sync(0xFFFFFFFFu, value, apart); }

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

// How many lanes add up one output, when a block has ``columns`` times 32 of them: a power of two.
__device__ __forceinline__ u32 parts(u32 columns) { return columns >= WARPS ? 1 : columns * 8 >= WARPS ? 4 : 16; }

// ---- where a pair of codes lies --------------------------------------------------------------------------------------
// Each half of a 32-bit word holds PER_WORD codes, lowest bits first, the even input's in the low half. IN_PLACE of them
// lie in the mantissa as the word stands; a shift brings the next IN_PLACE there. With 3 bits the 16th pair's three bits
// are the top bits of the halves of the row's three words.
constexpr int PER_WORD = 16 / BITS;
constexpr int IN_PLACE = (MANTISSA - BITS) / BITS + 1;
__device__ constexpr bool split(int q) { return BITS == 3 && q == 15; }
__device__ constexpr int word_of(int q) { return q / PER_WORD; }
__device__ constexpr int shift_of(int q) { return q % PER_WORD / IN_PLACE * IN_PLACE * BITS; }
__device__ constexpr int bit_of(int q) { return split(q) ? 0 : q % PER_WORD % IN_PLACE * BITS; }

// Pair q of a lane's 16 in one row, as offset + code.
template <int q> __device__ __forceinline__ u32 pair(const u32 (&w)[BITS]) {
  constexpr u32 offset = BOTH(EXPONENT(bit_of(q)));
#if BITS == 3
  if constexpr (split(q)) return and_or(w[2] >> 13, 0x00040004u, and_or(w[1] >> 14, 0x00020002u, and_or(w[0] >> 15, 0x00010001u, offset)));
#endif
  if constexpr (!split(q)) return and_or(w[word_of(q)] >> shift_of(q), BOTH(((1u << BITS) - 1) << bit_of(q)), offset);
}

// ---- products ----------------------------------------------------------------------------------------------------------
// Mma steps s .. end - 1 of a unit. b[n] are a lane's 32 inputs of one row of x, as 16 pairs.
//   acc   sum x * (offset + code)
//   sum   c0, c1: sum x of columns 2t, 2t + 1; c2, c3: sum x * offset
template <int s, int end> struct Steps {
  static __device__ __forceinline__ void products(float (&acc)[2][NT][4], float (&sum)[NT][4], const u32 (&w)[4][BITS], const u32 (&b)[NT][16]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
      mma(sum[n], ONE, BOTH(EXPONENT(bit_of(2 * s))), ONE, BOTH(EXPONENT(bit_of(2 * s + 1))), b[n][2 * s], b[n][2 * s + 1]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 a0 = pair<2 * s>(w[2 * half]), a1 = pair<2 * s>(w[2 * half + 1]);
      const u32 a2 = pair<2 * s + 1>(w[2 * half]), a3 = pair<2 * s + 1>(w[2 * half + 1]);
#pragma unroll
      for (int n = 0; n < NT; n++) mma(acc[half][n], a0, a1, a2, a3, b[n][2 * s], b[n][2 * s + 1]);
    }
    if constexpr (s + 1 < end) Steps<s + 1, end>::products(acc, sum, w, b);
  }
};

// ---- a unit ----------------------------------------------------------------------------------------------------------
struct Weight {
  const uint4* words;  // [tile, unit, BITS, lane]: word j of a lane's four rows
  const uint4* sets;   // [tile, unit, set, g]: scale (low half) and zero of rows g, g + 8, g + 16, g + 24; [tile, g] where GROUP is 0
};

// A unit in shared memory.
struct Unit {
  uint4 words[BITS][32];
  uint4 sets[SETS][8];
};

__device__ __forceinline__ void words_of(u32 (&w)[4][BITS], const uint4* words) {
#pragma unroll
  for (int j = 0; j < BITS; j++) {
    const uint4 v = words[j * 32];
    w[0][j] = v.x;
    w[1][j] = v.y;
    w[2][j] = v.z;
    w[3][j] = v.w;
  }
}

__device__ __forceinline__ void set_of(float (&scale)[4], float (&zero)[4], uint4 set) {
  const u32 pairs[4] = {set.x, set.y, set.z, set.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    scale[i] = to_float((T)pairs[i]);
    zero[i] = to_float((T)(pairs[i] >> 16));
  }
}

// y += the unit's products with b
template <int set> __device__ __forceinline__ void multiply(float (&y)[2][NT][4], const u32 (&w)[4][BITS], const Unit& unit, int g, const u32 (&b)[NT][16]) {
  float sum[NT][4] = {}, acc[2][NT][4] = {}, scale[4], zero[4];
  Steps<set * STEPS, set * STEPS + STEPS>::products(acc, sum, w, b);
  set_of(scale, zero, unit.sets[set][g]);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = 2 * half + (e >> 1);
        const float bracket = fmaf(zero[row], sum[n][e & 1], sum[n][2 + (e & 1)]);
        y[half][n][e] = fmaf(scale[row], acc[half][n][e] - bracket, y[half][n][e]);
      }
  if constexpr (set + 1 < SETS) multiply<set + 1>(y, w, unit, g, b);
}

// x [rows, inputs], y [rows, outputs]; tiles of 32 outputs, units of 128 inputs, both rounded up.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
linear(const T* __restrict__ x, Weight weight, const T* __restrict__ bias, T* __restrict__ y, u32 rows, u32 outputs, u32 inputs, u32 tiles, u32 units) {
  extern __shared__ uint4 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 first_tile = tiles * blockIdx.x / gridDim.x, own_tiles = tiles * (blockIdx.x + 1) / gridDim.x - first_tile;
  const u32 work = own_tiles * units, begin = work * warp / WARPS, end = work * (warp + 1) / WARPS;
  Unit* const ring = (Unit*)shared + warp * STAGES;
  float* const partial = (float*)((Unit*)shared + WARPS * STAGES);  // [warp, first or second tile, row of x] of TILE, and 2 more a warp
  const u32 stride = 2 * rows * TILE + 2;

  // The copies run ahead of the products: what is copied next, of which unit of its tile, to which place.
  const uint4* words = weight.words + (size_t)(first_tile * units + begin) * (BITS * 32) + lane;
  const u32 first_k = begin % units;
  const uint4* sets = weight.sets + (GROUP ? (size_t)(first_tile * units + begin) * (SETS * 8) : (size_t)(first_tile + begin / units) * 8) + lane;
  u32 next = begin, next_k = first_k, next_place = 0;
  auto copy_next = [&]() {
    if (next < end) {
#pragma unroll
      for (int j = 0; j < BITS; j++) copy(&ring[next_place].words[j][lane], words + j * 32);
      if (lane < SETS * 8) copy(&ring[next_place].sets[0][lane], sets);
      words += BITS * 32;
      if (GROUP) sets += SETS * 8;
      else if (++next_k == units) next_k = 0, sets += 8;
      next++;
      next_place = next_place + 1 == STAGES ? 0 : next_place + 1;
    }
    commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy_next();
  wait_for_previous_kernel();

  const T* own_x[NT];  // a lane's inputs of the rows that are its columns
#pragma unroll
  for (int n = 0; n < NT; n++) own_x[n] = x + (size_t)min(n * 8 + g, rows - 1) * inputs + 8 * t;
  float sum[2][NT][4] = {};
  u32 k = first_k, slot = 0, place = 0;
  auto put_down = [&]() {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const u32 column = n * 8 + 2 * t + (e & 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (column < rows) partial[warp * stride + (slot * rows + column) * TILE + half * 16 + (e >> 1) * 8 + g] = sum[half][n][e];
          sum[half][n][e] = 0.f;
        }
      }
  };
#pragma unroll 1
  for (u32 unit = begin; unit < end; unit++) {
    u32 b[NT][16], w[4][BITS];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (EXACT || k * UNIT + 32 * c + 8 * t < inputs) v = *(const uint4*)(own_x[n] + k * UNIT + 32 * c);
        b[n][4 * c] = v.x;
        b[n][4 * c + 1] = v.y;
        b[n][4 * c + 2] = v.z;
        b[n][4 * c + 3] = v.w;
      }
    arrived<STAGES - 2>();
    __syncwarp();  // lanes read each other's sets, and have read the place that is filled next
    words_of(w, &ring[place].words[0][lane]);
    copy_next();
    multiply<0>(sum, w, ring[place], g, b);
    place = place + 1 == STAGES ? 0 : place + 1;
    if (++k == units) {
      put_down();
      k = 0;
      slot = 1;
    }
  }
  if (k) put_down();
  __syncthreads();

  // Neighbouring lanes add up the warps' parts of one output.
  const u32 lanes = parts(own_tiles * rows), part = lane % lanes;
  for (u32 i = threadIdx.x / lanes; i < own_tiles * TILE * rows; i += WARPS * 32 / lanes) {
    const u32 row = i % TILE, tile = i / TILE % own_tiles, m = i / TILE / own_tiles, output = (first_tile + tile) * TILE + row;
    float total = 0.f;
    for (u32 other = part; other < WARPS; other += lanes) {
      const u32 from = work * other / WARPS, to = work * (other + 1) / WARPS;
      if (from < to && from < (tile + 1) * units && to > tile * units) total += partial[other * stride + ((from < tile * units) * rows + m) * TILE + row];
    }
    for (u32 apart = 1; apart < lanes; apart *= 2) total += exchanged(total, apart);
    if (part == 0 && output < outputs) y[(size_t)m * outputs + output] = from_float(total + (bias ? to_float(bias[output]) : 0.f));
  }
}

// The dense weight [outputs, inputs]: scale * (code - zero), rounded once. A warp writes a unit.
template <int q> __device__ __forceinline__ void unpack(float (&code)[32], const u32 (&w)[BITS]) {
  const u32 both = pair<q>(w);
  constexpr float offset = (float)(1 << (MANTISSA - bit_of(q)));
  code[2 * q] = to_float((T)both) - offset;
  code[2 * q + 1] = to_float((T)(both >> 16)) - offset;
  if constexpr (q < 15) unpack<q + 1>(code, w);
}

extern "C" __global__ void __launch_bounds__(256)
dense(Weight weight, T* __restrict__ y, u32 outputs, u32 inputs, u32 tiles, u32 units) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 at = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (at >= tiles * units) return;
  u32 w[4][BITS];
  words_of(w, weight.words + (size_t)at * (BITS * 32) + lane);
  float scale[SETS][4], zero[SETS][4];
#pragma unroll
  for (int s = 0; s < SETS; s++) set_of(scale[s], zero[s], weight.sets[(GROUP ? (size_t)at * SETS + s : at / units) * 8 + g]);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 output = at / units * TILE + 8 * i + g;
    float code[32];
    unpack<0>(code, w[i]);
    if (output >= outputs) continue;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const u32 input = at % units * UNIT + 32 * c + 8 * t;
      const int set = c * SETS / 4;
      if (input >= inputs) continue;
      u32 out[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float low = scale[set][i] * (code[8 * c + 2 * p] - zero[set][i]), high = scale[set][i] * (code[8 * c + 2 * p + 1] - zero[set][i]);
        out[p] = (u32)from_float(low) | (u32)from_float(high) << 16;
      }
      *(uint4*)(y + (size_t)output * inputs + input) = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
}
