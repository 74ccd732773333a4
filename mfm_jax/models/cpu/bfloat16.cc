// The kernels in bfloat16, as products of AMX tiles: 16 rows of 64 bytes, summed in float32 and rounded once.
//
// Inputs under some output pixels are gathered into a panel, a row for each pixel and a column for each of the weight
// matrix's rows. The convolution multiplies it by the packed weights, and the weight gradient multiplies the transposed
// output gradients by it. A tile on the right has its values in pairs: two rows of the matrix are one of the tile.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "geometry.h"
#include "handler.h"
#include "machine.h"

namespace {

using Bits = uint16_t;  // of a bfloat16
constexpr int64_t kSide = 16, kDepth = 32, kTileSize = kSide * kSide;
constexpr int64_t kPanelBytes = 32 << 10;  // of gathered inputs: a part of the first-level cache
constexpr int64_t kGradientTasks = 16;     // at least, of the weight gradient; each gathers the inputs anew

int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
__mmask32 first(int64_t count) { return _bzhi_u32(~0u, std::clamp<int64_t>(count, 0, 32)); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTiles;

// The calling thread's tiles are those of the kernels while this lives.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTiles); }
  ~Tiles() { _tile_release(); }
};

// One or two tiles beside each other, and those that follow in the product's sum. All steps are in values.
struct Operand {
  const Bits* at;
  int64_t row, other, next, tiles;
};

// Adds to (or sets) up to two by two tiles of `c` the product of `depth` tiles.
void multiply(const Operand& a, const Operand& b, int64_t depth, float* c, int64_t c_row, bool add) {
  bool low = a.tiles > 1, right = b.tiles > 1;
  float *c1 = c + kTileSize, *c2 = c + c_row, *c3 = c2 + kTileSize;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // g++ does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, c, 64);
    if (right) _tile_loadd(1, c1, 64);
    if (low) _tile_loadd(2, c2, 64);
    if (low && right) _tile_loadd(3, c3, 64);
  }
  const Bits *left = a.at, *top = b.at;
  for (; depth > 0; --depth, left += a.next, top += b.next) {
    _tile_loadd(4, left, a.row * 2);
    _tile_loadd(6, top, b.row * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (right) {
      _tile_loadd(7, top + b.other, b.row * 2);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (low) {
      _tile_loadd(5, left + a.other, a.row * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (right) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  if (right) _tile_stored(1, c1, 64);
  if (low) _tile_stored(2, c2, 64);
  if (low && right) _tile_stored(3, c3, 64);
}

// The outputs of a pair of classes: where those of a strip lie in the result, and their inputs in the strip's copy.
struct Part {
  struct Piece {  // of a run, as long as a vector
    int64_t from, to;
    __mmask32 there;
  };
  std::vector<Run> runs;
  std::vector<Piece> pieces;
  std::vector<int64_t> from, to;  // of each pixel
  int64_t rows, cols, begin, length = 0;

  Part(const Geometry& g, const Class& ys, const Class& xs)
      : runs(g.runs(ys, xs)), rows(ys.count), cols(xs.count), begin((ys.first * g.x.out + xs.first) * g.outputs) {
    for (auto& run : runs) {
      for (int64_t i = 0; i < run.length; i += kDepth)
        pieces.push_back({run.offset + i, length + i, first(run.length - i)});
      length += run.length;
    }
    pieces.push_back({0, length, 0});  // zeros up to the last tile's end
    for (int64_t j = 0; j < std::min(g.strip_rows, rows); ++j)
      for (int64_t i = 0; i < cols; ++i) {
        from.push_back(j * g.y.stride * g.row_size + i * g.channels);
        to.push_back((j * g.y.dilation * g.x.out + i * g.x.dilation) * g.outputs);
      }
  }
  int64_t pixels(const Geometry& g, int64_t strip) const {
    return std::clamp<int64_t>(rows - strip * g.strip_rows, 0, g.strip_rows) * cols;
  }
  int64_t offset(const Geometry& g, int64_t image, int64_t strip) const {
    return begin + (image * g.y.out + strip * g.strip_rows * g.y.dilation) * g.x.out * g.outputs;
  }
  int64_t row() const { return up(length, kDepth) + kDepth; }  // of the panel: the last store reaches further
};

std::vector<Part> parts_of(const Geometry& g) {
  std::vector<Part> parts;
  for (auto& ys : g.y.classes)
    for (auto& xs : g.x.classes) parts.emplace_back(g, ys, xs);
  return parts;
}

// Calls body(begin, count, panel) for the pixels of a strip, as many at once as a panel holds.
template <class Body>
void in_panels(const Part& part, int64_t pixels, const Body& body) {
  int64_t most = std::clamp<int64_t>(kPanelBytes / (2 * part.row()) / kDepth * kDepth, kDepth, up(pixels, kDepth));
  Bits* panel = scratch<Bits>(kEdge, most * part.row());
  for (int64_t begin = 0; begin < pixels; begin += most) body(begin, std::min(most, pixels - begin), panel);
}

// Gathers the inputs of `count` pixels.
void gather(const Part& part, int64_t begin, int64_t count, const Bits* copy, Bits* panel) {
  const int64_t row = part.row(), *from = part.from.data() + begin;
  for (int64_t block = 0; block < count; block += kDepth)
    for (auto [offset, at, there] : part.pieces) {
      const Bits* in = copy + offset;
      Bits* to = panel + block * row + at;
      for (int64_t p = block, end = std::min(block + kDepth, count); p < end; ++p, to += row)
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, in + from[p]));
    }
}

void convolve(ffi::ThreadPool& pool, const Geometry& g, const Bits* x, const Bits* kernel, Bits* out) {
  auto parts = parts_of(g);
  int64_t blocks = up(g.outputs, kDepth) / kDepth, sides = up(g.outputs, kSide) / kSide, packed = 0;
  for (auto& part : parts) packed += blocks * up(part.length, kDepth) * kDepth;
  // [part][block of outputs][depth][tile of outputs][pair of rows][output][which of the pair]
  Bits* weights = scratch<Bits>(kWeights, packed);
  std::fill_n(weights, packed, Bits{});
  Bits* to = weights;
  for (auto& part : parts)
    for (int64_t block = 0; block < blocks; ++block, to += up(part.length, kDepth) * kDepth) {
      int64_t at = 0;
      for (auto& run : part.runs)
        for (int64_t i = 0; i < run.length; ++i, ++at) {
          Bits* pair = to + at / kDepth * 4 * kTileSize + at % kDepth / 2 * kDepth + at % 2;
          const Bits* from = kernel + (run.row + i) * g.outputs + block * kDepth;
          for (int64_t n = 0; n < std::min(kDepth, g.outputs - block * kDepth); ++n)
            pair[n / kSide * 2 * kTileSize + n % kSide * 2] = from[n];
        }
    }
  parallel_for(pool, g.images * g.strips, g.flops(), [&](int64_t task) {
    Tiles tiles;
    int64_t image = task / g.strips, strip = task % g.strips;
    const Bits *copy = g.strip(x + image * g.y.in * g.x.in * g.channels, strip), *w = weights;
    for (auto& part : parts) {
      int64_t row = part.row(), depth = up(part.length, kDepth) / kDepth;
      Bits* result = out + part.offset(g, image, strip);
      in_panels(part, part.pixels(g, strip), [&](int64_t begin, int64_t count, Bits* panel) {
        gather(part, begin, count, copy, panel);
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t p = 0; p < count; p += 2 * kSide) {
            alignas(64) float sums[4 * kTileSize];
            Operand a{panel + p * row, row, kSide * row, kDepth, count - p > kSide ? 2 : 1};
            Operand b{w + block * depth * 4 * kTileSize, kDepth, 2 * kTileSize, 4 * kTileSize, sides - 2 * block};
            multiply(a, b, depth, sums, 2 * kTileSize, false);
            for (int64_t i = 0; i < std::min(2 * kSide, count - p); ++i) {
              const float* sum = sums + i / kSide * 2 * kTileSize + i % kSide * kSide;
              auto rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(sum + kTileSize), _mm512_load_ps(sum));
              _mm512_mask_storeu_epi16(result + part.to[begin + p + i] + block * kDepth,
                                       first(g.outputs - block * kDepth), (__m512i)rounded);
            }
          }
      });
      w += blocks * depth * 4 * kTileSize;
    }
  });
}

// Writes the output gradients of `count` pixels as tiles [depth][side][output][pixel].
void transpose(const Part& part, int64_t begin, int64_t count, const Bits* dy, int64_t outputs, int64_t sides,
               Bits* to) {
  const __m512i column = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  for (int64_t p = 0; p < count; p += kDepth)
    for (int64_t side = 0; side < sides; ++side, to += 2 * kTileSize) {
      alignas(64) int32_t pairs[kTileSize];  // [pair of pixels][output]
      for (int64_t i = 0; i < kSide; ++i) {
        auto wide = [&](int64_t pixel) {
          __mmask16 there = pixel < count ? first(outputs - side * kSide) : 0;
          const Bits* at = dy + part.to[begin + std::min(pixel, count - 1)] + side * kSide;
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at));
        };
        __m512i pair = _mm512_or_si512(wide(p + 2 * i), _mm512_slli_epi32(wide(p + 2 * i + 1), 16));
        _mm512_store_si512(pairs + i * kSide, pair);
      }
      for (int64_t i = 0; i < kSide; ++i)
        _mm512_store_si512(to + i * kDepth, _mm512_i32gather_epi32(column, pairs + i, 4));
    }
}

// Gathers the inputs of `count` pixels; a row of the panel has those of two, value by value.
void gather_pairs(const Part& part, int64_t begin, int64_t count, const Bits* copy, Bits* panel) {
  alignas(64) Bits order[64];
  for (int i = 0; i < 64; ++i) order[i] = i / 2 + i % 2 * 32;
  __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  const int64_t row = part.row(), *from = part.from.data() + begin;
  for (int64_t block = 0; block < count; block += kDepth)
    for (auto [offset, at, there] : part.pieces) {
      Bits* to = panel + block * row + 2 * at;
      for (int64_t p = block; p < block + kDepth; p += 2, to += 2 * row) {
        __m512i pair[2];
        for (int64_t i = 0; i < 2; ++i) {
          const Bits* in = copy + from[std::min(p + i, count - 1)] + offset;
          pair[i] = _mm512_maskz_loadu_epi16(p + i < count ? there : 0, in);
        }
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(pair[0], low, pair[1]));
        _mm512_storeu_si512(to + kDepth, _mm512_permutex2var_epi16(pair[0], high, pair[1]));
      }
    }
}

// Adds up the shares' tiles [share][side][column][output][row of the weights], and rounds.
void reduce(ffi::ThreadPool& pool, const Geometry& g, const std::vector<Part>& parts, float* sums, int64_t shares,
            int64_t line, Bits* out) {
  int64_t rows = g.y.kernel * g.x.kernel * g.channels, sides = up(g.outputs, kSide) / kSide;
  parallel_for(pool, sides, 2.0 * shares * sides * line, [&](int64_t side) {
    float* total = sums + side * line;
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = 0; i < line; i += kSide)
        store(total + i, load(total + i) + load(total + share * sides * line + i));
    std::vector<float> whole(rows * kSide);
    for (auto& part : parts) {
      int64_t at = 0;
      for (auto& run : part.runs)
        for (int64_t i = 0; i < run.length; ++i, ++at)
          for (int64_t n = 0; n < kSide; ++n)
            whole[(run.row + i) * kSide + n] += total[at / kSide * kTileSize + n * kSide + at % kSide];
      total += up(part.length, kSide) * kSide;
    }
    for (int64_t row = 0; row < rows; ++row)
      _mm256_mask_storeu_epi16(out + row * g.outputs + side * kSide, first(g.outputs - side * kSide),
                               (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(&whole[row * kSide])));
  });
}

void weight_gradient(ffi::ThreadPool& pool, const Geometry& g, const Bits* x, const Bits* dy, Bits* out) {
  auto parts = parts_of(g);
  int64_t sides = up(g.outputs, kSide) / kSide, columns = 0;  // tiles
  for (auto& part : parts) columns += up(part.length, kSide) / kSide;
  int64_t line = columns * kTileSize, size = sides * line;
  // As in float32, the images are taken in parts, and so are the outputs where that makes too few.
  int64_t shares = std::min(g.images, std::clamp<int64_t>(kPartialBytes / (size * 4 + 1), 1, 32));
  int64_t groups = std::min((sides + 1) / 2, (kGradientTasks + shares - 1) / shares);
  float* sums = scratch<float>(kSums, shares * size);
  parallel_for(pool, shares * groups, g.flops(), [&](int64_t task) {
    Tiles tiles;
    int64_t share = task / groups, group = task % groups;
    int64_t first_side = group * sides / groups, own = (group + 1) * sides / groups - first_side;
    float* dw = sums + share * size + first_side * line;
    std::fill_n(dw, own * line, 0.0f);
    for (int64_t image = share * g.images / shares; image < (share + 1) * g.images / shares; ++image)
      for (int64_t strip = 0; strip < g.strips; ++strip) {
        const Bits* copy = g.strip(x + image * g.y.in * g.x.in * g.channels, strip);
        float* c = dw;
        for (auto& part : parts) {
          int64_t row = 2 * part.row(), wide = up(part.length, kSide) / kSide;
          in_panels(part, part.pixels(g, strip), [&](int64_t begin, int64_t count, Bits* panel) {
            int64_t depth = up(count, kDepth) / kDepth;
            Bits* grads = scratch<Bits>(kGrads, depth * own * 2 * kTileSize);
            const Bits* from = dy + part.offset(g, image, strip) + first_side * kSide;
            transpose(part, begin, count, from, g.outputs - first_side * kSide, own, grads);
            gather_pairs(part, begin, count, copy, panel);
            for (int64_t m = 0; m < own; m += 2)
              for (int64_t n = 0; n < wide; n += 2) {
                Operand a{grads + m * 2 * kTileSize, kDepth, 2 * kTileSize, own * 2 * kTileSize, own - m};
                Operand b{panel + n * kDepth, row, kDepth, kSide * row, wide - n};
                multiply(a, b, depth, c + m * line + n * kTileSize, line, true);
              }
          });
          c += wide * kTileSize;
        }
      }
  });
  reduce(pool, g, parts, sums, shares, line, out);
}

struct Half {
  static constexpr auto type = ffi::BF16;
  using Value = Bits;

  template <Operation operation>
  static constexpr auto run = operation == kConvolution ? convolve : weight_gradient;
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MfmConvolution, (handle<kConvolution, Half>), binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MfmWeightGradient, (handle<kWeightGradient, Half>), binding());
