// What the kernels of prompts share, prompt.cu and prompt_int8.cu: tiles of y on Hopper's tensor cores (sm_90a).
//
// Macros: ROWS of x a tile, a multiple of 32, or 240; STAGES of x in shared memory; BUFFERS of y there, a warpgroup;
// and, from the file that includes this,
//   INPUTS      of a stage: 128 bytes of a row of x
//   WEIGHT_ROW  bytes of a row of the weight that come with a stage, swizzled: 64, 128, or 0 where lanes load the weight
//   CHUNK       rows of y that are written at once, a multiple of 16 by which ROWS can be divided
//   Sum, SUM    the type of a sum, and its letter in an asm statement
//   PRODUCT     of a wgmma: the number of inputs, and the types of sums, weight and x
//   FLAGS       what follows its operands
//   MULTIPLIERS_HAVE, FETCHERS_HAVE  registers a thread, of 504 for two of the first and one of the second
//   OWN_BYTES   of shared memory, from OWN on, that the file needs for itself

#define OUTPUTS 128  // of a tile
#define BLOCKS 2     // of a cluster
#define WARPGROUPS 2  // that multiply, 64 outputs each
#define X_BYTES (ROWS * 128)
#define STAGE_BYTES (X_BYTES + OUTPUTS * WEIGHT_ROW)
#define CHUNK_BYTES (CHUNK * 128)  // of 64 outputs
#define Y_BYTES (BUFFERS * CHUNK_BYTES)  // of a warpgroup
#define OWN (STAGES * STAGE_BYTES + WARPGROUPS * Y_BYTES)
#define BARRIERS (OWN + OWN_BYTES)

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

// A box into this block's shared memory alone.
__device__ __forceinline__ void fetch_own(u32 to, const TensorMap* map, u32 input, u32 row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(input), "r"(row), "r"(barrier)
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
#define D8(i) "+" SUM(d[i]), "+" SUM(d[i + 1]), "+" SUM(d[i + 2]), "+" SUM(d[i + 3]), "+" SUM(d[i + 4]), "+" SUM(d[i + 5]), "+" SUM(d[i + 6]), "+" SUM(d[i + 7])
#define D32 D8(0), D8(8), D8(16), D8(24)
#define D48 D32, D8(32), D8(40)
#define D64 D48, D8(48), D8(56)
#define D80 D64, D8(64), D8(72)
#define D96 D80, D8(80), D8(88)
#define D112 D96, D8(96), D8(104)
#define D120 D112, D8(112)
#define D128 D120, D8(120)
#define WGMMA(n, registers, a0, a1, a2, a3, b, c)                                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n PRODUCT " {" P##registers \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p" FLAGS ";\n}"                                   \
               : D##registers : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(keep))

// d [64 x ROWS] = weight [64 x 32 bytes] x [32 bytes x ROWS], added to d if "keep". Lane 4g + t of warp m has, of the
// weight's rows 16m + g (w0, w2) and 16m + g + 8 (w1, w3), bytes 4t .. 4t + 3 (w0, w1) and 16 more (w2, w3); of d's same
// rows, columns 8j + 2t and 8j + 2t + 1, as d[4j], d[4j + 1] and d[4j + 2], d[4j + 3].
__device__ __forceinline__ void multiply(Sum (&d)[ROWS / 2], const u32 (&w)[4], unsigned long long x, u32 keep) {
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

// ---- x ---------------------------------------------------------------------------------------------------------------
// One thread's work: a stage of every tile after the other, this block's half of its rows, and its own weight.
__device__ __forceinline__ void fetch_all(const TensorMap* x, const TensorMap* weight, u32 stages, const Order& order, u32 start) {
  const u32 rank = blockIdx.x % BLOCKS;
  Ring ring(start);
  for (u32 i = blockIdx.x / BLOCKS; i < order.total; i += gridDim.x / BLOCKS) {
    const Place place(order, i);
    const u32 row = place.row + rank * (ROWS / BLOCKS);
    for (u32 k = 0; k < stages; k++) {
      wait(ring.empty(), ring.parity ^ 1);
      arrive_expecting(ring.full(), STAGE_BYTES);
      fetch(ring.x() + rank * (X_BYTES / BLOCKS), x, k * INPUTS, row, ring.full());
      if (WEIGHT_ROW) fetch_own(ring.x() + X_BYTES, weight, k * WEIGHT_ROW, place.output_tile * OUTPUTS, ring.full());
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

__device__ __forceinline__ void multiply_stage(Sum (&d)[ROWS / 2], const u32 (&steps)[4][4], const Ring& ring, u32 keep) {
  const unsigned long long x = operand(ring.x());
  begin_products();
#pragma unroll
  for (int step = 0; step < 4; step++) multiply(d, steps[step], x + (step * 32 >> 4), keep + step);
  commit_products();
}

// ---- y ---------------------------------------------------------------------------------------------------------------
// A warpgroup's part of a tile, through BUFFERS of CHUNK rows in turns. finish(out, d, column) makes of the lane's eight sums
// of columns "column" to "column" + 15 of d, in 16 bits, what store_turned takes.
template <class Finish> __device__ __forceinline__ void write_tile(const Sum (&d)[ROWS / 2], const TensorMap* y, u32 output, u32 row, u32 buffers, u32& written, Finish finish) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = thread & 31, warp = thread >> 5;
  // Rows of a turned block are rows of y, 128 bytes of 64 outputs, their 16-byte chunks swizzled.
  const u32 turned_row = (lane >> 4) * 8 + (lane & 7), turned = turned_row * 128 + ((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
#pragma unroll
  for (int c = 0; c < ROWS / CHUNK; c++) {
    const u32 buffer = buffers + written++ % BUFFERS * CHUNK_BYTES;
    if (thread == 0) wait_for_writes<BUFFERS - 1>();
    warpgroup_barrier(group);
#pragma unroll
    for (int b = 0; b < CHUNK / 16; b++) {
      u32 out[4];
      finish(out, d + c * (CHUNK / 2) + b * 8, c * CHUNK + b * 16);
      store_turned(buffer + b * 16 * 128 + turned, out[0], out[1], out[2], out[3]);
    }
    show_to_copy_engine();
    warpgroup_barrier(group);
    if (thread == 0) write_out(y, output, row + c * CHUNK, buffer);
  }
}

// ---- the block -------------------------------------------------------------------------------------------------------
// Registers are for those that multiply: up to 128 sums a thread, and few for a warpgroup of which one thread works.
template <class Multiply> __device__ __forceinline__ void run_block(const TensorMap* x, const TensorMap* weight, u32 stages, const Order& order, Multiply multiply_all) {
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
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLIERS_HAVE));
    multiply_all(start);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCHERS_HAVE));
    if (threadIdx.x == 128 * WARPGROUPS) {
      wait_for_previous_kernel();
      fetch_all(x, weight, stages, order, start);
    }
  }
  __syncwarp();
  cluster_barrier();
}
