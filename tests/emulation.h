// decode.cu on a CPU: a thread for every CUDA thread, clusters of blocks one after the other. Slow, and the same arithmetic
// but for the order in which the tensor core adds. The last lines are what ctypes calls.
#include <math.h>
#include <pthread.h>
#include <string.h>

#include <thread>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct uint4 { unsigned x, y, z, w; };
struct Place { unsigned x; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static thread_local Place threadIdx, blockIdx, gridDim;
static thread_local unsigned rank_in_cluster;

static float memory_of_block[SPLIT][1 << 16];
#define partial (memory_of_block[rank_in_cluster])
static inline const float* partial_of(unsigned rank) { return memory_of_block[rank]; }

static pthread_barrier_t whole_cluster, whole_block[SPLIT], whole_warp[SPLIT][32];
static inline void wait_for_partial_sums() { pthread_barrier_wait(&whole_cluster); }
static inline void wait_for_readers() {
  if (SPLIT > 1) pthread_barrier_wait(&whole_cluster);
}
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
template <class A> static inline A __ldg(const A* address) { return *address; }

static inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
static inline uint4 load_once(const uint4* address) { return *address; }
static inline void wait_for_previous_kernel() {}

static inline float to_float(unsigned short bits) {
#if BF16
  unsigned wide = (unsigned)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
#else
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
#endif
}

static inline unsigned short from_float(float value) {
  unsigned short bits;
#if BF16
  unsigned wide;
  memcpy(&wide, &value, 4);
  bits = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
#else
  _Float16 narrow = (_Float16)value;
  memcpy(&bits, &narrow, 2);
#endif
  return bits;
}

static inline float half_of(unsigned pair, int odd) { return to_float((unsigned short)(pair >> 16 * odd)); }
static inline unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
  unsigned both = 0;
  for (int odd = 0; odd < 2; odd++) both |= (unsigned)from_float(half_of(a, odd) * half_of(b, odd) + half_of(c, odd)) << 16 * odd;
  return both;
}

// Every lane shows its operands to the others, then adds up its four elements.
static unsigned shown_by[SPLIT][32][32][6];
static inline void wait_for_warp() { pthread_barrier_wait(&whole_warp[rank_in_cluster][threadIdx.x / 32]); }
static inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  auto& shown = shown_by[rank_in_cluster][threadIdx.x / 32];
  memcpy(shown[lane], mine, sizeof mine);
  wait_for_warp();
  for (int e = 0; e < 4; e++) {
    const int high = e >> 1, column = 2 * t + (e & 1);  // row g or g + 8
    for (int k = 0; k < 16; k++) {
      const int late = k >= 8, other = k % 8 / 2;
      c[e] += half_of(shown[4 * g + other][2 * late + high], k & 1) * half_of(shown[4 * column + other][4 + late], k & 1);
    }
  }
  wait_for_warp();
}

static inline float from_lane(float value, unsigned lane) {
  auto& shown = shown_by[rank_in_cluster][threadIdx.x / 32];
  memcpy(shown[threadIdx.x % 32], &value, sizeof value);
  wait_for_warp();
  memcpy(&value, shown[lane], sizeof value);
  wait_for_warp();
  return value;
}

// "cluster" blocks at a time
template <class Body> static void run_blocks(unsigned blocks, unsigned cluster, unsigned threads, Body body) {
  pthread_barrier_init(&whole_cluster, nullptr, cluster * threads);
  for (unsigned block = 0; block < cluster; block++) {
    pthread_barrier_init(&whole_block[block], nullptr, threads);
    for (unsigned w = 0; w < threads / 32; w++) pthread_barrier_init(&whole_warp[block][w], nullptr, 32);
  }
  for (unsigned first = 0; first < blocks; first += cluster) {
    std::vector<std::thread> running;
    for (unsigned rank = 0; rank < cluster; rank++)
      for (unsigned thread = 0; thread < threads; thread++)
        running.emplace_back([=] {
          threadIdx.x = thread;
          blockIdx.x = first + rank;
          rank_in_cluster = rank;
          gridDim.x = blocks;
          body();
          pthread_barrier_wait(&whole_block[rank]);  // the block has ended, and its memory is another's
          for (unsigned i = thread; i < WARPS * 2 * COLUMNS * 32; i += threads) partial[i] = NAN;
        });
    for (auto& each : running) each.join();
  }
}

#include "decode.cu"

extern "C" void run_linear(int blocks, const T* x, Weight weight, const T* bias, T* y, unsigned rows, unsigned outputs, unsigned inputs, Plan plan) {
  run_blocks(blocks, SPLIT, WARPS * 32, [=] { linear(x, weight, bias, y, rows, outputs, inputs, plan); });
}

extern "C" void run_dense(int blocks, Weight weight, T* y, int outputs, int inputs, int tiles, int units) {
  run_blocks(blocks, 1, 256, [=] { dense(weight, y, outputs, inputs, tiles, units); });
}
