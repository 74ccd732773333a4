// The 2-D convolution of NHWC images and its weight gradient for CPUs, as handlers of XLA's foreign function interface.
//
// Both are matrix products over a copy of some image rows (`geometry.h`). A tile of outputs stays in registers: R pixels
// (or R values of the weight's rows) by V vectors of output channels. The order of every sum follows from the shapes
// alone, so the bits depend neither on threads nor on their timing.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "geometry.h"
#include "handler.h"
#include "machine.h"

namespace {

// --- the convolution ------------------------------------------------------------------------------

// Adds to (or sets) R pixels by V vectors of `out` the products of the runs' inputs with the packed weights `w`.
template <class T, int R, int V>
void convolve_tile(const T* x, int64_t step, const Run* run, const Run* end, const T* w, T* out, int64_t out_step,
                   bool add) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(out + r * out_step + v * L) : Vector<T>{};
  for (; run != end; ++run) {
    const T* pixel[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) pixel[r] = x + run->offset + r * step;
    for (int64_t c = 0; c < run->length; ++c, w += V * L) {
      Vector<T> weight[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weight[v] = load(w + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += weight[v] * pixel[r][c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * out_step + v * L, sum[r][v]);
}

template <class T, int V, int... R>
constexpr auto convolve_tiles(std::integer_sequence<int, R...>) {
  return std::array{convolve_tile<T, R + 1, V>...};
}

// Splits `count` into the fewest pieces of at most `most`, as equal as can be; calls body(begin, size).
template <class Body>
void in_pieces(int64_t count, int64_t most, const Body& body) {
  for (int64_t begin = 0, left = (count + most - 1) / most; left > 0; --left) {
    int64_t size = (count - begin) / left;
    body(begin, size);
    begin += size;
  }
}

// A part of the weight matrix's rows that fits the first-level cache, as runs of the copy.
struct Chunk {
  std::vector<Run> runs;
  int64_t begin, length;  // among the class's rows
};

std::vector<Chunk> chunks(const std::vector<Run>& runs, int64_t most) {
  int64_t total = 0;
  for (auto& run : runs) total += run.length;
  std::vector<Chunk> found;
  size_t at = 0;
  int64_t used = 0;  // of run `at`
  in_pieces(total, most, [&](int64_t begin, int64_t size) {
    Chunk chunk{{}, begin, size};
    for (int64_t left = size; left > 0;) {
      int64_t length = std::min(left, runs[at].length - used);
      chunk.runs.push_back({runs[at].offset + used, length, runs[at].row + used});
      left -= length, used += length;
      if (used == runs[at].length) ++at, used = 0;
    }
    found.push_back(std::move(chunk));
  });
  if (found.empty()) found.push_back({{}, 0, 0});  // outputs that see no input are zero
  return found;
}

template <class T, int V>
void convolve(ffi::ThreadPool& pool, const Geometry& g, const T* x, const T* kernel, T* out) {
  constexpr int64_t width = V * kLanes<T>;
  constexpr auto tiles = convolve_tiles<T, V>(std::make_integer_sequence<int, kTile<V>>());
  struct Part {
    const Class *rows, *cols;
    std::vector<Chunk> chunks;
    int64_t length, weights;  // packed: [block of outputs][row][width]
  };
  int64_t blocks = (g.outputs + width - 1) / width, packed = 0;
  std::vector<Part> parts;
  for (auto& rows : g.y.classes)
    for (auto& cols : g.x.classes) {
      auto runs = g.runs(rows, cols);
      int64_t length = rows.taps.size() * cols.taps.size() * g.channels;
      parts.push_back({&rows, &cols, chunks(runs, kWeightBytes / (width * sizeof(T))), length, packed});
      packed += blocks * length * width;
    }
  T* weights = scratch<T>(kWeights, packed);
  T* to = weights;
  for (auto& part : parts)
    for (int64_t block = 0; block < blocks; ++block)
      for (auto& chunk : part.chunks)
        for (auto& run : chunk.runs)
          for (int64_t i = 0; i < run.length; ++i, to += width) {
            int64_t there = std::min(width, g.outputs - block * width);
            std::copy_n(kernel + (run.row + i) * g.outputs + block * width, there, to);
            std::fill_n(to + there, width - there, T{});
          }
  parallel_for(pool, g.images * g.strips, g.flops(), [&](int64_t task) {
    int64_t image = task / g.strips, strip = task % g.strips;
    const T* copy = g.strip(x + image * g.y.in * g.x.in * g.channels, strip);
    for (auto& part : parts)
      for (int64_t block = 0; block < blocks; ++block)
        for (auto& chunk : part.chunks) {
          const T* w = weights + part.weights + (block * part.length + chunk.begin) * width;
          const Run *begin = chunk.runs.data(), *end = begin + chunk.runs.size();
          bool add = chunk.begin > 0;
          int64_t there = std::min(width, g.outputs - block * width), pixel = g.x.dilation * g.outputs;
          int64_t last = std::min(part.rows->count, (strip + 1) * g.strip_rows);
          for (int64_t j = strip * g.strip_rows; j < last; ++j) {
            const T* in = copy + (j - strip * g.strip_rows) * g.y.stride * g.row_size;
            int64_t row = image * g.y.out + part.rows->first + j * g.y.dilation;
            T* result = out + (row * g.x.out + part.cols->first) * g.outputs + block * width;
            in_pieces(part.cols->count, kTile<V>, [&](int64_t i, int64_t size) {
              const T* at = in + i * g.channels;
              T* there_at = result + i * pixel;
              if (there == width) return tiles[size - 1](at, g.channels, begin, end, w, there_at, pixel, add);
              alignas(64) T whole[kTile<V> * width];
              for (int64_t r = 0; add && r < size; ++r) std::copy_n(there_at + r * pixel, there, whole + r * width);
              tiles[size - 1](at, g.channels, begin, end, w, whole, width, add);
              for (int64_t r = 0; r < size; ++r) std::copy_n(whole + r * width, there, there_at + r * pixel);
            });
          }
        }
  });
}

// --- the weight gradient --------------------------------------------------------------------------

struct Sweep {
  int64_t rows, cols, x_row, x_step, dy_row, dy_step;
};

// Adds to R rows by V vectors of `dw` the products of inputs and output gradients, over a sweep of pixels.
template <class T, int R, int V>
void gradient_tile(const T* x, const T* dy, const Sweep& sweep, T* dw, int64_t dw_step) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = load(dw + r * dw_step + v * L);
  int64_t x_step = sweep.x_step, dy_step = sweep.dy_step;
  for (int64_t row = 0; row < sweep.rows; ++row) {
    const T *p = x + row * sweep.x_row, *q = dy + row * sweep.dy_row;
    for (int64_t i = 0; i < sweep.cols; ++i, p += x_step, q += dy_step) {
      Vector<T> grad[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) grad[v] = load(q + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += grad[v] * p[r];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(dw + r * dw_step + v * L, sum[r][v]);
}

template <class T, int V, int... R>
constexpr auto gradient_tiles(std::integer_sequence<int, R...>) {
  return std::array{gradient_tile<T, R + 1, V>...};
}

template <class T, int V>
void weight_gradient(ffi::ThreadPool& pool, const Geometry& g, const T* x, const T* dy, T* out) {
  constexpr int64_t width = V * kLanes<T>;
  constexpr auto tiles = gradient_tiles<T, V>(std::make_integer_sequence<int, kTile<V>>());
  int64_t rows = g.y.kernel * g.x.kernel * g.channels, blocks = (g.outputs + width - 1) / width;
  int64_t size = blocks * rows * width;  // [block of outputs][row][width]
  // The sum over images is taken in parts, which are as many as the shapes say; blocks of outputs are apart anyway.
  int64_t parts = std::min(g.images, std::clamp<int64_t>(kPartialBytes / (size * sizeof(T)), 1, 32));
  int64_t groups = std::min(blocks, (32 + parts - 1) / parts);
  T* sums = scratch<T>(kSums, parts * size);
  int64_t pixel_bytes = sizeof(T) * (g.row_size * g.y.stride + g.x.out * g.outputs);
  int64_t band = std::clamp<int64_t>(kBandBytes / pixel_bytes, 1, g.strip_rows);
  parallel_for(pool, parts * groups, g.flops(), [&](int64_t task) {
    int64_t part = task / groups, group = task % groups;
    int64_t first_block = group * blocks / groups, last_block = (group + 1) * blocks / groups;
    T* dw = sums + part * size;
    std::fill_n(dw + first_block * rows * width, (last_block - first_block) * rows * width, T{});
    for (int64_t image = part * g.images / parts; image < (part + 1) * g.images / parts; ++image)
      for (int64_t strip = 0; strip < g.strips; ++strip) {
        const T* copy = g.strip(x + image * g.y.in * g.x.in * g.channels, strip);
        for (auto& ys : g.y.classes)
          for (auto& xs : g.x.classes) {
            auto runs = g.runs(ys, xs);
            int64_t last = std::min(ys.count, (strip + 1) * g.strip_rows);
            for (int64_t j = strip * g.strip_rows; j < last; j += band) {
              Sweep sweep{std::min(band, last - j), xs.count, g.y.stride * g.row_size, g.channels,
                          g.y.dilation * g.x.out * g.outputs, g.x.dilation * g.outputs};
              int64_t row = image * g.y.out + ys.first + j * g.y.dilation;
              const T* in = copy + (j - strip * g.strip_rows) * g.y.stride * g.row_size;
              for (int64_t block = first_block; block < last_block; ++block) {
                const T* grads = dy + (row * g.x.out + xs.first) * g.outputs + block * width;
                int64_t there = std::min(width, g.outputs - block * width);
                Sweep over = sweep;
                if (there < width) {  // no whole vector to load at the last pixel
                  T* edge = scratch<T>(kEdge, sweep.rows * sweep.cols * width);
                  for (int64_t r = 0; r < sweep.rows; ++r)
                    for (int64_t i = 0; i < sweep.cols; ++i) {
                      T* to = edge + (r * sweep.cols + i) * width;
                      std::copy_n(grads + r * sweep.dy_row + i * sweep.dy_step, there, to);
                      std::fill_n(to + there, width - there, T{});
                    }
                  grads = edge, over.dy_row = sweep.cols * width, over.dy_step = width;
                }
                for (auto& run : runs)
                  in_pieces(run.length, kTile<V>, [&](int64_t i, int64_t count) {
                    tiles[count - 1](in + run.offset + i, grads, over, dw + (block * rows + run.row + i) * width, width);
                  });
              }
            }
          }
      }
  });
  parallel_for(pool, blocks, 2.0 * parts * size, [&](int64_t block) {
    int64_t there = std::min(width, g.outputs - block * width);
    for (int64_t row = 0; row < rows; ++row) {
      Vector<T> total[V] = {};
      for (int64_t part = 0; part < parts; ++part)
        for (int v = 0; v < V; ++v)
          total[v] += load(sums + part * size + (block * rows + row) * width + v * kLanes<T>);
      alignas(64) T whole[width];
      for (int v = 0; v < V; ++v) store(whole + v * kLanes<T>, total[v]);
      std::copy_n(whole, there, out + row * g.outputs + block * width);
    }
  });
}

// --- the handlers ---------------------------------------------------------------------------------

struct Wide {
  using Value = MFM_VALUE;  // float or double: each is a library of its own, since few programs need both
  static constexpr auto type = std::is_same_v<Value, float> ? ffi::F32 : ffi::F64;

  template <Operation operation>
  static void run(ffi::ThreadPool& pool, const Geometry& g, const Value* a, const Value* b, Value* out) {
    bool narrow = g.outputs <= kLanes<Value>;
    if constexpr (operation == kConvolution)
      narrow ? convolve<Value, 1>(pool, g, a, b, out) : convolve<Value, kVectors>(pool, g, a, b, out);
    else
      narrow ? weight_gradient<Value, 1>(pool, g, a, b, out) : weight_gradient<Value, kVectors>(pool, g, a, b, out);
  }
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MfmConvolution, (handle<kConvolution, Wide>), binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MfmWeightGradient, (handle<kWeightGradient, Wide>), binding());
