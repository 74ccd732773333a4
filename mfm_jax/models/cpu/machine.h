// What the kernels ask of the machine: vectors as wide as the processor's, scratch memory that is kept, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Vectors are as wide as the processor's. A tile has as many accumulators as its registers hold beside the operands.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectors = 2, kRows = 8, kRowsOfOneVector = 12;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectors = 2, kRows = 6, kRowsOfOneVector = 8;
#else
constexpr int kVectorBytes = 16, kVectors = 4, kRows = 5, kRowsOfOneVector = 8;
#endif
constexpr int64_t kStripBytes = 160 << 10;     // of copied rows: a part of the second-level cache
constexpr int64_t kBandBytes = 40 << 10;       // of the rows that one tile of the weight gradient runs over
constexpr int64_t kWeightBytes = 20 << 10;     // of the weights that one tile of the convolution runs over
constexpr int64_t kPartialBytes = 2 << 20;     // of the weight gradient's partial sums
constexpr int64_t kFlopsOfThread = 1'000'000;  // below, another thread is not worth its start

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);
template <int V>
constexpr int kTile = V == 1 ? kRowsOfOneVector : kRows;

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}

// Scratch of the calling thread, one buffer for each purpose; it grows and is kept.
enum Purpose { kCopy, kEdge, kWeights, kSums, kGrads, kPurposes };
template <class T>
T* scratch(Purpose purpose, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[kPurposes];
  Buffer& buffer = buffers[purpose];
  size_t wanted = (count * sizeof(T) + 4096) / 4096 * 4096;
  if (buffer.size < wanted) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(4096, wanted);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = wanted;
  }
  return static_cast<T*>(buffer.data);
}

// Runs body(0) ... body(count - 1), also on the pool. The caller works too, and waits only for what has begun: a wait
// for what has not would be one for a free thread, and there may never be one where callers are the pool's own threads.
template <class Body>
void parallel_for(ffi::ThreadPool& pool, int64_t count, double flops, const Body& body) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, &body, count] {  // a late one finds no number left and does not touch `body`
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      body(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t useful = std::min<double>(count, flops / kFlopsOfThread);
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), useful); ++helper) pool.Schedule(decltype(work)(work));
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < count;)
    if (++spins > 1000) std::this_thread::yield();
}

}  // namespace
