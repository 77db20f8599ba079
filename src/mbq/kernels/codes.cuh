// The packed weight as decode.cu and prompt.cu read it: types, where a pair of codes lies, what a lane loads of a unit.
// Macros: BITS, GROUP and BF16, as in decode.cu.

typedef unsigned int u32;
typedef unsigned short T;  // the bits of a float16 or bfloat16

#define TILE 32
#define UNIT 128
#if GROUP == 0
#define SETS 1  // sets of scales a unit; with one scale a row every unit uses the same
#else
#define SETS (UNIT / GROUP)
#endif

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

// a * b + c of both halves
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
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
// lie in the mantissa as the word stands; a shift brings the next IN_PLACE there. With 3 bits a 16th slot is the top bits of
// the halves of the row's three words. Pair q lies in the q-th slot by the bit where it is read: so that the two pairs of
// an mma step have one offset.
constexpr int PER_WORD = 16 / BITS;
constexpr int IN_PLACE = (MANTISSA - BITS) / BITS + 1;
__device__ constexpr bool split(int slot) { return BITS == 3 && slot == 15; }
__device__ constexpr int bit_of_slot(int slot) { return split(slot) ? (BF16 ? 0 : 6) : slot % PER_WORD % IN_PLACE * BITS; }
__device__ constexpr int slot_of(int q) {
  for (int bit = 0; bit < MANTISSA; bit++)
    for (int slot = 0; slot < 16; slot++)
      if (bit_of_slot(slot) == bit && q-- == 0) return slot;
  return -1;
}
__device__ constexpr int bit_of(int q) { return bit_of_slot(slot_of(q)); }

// Pair q of a lane's 16 in one row, as offset + code.
template <int q> __device__ __forceinline__ u32 pair(const u32 (&w)[BITS]) {
  constexpr int slot = slot_of(q), bit = bit_of(q), shift = slot % PER_WORD / IN_PLACE * IN_PLACE * BITS;
  constexpr u32 offset = BOTH(EXPONENT(bit));
#if BITS == 3
  if constexpr (split(slot))
    return and_or(w[2] >> (13 - bit), BOTH(4u << bit), and_or(w[1] >> (14 - bit), BOTH(2u << bit), and_or(w[0] >> (15 - bit), BOTH(1u << bit), offset)));
#endif
  if constexpr (!split(slot)) return and_or(w[slot / PER_WORD] >> shift, BOTH(((1u << BITS) - 1) << bit), offset);
}

// ---- a unit ----------------------------------------------------------------------------------------------------------
struct Weight {
  const uint4* words;  // [tile, unit, BITS, lane]: word j of a lane's four rows
  const uint4* sets;   // [tile, unit, set, g]: scale (low half) and zero of rows g, g + 8, g + 16, g + 24; [tile, g] where GROUP is 0
};

// What a lane loads of a unit.
struct Unit {
  uint4 words[BITS];
  uint4 sets[SETS];
};

// Where a lane reads. Units are consecutive, so that what is some units ahead is at a constant offset. Where blocks share
// tiles, other blocks' units lie between a tile's and the next tile's; the cursor skips them, once, on its way.
struct Cursor {
  const uint4* words;
  const uint4* sets;

  // at "unit" of all units, which is of tile "tile"
  __device__ __forceinline__ Cursor(const Weight& weight, size_t unit, size_t tile, u32 lane)
      : words(weight.words + unit * (BITS * 32) + lane), sets(weight.sets + (GROUP ? unit * SETS : tile) * 8 + (lane >> 2)) {}

  __device__ __forceinline__ void load(Unit& into, int ahead, bool next_tile) const {
#pragma unroll
    for (int j = 0; j < BITS; j++) into.words[j] = load_once(words + (ahead * BITS + j) * 32);
#pragma unroll
    for (int s = 0; s < SETS; s++) into.sets[s] = __ldg(sets + (GROUP ? ahead * SETS + s : next_tile) * 8);
  }

  __device__ __forceinline__ void advance(u32 by) {
    words += by * (BITS * 32);
    if (GROUP) sets += by * (SETS * 8);
  }
};

__device__ __forceinline__ void words_of(u32 (&w)[4][BITS], const Unit& unit) {
#pragma unroll
  for (int j = 0; j < BITS; j++) {
    w[0][j] = unit.words[j].x;
    w[1][j] = unit.words[j].y;
    w[2][j] = unit.words[j].z;
    w[3][j] = unit.words[j].w;
  }
}

// Pairs 4c + p of a row: offset + code less (offset + zero) is exact.
template <int c, int p> __device__ __forceinline__ void unpack(u32 (&out)[4], const u32 (&w)[BITS], u32 scale, u32 minus_zero) {
  constexpr int q = 4 * c + p;
  const u32 minus_both = multiply_add(ONE, minus_zero, BOTH(EXPONENT(bit_of(q)) | 0x8000u));
  out[p] = multiply_add(multiply_add(ONE, pair<q>(w), minus_both), scale, BOTH(0x8000u));
  if constexpr (p < 3) unpack<c, p + 1>(out, w, scale, minus_zero);
}
