// SPDX-License-Identifier: MIT
// Reading an argument struct: sizes of other versions, shapes by name, dtypes, devices, overlap.
//
// A Check is made per call.  The first failure is kept and every later check does nothing, so a
// function reads its arguments in order and asks once at the end.
#pragma once

#include <cstring>
#include <initializer_list>

#include "core/problem.h"
#include "core/status.h"

namespace ssmk {

// A named size.  The first tensor that has the axis binds it; the others must agree.
struct Dim {
  const char *name;
  int64_t value = -1;
  bool bound() const { return value >= 0; }
};

enum class Device : uint8_t { kCpu, kCuda, kMetal };

class Check {
 public:
  // `sizes_only`: a workspace query; data pointers are not looked at, nor index tensors read.
  Check(const char *op, bool sizes_only) : op_(op), sizes_only_(sizes_only) {}

  // Copies the caller's struct, whatever version of the header it was compiled with, over a zeroed
  // one of ours.
  template <class Args>
  void args(const Args *user, Args *own) {
    std::memset(own, 0, sizeof *own);
    read_args(user, reinterpret_cast<char *>(own), sizeof *own);
    stream_ = own->stream;
  }

  // A tensor with just these axes.  Absent ones (NULL) give an empty view; what must be there is
  // named in required().
  template <int Rank>
  View<Rank> in(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
                unsigned dtypes) {
    return take<Rank>(t, name, dims, dtypes, kRead);
  }
  // `out`: written in full.  `inout`: updated in place.
  template <int Rank>
  View<Rank> out(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
                 unsigned dtypes) {
    return take<Rank>(t, name, dims, dtypes, kWrite);
  }

  void required(const DLTensor *t, const char *name);
  void forbidden(const void *t, const char *name, const char *why);
  // The number of axes of a given tensor is one of a set: `expected` says which, in words.
  bool rank_is(const DLTensor *t, const char *name, std::initializer_list<int> ranks,
               const char *expected);
  void that(bool condition, const char *name, const char *expected, long long got);
  void multiple(const Dim &whole, const Dim &part);
  ssmk_status unsupported(const char *what);

  // initial and final may be one tensor (the same memory, shape, strides and dtype) or must not
  // touch.
  void may_alias(const DLTensor *a, const DLTensor *b);
  // Call after the last tensor: outputs must not touch themselves or any other tensor.
  void overlaps();

  bool ok() const { return status_ == SSMK_OK; }
  ssmk_status status() const { return status_; }
  Device device() const { return device_; }
  int device_id() const { return first_device_.device_id; }
  void *stream() const { return stream_; }
  bool on_cpu() const { return device_ == Device::kCpu; }
  bool reads_data() const { return ok() && on_cpu() && !sizes_only_; }
  const char *op() const { return op_; }
  ssmk_status error(ssmk_status status, const char *format, ...)
      __attribute__((format(printf, 3, 4)));

 private:
  enum Access : uint8_t { kRead, kWrite };
  struct Seen {
    const DLTensor *tensor;
    const char *name;
    DType dtype;
    Access access;
    const char *lo, *hi;  // the bytes that it spans, hi exclusive
  };
  static constexpr int kMaxTensors = 48;

  template <int Rank>
  View<Rank> take(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
                  unsigned dtypes, Access access) {
    View<Rank> v;
    if (!t || !ok()) return v;
    if (inspect(t, name, dims, dtypes, access, v.stride)) {
      v.data = t->data ? static_cast<char *>(t->data) + t->byte_offset : nullptr;
      v.dtype = dtype_of(t->dtype);
    }
    return v;
  }

  void read_args(const void *user, char *own, uint64_t own_size);
  bool inspect(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
               unsigned dtypes, Access access, int64_t *strides);
  bool check_device(const DLTensor *t, const char *name);
  bool same_tensor(const Seen &a, const Seen &b) const;

  const char *op_;
  bool sizes_only_;
  ssmk_status status_ = SSMK_OK;
  Device device_ = Device::kCpu;
  void *stream_ = nullptr;
  DLDevice first_device_{};
  const char *first_name_ = nullptr;
  int nseen_ = 0;
  Seen seen_[kMaxTensors];
  const DLTensor *alias_[4][2];
  int naliases_ = 0;
};

// True if some element of a and some element of b share a byte; also when the question is too hard
// to settle.
bool tensors_overlap(const DLTensor &a, const DLTensor &b);
// True if two different elements of a share a byte.
bool overlaps_itself(const DLTensor &a);

}  // namespace ssmk
