// SPDX-License-Identifier: MIT
// A checked tensor as the backends see it: an address, a dtype and one stride per named axis.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace ssmk {

// The sizes stand in the Problem, once for all tensors.  An axis that the caller's tensor lacks has
// stride 0, so a backend never asks which form a tensor came in.  Strides count elements.
template <int Rank>
struct View {
  char *data = nullptr;
  DType dtype = DType::kNone;
  int64_t stride[Rank] = {};

  SSMK_ANYWHERE bool given() const { return dtype != DType::kNone; }

  template <class... Index>
  SSMK_ANYWHERE char *at(Index... index) const {
    static_assert(sizeof...(Index) <= Rank, "more indices than axes");
    const int64_t i[] = {int64_t(index)...};
    int64_t offset = 0;
    for (unsigned k = 0; k < sizeof...(Index); ++k) offset += i[k] * stride[k];
    return data + offset * size_of(dtype);
  }
};

// Pairs of float32, real and imaginary part `imag` elements apart; imag is 0 where values are real.
template <int Rank>
struct ComplexView : View<Rank> {
  int64_t imag = 0;
};

// The same tensor seen with more axes, or with its axes in another order: axis k of v becomes axis
// axes[k]; the axes that are not named are broadcast.
template <int To, int From>
View<To> spread(const View<From> &v, const int (&axes)[From]) {
  View<To> r;
  r.data = v.data;
  r.dtype = v.dtype;
  for (int k = 0; k < From; ++k) r.stride[axes[k]] = v.stride[k];
  return r;
}

SSMK_ANYWHERE inline int64_t read_index(const View<1> &v, int64_t i) {
  const char *p = v.at(i);
  return v.dtype == DType::kI64 ? *reinterpret_cast<const int64_t *>(p)
                                : *reinterpret_cast<const int32_t *>(p);
}

SSMK_ANYWHERE inline int64_t read_index(const View<2> &v, int64_t i, int64_t j) {
  const char *p = v.at(i, j);
  return v.dtype == DType::kI64 ? *reinterpret_cast<const int64_t *>(p)
                                : *reinterpret_cast<const int32_t *>(p);
}

}  // namespace ssmk
