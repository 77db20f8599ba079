// decode.cu on a CPU: a thread for every CUDA thread, blocks one after the other. Slow, and the same arithmetic but for the
// order in which the tensor core adds. The last lines are what ctypes calls.
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
float partial[1 << 16];

static pthread_barrier_t whole_block, whole_warp[32];
static void __syncthreads() { pthread_barrier_wait(&whole_block); }
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
static unsigned shown[32][32][6];
static inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(shown[warp][lane], mine, sizeof mine);
  pthread_barrier_wait(&whole_warp[warp]);
  for (int e = 0; e < 4; e++) {
    const int high = e >> 1, column = 2 * t + (e & 1);  // row g or g + 8
    for (int k = 0; k < 16; k++) {
      const int late = k >= 8, other = k % 8 / 2;
      c[e] += half_of(shown[warp][4 * g + other][2 * late + high], k & 1) * half_of(shown[warp][4 * column + other][4 + late], k & 1);
    }
  }
  pthread_barrier_wait(&whole_warp[warp]);
}

static inline float from_lane(float value, unsigned lane) {
  const int warp = threadIdx.x / 32;
  memcpy(shown[warp][threadIdx.x % 32], &value, sizeof value);
  pthread_barrier_wait(&whole_warp[warp]);
  memcpy(&value, shown[warp][lane], sizeof value);
  pthread_barrier_wait(&whole_warp[warp]);
  return value;
}

template <class Body> static void run_blocks(unsigned blocks, unsigned threads, Body body) {
  pthread_barrier_init(&whole_block, nullptr, threads);
  for (unsigned w = 0; w < threads / 32; w++) pthread_barrier_init(&whole_warp[w], nullptr, 32);
  for (unsigned block = 0; block < blocks; block++) {
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; thread++)
      running.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = block;
        gridDim.x = blocks;
        body();
      });
    for (auto& each : running) each.join();
  }
}

#include "decode.cu"

extern "C" void run_linear(int blocks, const T* x, Weight weight, const T* bias, T* y, unsigned rows, unsigned outputs, unsigned inputs, Plan plan) {
  run_blocks(blocks, WARPS * 32, [=] { linear(x, weight, bias, y, rows, outputs, inputs, plan); });
}

extern "C" void run_dense(int blocks, Weight weight, T* y, int outputs, int inputs, int tiles, int units) {
  run_blocks(blocks, 256, [=] { dense(weight, y, outputs, inputs, tiles, units); });
}
