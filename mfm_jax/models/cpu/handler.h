// How XLA calls a kernel: shapes and attributes become a geometry, and leading axes a loop.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "machine.h"
#include "xla/ffi/api/ffi.h"

namespace {

using Sizes = ffi::Span<const int64_t>;

// The sizes of the last four axes, and the product of those before.
struct Shape {
  int64_t groups = 1, size[4];
  explicit Shape(Sizes dimensions) {
    for (size_t i = 0; i + 4 < dimensions.size(); ++i) groups *= dimensions[i];
    for (size_t i = 0; i < 4; ++i) size[i] = dimensions[dimensions.size() - 4 + i];
  }
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
};

enum Operation { kConvolution, kWeightGradient };

// `Kernels` has XLA's type of the elements, `type`, the C++ one, `Value`, and
// `run<operation>(pool, geometry, a, b, out)`.
template <Operation operation, class Kernels>
ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> out,
                  Sizes stride, Sizes low, Sizes dilation) {
  using T = typename Kernels::Value;
  for (auto type : {a.element_type(), b.element_type(), out->element_type()})
    if (type != Kernels::type) return ffi::Error::InvalidArgument("convolution: not the type that the kernels are for");
  if (a.dimensions().size() < 4 || b.dimensions().size() != a.dimensions().size() ||
      out->dimensions().size() != a.dimensions().size())
    return ffi::Error::InvalidArgument("convolution: operands with four axes or more are wanted");
  Shape x(a.dimensions()), second(b.dimensions()), third(out->dimensions());
  const Shape &kernel = operation == kConvolution ? second : third, &y = operation == kConvolution ? third : second;
  auto axis = [&](int i) {
    return Axis(x.size[i + 1], y.size[i + 1], kernel.size[i], stride[i], low[i], dilation[i]);
  };
  Geometry g(axis(0), axis(1), x.size[0], x.size[3], y.size[3], sizeof(T));
  auto *first = static_cast<const T*>(a.untyped_data()), *other = static_cast<const T*>(b.untyped_data());
  auto* to = static_cast<T*>(out->untyped_data());
  for (int64_t i = 0; i < x.groups; ++i)
    Kernels::template run<operation>(pool, g, first + i * x.count(), other + i * second.count(),
                                     to + i * third.count());
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<Sizes>("stride")
      .Attr<Sizes>("low")
      .Attr<Sizes>("dilation");
}

}  // namespace
