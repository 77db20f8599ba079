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

#define OUTPUTS 128  // of a tile
#define INPUTS 64    // of a stage
#define BLOCKS 2     // of a cluster
#define WARPGROUPS 2  // that multiply, 64 outputs each
#define STAGE_BYTES (ROWS * INPUTS * 2)
#define CHUNK (ROWS % 64 == 0 ? 64 : ROWS % 48 == 0 ? 48 : 32)  // rows of y that are written at once
#define CHUNK_BYTES (CHUNK * 128)                              // of 64 outputs
#define TURN_BYTES 512  // a warp's, to turn codes over
#define AREAS (STAGES * STAGE_BYTES + 2 * WARPGROUPS * CHUNK_BYTES)
#define BARRIERS (AREAS + 4 * WARPGROUPS * TURN_BYTES)

struct alignas(64) TensorMap { unsigned long long opaque[16]; };

// How tiles are numbered: the row tiles of a band follow each other, then pairs of output tiles, then bands.
struct Order {
  u32 row_tiles, band;  // "band" row tiles share the words of a pair of output tiles while these are in the L2
  u32 pairs, total;     // pairs of output tiles; pairs of tiles
};

// ---- instructions ----------------------------------------------------------------------------------------------------
extern __shared__ __align__(1024) unsigned char memory[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_at(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A box of x into the shared memory of both blocks, at the same place.
__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, u32 input, u32 row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(input), "r"(row), "r"(barrier), "h"((unsigned short)((1 << BLOCKS) - 1))
      : "memory");
}

__device__ __forceinline__ void write_out(const TensorMap* map, u32 output, u32 row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(output), "r"(row), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the last n writes have read what they write.
template <int n> __device__ __forceinline__ void wait_for_writes() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory"); }

// Ordinary stores to shared memory, before the copy engine reads them.
__device__ __forceinline__ void show_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store(u32 to, const u32 (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// Four blocks of 8 rows of 16 bytes; lane 8i + j says where row j of block i lies, and lane 4g + t gets word t of rows g.
__device__ __forceinline__ void load_blocks(u32 (&v)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
}

// Four 8 x 8 blocks, each as wgmma leaves it, turned over: lane 8i + j says where row j of block i goes.
__device__ __forceinline__ void store_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ u32 both_from_floats(float low, float high) {
  u32 d;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void warpgroup_barrier(u32 group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// The second of the two warpgroups waits here for the first one's first unit.
__device__ __forceinline__ void wait_for_first_group() { asm volatile("bar.sync 3, 256;" ::: "memory"); }
__device__ __forceinline__ void let_second_group_start() { asm volatile("bar.arrive 3, 256;" ::: "memory"); }

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where wgmma finds x: rows of 128 bytes, swizzled, groups of 8 rows one after the other.
__device__ __forceinline__ unsigned long long operand(u32 address) {
  return 1ull << 62 | (unsigned long long)(8 * 128 >> 4) << 32 | 1 << 16 | (address & 0x3FFFF) >> 4;
}

#define P8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define P32 P8(0, 1, 2, 3, 4, 5, 6, 7) "," P8(8, 9, 10, 11, 12, 13, 14, 15) "," P8(16, 17, 18, 19, 20, 21, 22, 23) "," P8(24, 25, 26, 27, 28, 29, 30, 31)
#define P48 P32 "," P8(32, 33, 34, 35, 36, 37, 38, 39) "," P8(40, 41, 42, 43, 44, 45, 46, 47)
#define P64 P48 "," P8(48, 49, 50, 51, 52, 53, 54, 55) "," P8(56, 57, 58, 59, 60, 61, 62, 63)
#define P80 P64 "," P8(64, 65, 66, 67, 68, 69, 70, 71) "," P8(72, 73, 74, 75, 76, 77, 78, 79)
#define P96 P80 "," P8(80, 81, 82, 83, 84, 85, 86, 87) "," P8(88, 89, 90, 91, 92, 93, 94, 95)
#define P112 P96 "," P8(96, 97, 98, 99, 100, 101, 102, 103) "," P8(104, 105, 106, 107, 108, 109, 110, 111)
#define P120 P112 "," P8(112, 113, 114, 115, 116, 117, 118, 119)
#define P128 P120 "," P8(120, 121, 122, 123, 124, 125, 126, 127)
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32 D8(0), D8(8), D8(16), D8(24)
#define D48 D32, D8(32), D8(40)
#define D64 D48, D8(48), D8(56)
#define D80 D64, D8(64), D8(72)
#define D96 D80, D8(80), D8(88)
#define D112 D96, D8(96), D8(104)
#define D120 D112, D8(112)
#define D128 D120, D8(120)
#define WGMMA(n, registers, a0, a1, a2, a3, b, c)                                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." TYPE "." TYPE \
               " {" P##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, 0;\n}"                \
               : D##registers : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(keep))

// d [64 x ROWS] = weight [64 x 16] x [16 x ROWS], added to d if "keep". Lane 4g + t of warp m has, of the weight's rows
// 16m + g (w0, w2) and 16m + g + 8 (w1, w3), inputs 2t and 2t + 1 (w0, w1) and 2t + 8 and 2t + 9 (w2, w3); of d's same rows,
// columns 8j + 2t and 8j + 2t + 1, as d[4j], d[4j + 1] and d[4j + 2], d[4j + 3].
__device__ __forceinline__ void multiply(float (&d)[ROWS / 2], const u32 (&w)[4], unsigned long long x, u32 keep) {
#if ROWS == 64
  WGMMA(64, 32, 32, 33, 34, 35, 36, 37);
#elif ROWS == 96
  WGMMA(96, 48, 48, 49, 50, 51, 52, 53);
#elif ROWS == 128
  WGMMA(128, 64, 64, 65, 66, 67, 68, 69);
#elif ROWS == 160
  WGMMA(160, 80, 80, 81, 82, 83, 84, 85);
#elif ROWS == 192
  WGMMA(192, 96, 96, 97, 98, 99, 100, 101);
#elif ROWS == 224
  WGMMA(224, 112, 112, 113, 114, 115, 116, 117);
#elif ROWS == 240
  WGMMA(240, 120, 120, 121, 122, 123, 124, 125);
#else
  WGMMA(256, 128, 128, 129, 130, 131, 132, 133);
#endif
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> __device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory"); }

// ---- the ring of stages ----------------------------------------------------------------------------------------------
// A stage is "full" once x has come, for the multiplying warpgroups, and "empty" once those of both blocks have read it.
struct Ring {
  u32 start, stage, parity;
  __device__ __forceinline__ Ring(u32 start) : start(start), stage(0), parity(0) {}
  __device__ __forceinline__ u32 x() const { return start + stage * STAGE_BYTES; }
  __device__ __forceinline__ u32 full() const { return start + BARRIERS + stage * 16; }
  __device__ __forceinline__ u32 empty() const { return full() + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where the tile "i" of a block lies.
struct Place {
  u32 output_tile, row;
  __device__ __forceinline__ Place(const Order& order, u32 i) {
    const u32 band = i / (order.band * order.pairs), first = band * order.band, within = i - first * order.pairs;
    const u32 rows = min(order.band, order.row_tiles - first), pair = within / rows;
    output_tile = pair * BLOCKS + blockIdx.x % BLOCKS;
    row = (first + within - pair * rows) * ROWS;
  }
};

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

// ---- x ---------------------------------------------------------------------------------------------------------------
// One thread's work: a stage of every tile after the other, this block's half of its rows.
__device__ __forceinline__ void fetch_all(const TensorMap* x, u32 units, const Order& order, u32 start) {
  const u32 rank = blockIdx.x % BLOCKS;
  Ring ring(start);
  for (u32 i = blockIdx.x / BLOCKS; i < order.total; i += gridDim.x / BLOCKS) {
    const u32 row = Place(order, i).row + rank * (ROWS / BLOCKS);
    for (u32 k = 0; k < 2 * units; k++) {
      wait(ring.empty(), ring.parity ^ 1);
      arrive_expecting(ring.full(), STAGE_BYTES);
      fetch(ring.x() + rank * (STAGE_BYTES / BLOCKS), x, k * INPUTS, row, ring.full());
      ring.advance();
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void release(const Ring& ring, u32 thread) {
  if (thread % 32 == 0 && thread / 32 < BLOCKS) arrive_at(ring.empty(), thread / 32);
}

// Until here, so that the compiler leaves the registers to wgmma.
__device__ __forceinline__ void in_use(u32 (&steps)[4][4]) {
#pragma unroll
  for (int step = 0; step < 4; step++) asm volatile("" : "+r"(steps[step][0]), "+r"(steps[step][1]), "+r"(steps[step][2]), "+r"(steps[step][3]));
}

__device__ __forceinline__ void multiply_stage(float (&d)[ROWS / 2], const u32 (&steps)[4][4], const Ring& ring, u32 keep) {
  wait(ring.full(), ring.parity);
  const unsigned long long x = operand(ring.x());
  begin_products();
#pragma unroll
  for (int step = 0; step < 4; step++) multiply(d, steps[step], x + (step * 32 >> 4), keep + step);
  commit_products();
}

__device__ __forceinline__ void multiply_all(const Weight& weight, u32 tiles, const TensorMap* y, const T* bias, u32 outputs, u32 units, const Order& order, u32 start) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = thread & 31, warp = thread >> 5, g = lane >> 2;
  const u32 clusters = gridDim.x / BLOCKS;
  const u32 buffers = start + STAGES * STAGE_BYTES + group * 2 * CHUNK_BYTES;
  // Rows of a turned block are rows of y, 128 bytes of 64 outputs, their 16-byte chunks swizzled.
  const u32 turned_row = (lane >> 4) * 8 + (lane & 7), turned = turned_row * 128 + ((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
  u32 written = 0, even[4][4], odd[4][4];  // of the last two stages, which wgmma may still read
  const u32 area = start + AREAS + (threadIdx.x >> 5) * TURN_BYTES;
  HalfUnit next;
  Walk walk(order, units);
  walk.load(next, weight, tiles);
  Ring ring(start), last(start);
  if (group) wait_for_first_group();
  for (u32 i = blockIdx.x / BLOCKS; i < order.total; i += clusters) {
    float d[ROWS / 2];
    for (u32 k = 0; k < units; k++) {
      const HalfUnit unit = next;
      walk.load(next, weight, tiles);
      unpack_stage<0>(even, unit, area);
      multiply_stage(d, even, ring, k);
      wait_for_products<1>();
      in_use(odd);
      if (k) release(last, thread);
      last = ring;
      ring.advance();
      unpack_stage<2>(odd, unit, area);
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
    for (int e = 0; e < ROWS / 2; e++) asm volatile("" : "+f"(d[e])::"memory");

    const Place place(order, i);
    const u32 output = place.output_tile * OUTPUTS + group * 64;
    float offset[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 own = output + warp * 16 + h * 8 + g;
      offset[h] = bias && own < outputs ? to_float(bias[own]) : 0.f;
    }
#pragma unroll
    for (int c = 0; c < ROWS / CHUNK; c++) {
      const u32 buffer = buffers + (written++ & 1) * CHUNK_BYTES;
      if (thread == 0) wait_for_writes<1>();
      warpgroup_barrier(group);
#pragma unroll
      for (int b = 0; b < CHUNK / 16; b++) {
        const float* v = d + c * (CHUNK / 2) + b * 8;
        u32 out[4];
#pragma unroll
        for (int e = 0; e < 4; e++) out[e] = both_from_floats(v[2 * e] + offset[e & 1], v[2 * e + 1] + offset[e & 1]);
        store_turned(buffer + b * 16 * 128 + turned, out[0], out[1], out[2], out[3]);
      }
      show_to_copy_engine();
      warpgroup_barrier(group);
      if (thread == 0) write_out(y, output, place.row + c * CHUNK, buffer);
    }
  }
  if (thread == 0) wait_for_writes<0>();
}

// Registers are for those that multiply: 240 a thread, 128 of them sums, and 24 for a warpgroup of which one thread works.
// x [rows, inputs] in boxes of ROWS / 2 rows x 64 inputs, y [rows, outputs] in boxes of CHUNK rows x 64 outputs.
extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
prompt(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, Weight weight, const T* __restrict__ bias, u32 outputs, u32 tiles, u32 units, Order order) {
  const u32 start = shared_address(memory);
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < STAGES; stage++) {
      init_barrier(start + BARRIERS + stage * 16, 1);                       // full
      init_barrier(start + BARRIERS + stage * 16 + 8, BLOCKS * WARPGROUPS);  // empty: it is filled for both blocks
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_barrier();
  if (threadIdx.x < 128 * WARPGROUPS) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    multiply_all(weight, tiles, &y, bias, outputs, units, order, start);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 128 * WARPGROUPS) {
      wait_for_previous_kernel();
      fetch_all(&x, units, order, start);
    }
  }
  __syncwarp();
  cluster_barrier();
}
