// Which inputs are met by which taps of the kernel, and the copy of input rows that a kernel runs over.
//
// Padding is laid out as zeros in the copy, and columns are sorted by their remainder modulo the stride, so that the
// inputs under neighbouring outputs are C values apart whatever the stride, and the inputs under neighbouring taps of a
// row are one run of values. A dilated input is zeros in between: outputs are taken in classes by their remainder
// modulo the dilation, and a class sees only its own taps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "machine.h"

namespace {

// Outputs first, first + dilation, ... along an axis, and the kernel's taps that meet an input there.
struct Class {
  struct Tap {
    int64_t tap, start;  // start: the input under the first output; the next output is `stride` inputs further
  };
  int64_t first, count;
  std::vector<Tap> taps;
};

struct Axis {
  int64_t in, out, kernel, stride, dilation;
  int64_t origin = 0, extent = 1;  // the inputs that are met, those of the padding included
  int64_t reach = 1;               // and those that one output of every class meets
  std::vector<Class> classes;

  Axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t low, int64_t dilation)
      : in(in), out(out), kernel(kernel), stride(stride), dilation(dilation) {
    int64_t begin = INT64_MAX, end = INT64_MIN, far = INT64_MIN;
    for (int64_t first = 0; first < std::min(dilation, out); ++first) {
      Class found{first, (out - first + dilation - 1) / dilation, {}};
      for (int64_t tap = 0; tap < kernel; ++tap) {
        int64_t at = first * stride + tap - low;
        if (at % dilation) continue;
        found.taps.push_back({tap, at / dilation});
        begin = std::min(begin, at / dilation);
        far = std::max(far, at / dilation);
        end = std::max(end, at / dilation + (found.count - 1) * stride + 1);
      }
      classes.push_back(std::move(found));
    }
    if (begin < end) origin = begin, extent = end - begin, reach = far - begin + 1;
  }
};

// Values of the copy that follow each other, under consecutive rows of the weight matrix [taps * C, N].
struct Run {
  int64_t offset, length, row;
};

struct Geometry {
  Axis y, x;
  int64_t images, channels, outputs;
  int64_t columns, row_size;                // of the copy: [row][column % stride][column / stride][channel]
  int64_t strips, strip_rows, copied_rows;  // rows of a class that are computed from one copy, and its own rows

  Geometry(Axis y, Axis x, int64_t images, int64_t channels, int64_t outputs, int64_t bytes)
      : y(std::move(y)), x(std::move(x)), images(images), channels(channels), outputs(outputs) {
    columns = (this->x.extent + this->x.stride - 1) / this->x.stride;
    row_size = this->x.stride * columns * channels;
    int64_t height = (this->y.out + this->y.dilation - 1) / this->y.dilation;
    int64_t fitting = (kStripBytes / (row_size * bytes) - this->y.reach) / this->y.stride + 1;
    fitting = std::max<int64_t>(fitting, 1);
    strips = (height + fitting - 1) / fitting;
    strip_rows = (height + strips - 1) / strips;
    copied_rows = (strip_rows - 1) * this->y.stride + this->y.reach;
  }

  double flops() const { return 2.0 * images * y.out * x.out * outputs * channels * y.kernel * x.kernel; }

  std::vector<Run> runs(const Class& rows, const Class& cols) const {
    std::vector<Run> found;
    for (auto& ky : rows.taps)
      for (auto& kx : cols.taps) {
        int64_t column = kx.start - x.origin;
        int64_t offset = (ky.start - y.origin) * row_size +
                         (column % x.stride * columns + column / x.stride) * channels;
        int64_t row = (ky.tap * x.kernel + kx.tap) * channels;
        Run* last = found.empty() ? nullptr : &found.back();
        if (last && last->offset + last->length == offset && last->row + last->length == row)
          last->length += channels;
        else
          found.push_back({offset, channels, row});
      }
    return found;
  }

  // Returns the copy of the rows of `image` under a strip: the image itself where it has that form already.
  template <class T>
  const T* strip(const T* image, int64_t index) const {
    int64_t top = y.origin + index * strip_rows * y.stride;
    if (x.stride == 1 && x.origin == 0 && columns == x.in && top >= 0 && top + copied_rows <= y.in)
      return image + top * row_size;
    T* copy = scratch<T>(kCopy, copied_rows * row_size);
    for (int64_t r = 0; r < copied_rows; ++r) {
      T* to = copy + r * row_size;
      if (top + r < 0 || top + r >= y.in) {
        std::fill_n(to, row_size, T{});
        continue;
      }
      const T* from = image + (top + r) * x.in * channels;
      for (int64_t phase = 0; phase < x.stride; ++phase, to += columns * channels) {
        // Column q of the phase is the input's column start + q * stride.
        int64_t start = x.origin + phase;
        int64_t begin = std::clamp<int64_t>(start < 0 ? (-start + x.stride - 1) / x.stride : 0, 0, columns);
        int64_t end = start < x.in ? std::clamp<int64_t>((x.in - 1 - start) / x.stride + 1, begin, columns) : begin;
        std::fill_n(to, begin * channels, T{});
        if (x.stride == 1)
          std::copy_n(from + (start + begin) * channels, (end - begin) * channels, to + begin * channels);
        else
          for (int64_t q = begin; q < end; ++q)
            std::copy_n(from + (start + q * x.stride) * channels, channels, to + q * channels);
        std::fill_n(to + end * channels, (columns - end) * channels, T{});
      }
    }
    return copy;
  }
};

}  // namespace
