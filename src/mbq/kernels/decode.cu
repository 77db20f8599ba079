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
//   and the two sums on the right are one more mma, whose rows 0-7 are ones and rows 8-15 the offsets. The accumulators
//   start at minus the bracket, so that a group costs eight multiply-adds more for 4,096 weights a warp.
//
// A block owns consecutive tiles of 32 rows, its warps equal runs of the tiles' units, which are consecutive in memory.
// A run meets two tiles at most; partial sums meet in shared memory once, at the end, and are added in a fixed order.
// The weights of the first units are loaded before the previous kernel's end is waited for (programmatic dependent launch).

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

// Byte i under the exponent of 2^23, which is then taken off: two instructions, and neither is a slow conversion.
__device__ __forceinline__ float byte_to_float(u32 bytes, int i) {
  return __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 + i)) - 8388608.0f;
}

__device__ __forceinline__ T from_float(float value) {
  T bits;
  asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// c [16 x 8] += a [16 x 16] b [16 x 8]; lane 4g + t holds of c rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

__device__ __forceinline__ uint4 load_once(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

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
template <int s, int end> struct Steps {
  // c0, c1: sum x of columns 2t, 2t + 1; c2, c3: sum x * offset
  static __device__ __forceinline__ void sums(float (&sum)[NT][4], const u32 (&b)[NT][16]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
      mma(sum[n], ONE, BOTH(EXPONENT(bit_of(2 * s))), ONE, BOTH(EXPONENT(bit_of(2 * s + 1))), b[n][2 * s], b[n][2 * s + 1]);
    if constexpr (s + 1 < end) Steps<s + 1, end>::sums(sum, b);
  }
  static __device__ __forceinline__ void products(float (&acc)[2][NT][4], const u32 (&w)[4][BITS], const u32 (&b)[NT][16]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a0 = pair<2 * s>(w[2 * half]), a1 = pair<2 * s>(w[2 * half + 1]);
      u32 a2 = pair<2 * s + 1>(w[2 * half]), a3 = pair<2 * s + 1>(w[2 * half + 1]);
#pragma unroll
      for (int n = 0; n < NT; n++) mma(acc[half][n], a0, a1, a2, a3, b[n][2 * s], b[n][2 * s + 1]);
    }
    if constexpr (s + 1 < end) Steps<s + 1, end>::products(acc, w, b);
  }
};

// ---- a unit ----------------------------------------------------------------------------------------------------------
// What a lane loads of one: words[j] is word j of its four rows; scales and zeros of these rows, a set a group.
struct Unit {
  uint4 words[BITS];
  uint2 scale[SETS];
  u32 zero[SETS];
};

struct Weight {
  const uint4* words;   // [tile, unit, BITS, lane]
  const uint2* scales;  // [tile, unit, set, g]: the scales of rows g, g + 8, g + 16, g + 24; [tile, g] where GROUP is 0
  const u32* zeros;     // the same, a byte each
};

// Where a lane reads. Units are consecutive, so that what is d units ahead is at a constant offset.
struct Cursor {
  const uint4* words;
  const uint2* scales;
  const u32* zeros;

  __device__ __forceinline__ Cursor(const Weight& weight, long long unit, int units, int lane)
      : words(weight.words + unit * (BITS * 32) + lane),
        scales(weight.scales + (GROUP ? unit * SETS : unit / units) * 8 + (lane >> 2)),
        zeros(weight.zeros + (GROUP ? unit * SETS : unit / units) * 8 + (lane >> 2)) {}

  __device__ __forceinline__ void load(Unit& into, int ahead, bool next_tile = false) const {
#pragma unroll
    for (int j = 0; j < BITS; j++) into.words[j] = load_once(words + (ahead * BITS + j) * 32);
    const int first = GROUP ? ahead * SETS : next_tile;
#pragma unroll
    for (int s = 0; s < SETS; s++) {
      into.scale[s] = __ldg(scales + (first + s) * 8);
      into.zero[s] = __ldg(zeros + (first + s) * 8);
    }
  }

  __device__ __forceinline__ void advance(int by) {
    words += by * (BITS * 32);
    if (GROUP) {
      scales += by * SETS * 8;
      zeros += by * SETS * 8;
    }
  }
};

__device__ __forceinline__ void rows_of(u32 (&w)[4][BITS], const Unit& unit) {
#pragma unroll
  for (int j = 0; j < BITS; j++) {
    w[0][j] = unit.words[j].x;
    w[1][j] = unit.words[j].y;
    w[2][j] = unit.words[j].z;
    w[3][j] = unit.words[j].w;
  }
}

__device__ __forceinline__ void scales_of(float (&scale)[4], float (&zero)[4], const Unit& unit, int set) {
  scale[0] = to_float((T)unit.scale[set].x);
  scale[1] = to_float((T)(unit.scale[set].x >> 16));
  scale[2] = to_float((T)unit.scale[set].y);
  scale[3] = to_float((T)(unit.scale[set].y >> 16));
#pragma unroll
  for (int i = 0; i < 4; i++) zero[i] = byte_to_float(unit.zero[set], i);
}

// y += the unit's products with b
template <int set> __device__ __forceinline__ void multiply(float (&y)[2][NT][4], const u32 (&w)[4][BITS], const Unit& unit, const u32 (&b)[NT][16]) {
  float sum[NT][4] = {}, acc[2][NT][4], scale[4], zero[4];
  Steps<set * STEPS, set * STEPS + STEPS>::sums(sum, b);
  scales_of(scale, zero, unit, set);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[half][n][e] = fmaf(-zero[2 * half + (e >> 1)], sum[n][e & 1], -sum[n][2 + (e & 1)]);
  Steps<set * STEPS, set * STEPS + STEPS>::products(acc, w, b);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) y[half][n][e] = fmaf(scale[2 * half + (e >> 1)], acc[half][n][e], y[half][n][e]);
  if constexpr (set + 1 < SETS) multiply<set + 1>(y, w, unit, b);
}

// x [rows, inputs], y [rows, outputs]; tiles of 32 outputs, units of 128 inputs, both rounded up.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
linear(const T* __restrict__ x, Weight weight, const T* __restrict__ bias, T* __restrict__ y, int rows, int outputs, int inputs, int tiles, int units) {
  extern __shared__ float partial[];  // [warp, first or second tile, COLUMNS, TILE]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_tile = (int)((long long)tiles * blockIdx.x / gridDim.x);
  const int own_tiles = (int)((long long)tiles * (blockIdx.x + 1) / gridDim.x) - first_tile;
  const int work = own_tiles * units, begin = work * warp / WARPS, end = work * (warp + 1) / WARPS;

  Unit queue[DEPTH];
  Cursor cursor(weight, (long long)first_tile * units + begin, units, lane);
  const int tile_end = (begin / units + 1) * units;  // of the run's first tile; with a scale a row, the next one's follow
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (begin + d < end) cursor.load(queue[d], d, begin + d >= tile_end);
  cursor.advance(DEPTH);
  wait_for_previous_kernel();

  const T* own_x[NT];  // a lane's inputs of row g of each eight
#pragma unroll
  for (int n = 0; n < NT; n++) own_x[n] = x + (long long)(n * 8 + g) * inputs + 8 * t;
  float sum[2][NT][4] = {};
  int k = begin % units, slot = 0;
  auto put_down = [&]() {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int column = n * 8 + 2 * t + (e & 1), row = half * 16 + (e >> 1) * 8 + g;
          partial[((warp * 2 + slot) * COLUMNS + column) * TILE + row] = sum[half][n][e];
          sum[half][n][e] = 0.f;
        }
  };
  for (int first = begin; first < end; first += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int unit = first + d;
      if (unit >= end) break;
      u32 b[NT][16], w[4][BITS];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (n * 8 + g < rows && (EXACT || k * UNIT + 32 * c + 8 * t < inputs)) v = *(const uint4*)(own_x[n] + k * UNIT + 32 * c);
          b[n][4 * c] = v.x;
          b[n][4 * c + 1] = v.y;
          b[n][4 * c + 2] = v.z;
          b[n][4 * c + 3] = v.w;
        }
      rows_of(w, queue[d]);
      multiply<0>(sum, w, queue[d], b);
      if (unit + DEPTH < end) cursor.load(queue[d], d, unit + DEPTH >= tile_end);
      if (++k == units) {
        put_down();
        k = 0;
        slot = 1;
      }
    }
    cursor.advance(DEPTH);
  }
  if (k) put_down();
  __syncthreads();

  for (int i = threadIdx.x; i < own_tiles * TILE * rows; i += WARPS * 32) {
    const int row = i % TILE, m = i / TILE % rows, tile = i / TILE / rows, output = (first_tile + tile) * TILE + row;
    if (output >= outputs) continue;
    float total = bias ? to_float(bias[output]) : 0.f;
    for (int other = 0; other < WARPS; other++) {
      const int from = work * other / WARPS, to = work * (other + 1) / WARPS;
      if (from < to && from < (tile + 1) * units && to > tile * units)
        total += partial[((other * 2 + (from < tile * units)) * COLUMNS + m) * TILE + row];
    }
    y[(long long)m * outputs + output] = from_float(total);
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
dense(Weight weight, T* __restrict__ y, int outputs, int inputs, int tiles, int units) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const long long at = (long long)blockIdx.x * 8 + (threadIdx.x >> 5);
  if (at >= (long long)tiles * units) return;
  Unit unit;
  Cursor(weight, at, units, lane).load(unit, 0);
  u32 w[4][BITS];
  rows_of(w, unit);
  float scale[SETS][4], zero[SETS][4];
#pragma unroll
  for (int s = 0; s < SETS; s++) scales_of(scale[s], zero[s], unit, s);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int output = (int)(at / units) * TILE + 8 * i + g;
    float code[32];
    unpack<0>(code, w[i]);
    if (output >= outputs) continue;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int input = (int)(at % units) * UNIT + 32 * c + 8 * t, set = c * SETS / 4;
      if (input >= inputs) continue;
      u32 out[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float low = scale[set][i] * (code[8 * c + 2 * p] - zero[set][i]), high = scale[set][i] * (code[8 * c + 2 * p + 1] - zero[set][i]);
        out[p] = (u32)from_float(low) | (u32)from_float(high) << 16;
      }
      *(uint4*)(y + (long long)output * inputs + input) = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
}
