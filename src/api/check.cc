// SPDX-License-Identifier: MIT
#include "api/check.h"

#include <cstdarg>
#include <cstdio>

#include "cuda/kernels.h"

namespace ssmk {
namespace {

// A line of text on the stack.
struct Text {
  char s[256];
  size_t n = 0;
  Text() { s[0] = 0; }
  __attribute__((format(printf, 2, 3))) void add(const char *format, ...) {
    va_list a;
    va_start(a, format);
    const int wrote = std::vsnprintf(s + n, sizeof s - n, format, a);
    va_end(a);
    if (wrote > 0) n = n + size_t(wrote) < sizeof s ? n + size_t(wrote) : sizeof s - 1;
  }
};

void add_shape(Text &t, const DLTensor *tensor) {
  t.add("(");
  for (int k = 0; k < tensor->ndim; ++k) t.add(k ? ", %lld" : "%lld", (long long)tensor->shape[k]);
  t.add(tensor->ndim == 1 ? ",)" : ")");
}

void add_dims(Text &t, std::initializer_list<Dim *> dims) {
  const char *tail = dims.size() == 1 ? ",)" : ")";
  int k = 0;
  t.add("(");
  for (const Dim *d : dims) t.add(k++ ? ", %s" : "%s", d->name);
  t.add("%s = (", tail);
  k = 0;
  for (const Dim *d : dims) {
    if (k++) t.add(", ");
    d->bound() ? t.add("%lld", (long long)d->value) : t.add("any");
  }
  t.add("%s", tail);
}

void add_dtypes(Text &t, unsigned set) {
  static constexpr struct {
    DType d;
    const char *name;
  } kNames[] = {{DType::kF32, "float32"},   {DType::kF16, "float16"},
                {DType::kBF16, "bfloat16"}, {DType::kC64, "complex64"},
                {DType::kI32, "int32"},     {DType::kI64, "int64"},
                {DType::kU32, "uint32"},    {DType::kBool, "bool, int8 or uint8"}};
  int left = __builtin_popcount(set);
  const int all = left;
  for (const auto &n : kNames)
    if (set & set_of(n.d)) {
      t.add("%s%s", left == all ? "" : left == 1 ? " or " : ", ", n.name);
      --left;
    }
}

void add_dtype(Text &t, DLDataType d) {
  static const char *const kCodes[] = {"int",    "uint",    "float", "handle",
                                       "bfloat", "complex", "bool"};
  if (d.code == kDLBool) {
    t.add("bool");
  } else if (d.code < sizeof kCodes / sizeof *kCodes) {
    t.add("%s%d", kCodes[d.code], d.bits);
  } else {
    t.add("(DLPack code %d, %d bits)", d.code, d.bits);
  }
  if (d.lanes != 1) t.add(" x %d lanes", d.lanes);
}

const char *device_name(int32_t type) {
  switch (type) {
    case kDLCPU: return "cpu";
    case kDLCUDA: return "cuda";
    case kDLCUDAHost: return "cuda_host";
    case kDLCUDAManaged: return "cuda_managed";
    case kDLMetal: return "metal";
    case kDLROCM: return "rocm";
    case kDLROCMHost: return "rocm_host";
    default: return "device type";
  }
}

// Pinned host memory is host memory.
bool is_host(int32_t type) { return type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost; }
bool is_cuda(int32_t type) { return type == kDLCUDA || type == kDLCUDAManaged; }
bool same_device(DLDevice a, DLDevice b) {
  if (is_host(a.device_type) || is_host(b.device_type))
    return is_host(a.device_type) == is_host(b.device_type);
  const bool same_kind =
      a.device_type == b.device_type || (is_cuda(a.device_type) && is_cuda(b.device_type));
  return same_kind && a.device_id == b.device_id;
}

}  // namespace

ssmk_status Check::error(ssmk_status status, const char *format, ...) {
  if (!ok()) return status_;
  Text t;
  va_list a;
  va_start(a, format);
  std::vsnprintf(t.s, sizeof t.s, format, a);
  va_end(a);
  return status_ = fail(status, "%s: %s", op_, t.s);
}

void Check::read_args(const void *user, char *own, uint64_t own_size) {
  if (!user) {
    error(SSMK_INVALID_ARGUMENT, "args: must not be NULL");
    return;
  }
  uint64_t size;
  std::memcpy(&size, user, sizeof size);
  // A struct of pointers and 64-bit numbers is a multiple of 8 long; 64 KiB would be no struct of
  // ours.
  if (size < sizeof size || size % 8 != 0 || size > 65536) {
    error(SSMK_INVALID_ARGUMENT,
          "args: size must be the sizeof of the struct (here %llu), got %llu",
          (unsigned long long)own_size, (unsigned long long)size);
    return;
  }
  const char *bytes = static_cast<const char *>(user);
  for (uint64_t i = own_size; i < size; ++i)
    if (bytes[i]) {
      error(SSMK_INVALID_ARGUMENT,
            "args: a field beyond the %llu bytes that this library (version %d.%d.%d) knows is "
            "set; size is %llu",
            (unsigned long long)own_size, SSMK_VERSION_MAJOR, SSMK_VERSION_MINOR,
            SSMK_VERSION_PATCH, (unsigned long long)size);
      return;
    }
  std::memcpy(own, user, size < own_size ? size : own_size);
}

void Check::required(const DLTensor *t, const char *name) {
  if (!t) error(SSMK_INVALID_ARGUMENT, "%s: is required, got NULL", name);
}

void Check::forbidden(const void *t, const char *name, const char *why) {
  if (t) error(SSMK_INVALID_ARGUMENT, "%s: must not be given %s", name, why);
}

bool Check::rank_is(const DLTensor *t, const char *name, std::initializer_list<int> ranks,
                    const char *expected) {
  if (!ok() || !t) return false;
  for (int r : ranks)
    if (t->ndim == r) return true;
  Text got;
  if (t->shape && t->ndim > 0 && t->ndim < 16) {
    add_shape(got, t);
  } else {
    got.add("%d axes", t->ndim);
  }
  error(SSMK_INVALID_ARGUMENT, "%s: shape must be %s, got %s", name, expected, got.s);
  return false;
}

void Check::that(bool condition, const char *name, const char *expected, long long got) {
  if (!condition) error(SSMK_INVALID_ARGUMENT, "%s: %s, got %lld", name, expected, got);
}

void Check::multiple(const Dim &whole, const Dim &part) {
  if (!ok() || (part.value > 0 && whole.value % part.value == 0)) return;
  error(SSMK_INVALID_ARGUMENT, "B: %s must be a positive divisor of %s = %lld, got %lld", part.name,
        whole.name, (long long)whole.value, (long long)part.value);
}

ssmk_status Check::unsupported(const char *what) { return error(SSMK_UNSUPPORTED, "%s", what); }

bool Check::check_device(const DLTensor *t, const char *name) {
  const DLDevice d = t->device;
  if (first_name_) {
    if (same_device(d, first_device_)) return true;
    error(SSMK_INVALID_ARGUMENT, "%s: must be on the device of %s (%s:%d), got %s:%d", name,
          first_name_, device_name(first_device_.device_type), first_device_.device_id,
          device_name(d.device_type), d.device_id);
    return false;
  }
  first_device_ = d;
  first_name_ = name;
  if (is_host(d.device_type)) return true;
  if (is_cuda(d.device_type) && cuda::built()) {
    device_ = Device::kCuda;
    return true;
  }
  error(SSMK_UNSUPPORTED,
        "%s: is on %s:%d (DLPack device type %d); this build has a backend for %s only", name,
        device_name(d.device_type), d.device_id, int(d.device_type),
        cuda::built() ? "cpu and cuda" : "cpu");
  return false;
}

bool Check::inspect(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
                    unsigned dtypes, Access access, int64_t *strides) {
  if (!check_device(t, name)) return false;

  // dtype
  const DType dtype = dtype_of(t->dtype);
  if (dtype == DType::kNone || !(dtypes & set_of(dtype))) {
    Text want, got;
    add_dtypes(want, dtypes);
    add_dtype(got, t->dtype);
    error(SSMK_INVALID_ARGUMENT, "%s: dtype must be %s, got %s", name, want.s, got.s);
    return false;
  }

  // shape
  if (t->ndim < 0 || t->ndim > 8 || (t->ndim > 0 && !t->shape)) {
    error(SSMK_INVALID_ARGUMENT, "%s: must have a shape of 0 to 8 axes, got ndim %d and shape %s",
          name, t->ndim, t->shape ? "given" : "NULL");
    return false;
  }
  bool fits = size_t(t->ndim) == dims.size();
  for (int k = 0; k < t->ndim; ++k) {
    if (t->shape[k] < 0) {
      error(SSMK_INVALID_ARGUMENT, "%s: sizes must not be negative, got %lld on axis %d", name,
            (long long)t->shape[k], k);
      return false;
    }
    if (fits && dims.begin()[k]->bound() && dims.begin()[k]->value != t->shape[k]) fits = false;
  }
  if (!fits) {
    Text want, got;
    add_dims(want, dims);
    add_shape(got, t);
    error(SSMK_INVALID_ARGUMENT, "%s: shape must be %s, got %s", name, want.s, got.s);
    return false;
  }
  for (int k = 0; k < t->ndim; ++k) dims.begin()[k]->value = t->shape[k];

  // Strides, and the bytes that they span.  The stride of an axis of one element means nothing and
  // is made compact.
  const int64_t item = size_of(dtype);
  int64_t compact = 1, lo = 0, hi = item;
  bool empty = false, sane = true;
  for (int k = t->ndim; k-- > 0;) {
    const int64_t n = t->shape[k];
    strides[k] = t->strides && n > 1 ? t->strides[k] : compact;
    empty |= n == 0;
    // Also of an empty tensor: products of sizes are formed everywhere.
    if (__builtin_mul_overflow(compact, n > 0 ? n : 1, &compact) || compact > INT64_MAX / 4)
      sane = false;
    int64_t reach;
    if (n > 1) {
      if (__builtin_mul_overflow(n - 1, strides[k], &reach) ||
          __builtin_mul_overflow(reach, item, &reach) ||
          __builtin_add_overflow(reach < 0 ? lo : hi, reach, reach < 0 ? &lo : &hi))
        sane = false;
    }
  }
  for (int k = t->ndim; k-- > 0;) empty |= t->shape[k] == 0;
  if (!sane) {
    error(SSMK_INVALID_ARGUMENT, "%s: shape and strides must span less than 2^61 bytes, got more",
          name);
    return false;
  }

  // data
  if (sizes_only_) return true;
  const char *data = t->data ? static_cast<const char *>(t->data) + t->byte_offset : nullptr;
  if (!empty && !data) {
    error(SSMK_INVALID_ARGUMENT, "%s: has no data (NULL); a fake or meta tensor?", name);
    return false;
  }
  const int64_t alignment = dtype == DType::kC64 ? 4 : item;
  if (!empty && reinterpret_cast<uintptr_t>(data) % uintptr_t(alignment)) {
    error(SSMK_INVALID_ARGUMENT,
          "%s: data must be aligned to its items of %lld bytes, got address %p", name,
          (long long)alignment, static_cast<const void *>(data));
    return false;
  }
  if (nseen_ == kMaxTensors) {
    error(SSMK_INVALID_ARGUMENT, "%s: too many tensors", name);
    return false;
  }
  seen_[nseen_++] = {
      t, name, dtype, access, empty ? nullptr : data + lo, empty ? nullptr : data + hi};
  return true;
}

void Check::may_alias(const DLTensor *a, const DLTensor *b) {
  if (!a || !b) return;
  alias_[naliases_][0] = a;
  alias_[naliases_++][1] = b;
}

// The same elements at the same addresses in the same order.
bool Check::same_tensor(const Seen &a, const Seen &b) const {
  const DLTensor &x = *a.tensor, &y = *b.tensor;
  if (a.lo != b.lo || a.hi != b.hi || a.dtype != b.dtype || x.ndim != y.ndim) return false;
  if (static_cast<char *>(x.data) + x.byte_offset != static_cast<char *>(y.data) + y.byte_offset)
    return false;
  int64_t cx = 1, cy = 1;
  for (int k = x.ndim; k-- > 0;) {
    if (x.shape[k] != y.shape[k]) return false;
    if (x.shape[k] > 1 && (x.strides ? x.strides[k] : cx) != (y.strides ? y.strides[k] : cy))
      return false;
    cx *= x.shape[k];
    cy *= y.shape[k];
  }
  return true;
}

void Check::overlaps() {
  if (!ok() || sizes_only_) return;
  for (int i = 0; i < nseen_; ++i) {
    const Seen &a = seen_[i];
    if (a.access != kWrite || a.lo == a.hi) continue;
    if (overlaps_itself(*a.tensor)) {
      error(
          SSMK_INVALID_ARGUMENT,
          "%s: is written, so its elements must not share memory, got strides under which they do",
          a.name);
      return;
    }
    for (int j = 0; j < nseen_; ++j) {
      const Seen &b = seen_[j];
      if (j == i || b.lo == b.hi || a.hi <= b.lo || b.hi <= a.lo) continue;
      bool allowed = false;
      for (int k = 0; k < naliases_; ++k)
        allowed |= (alias_[k][0] == a.tensor && alias_[k][1] == b.tensor) ||
                   (alias_[k][0] == b.tensor && alias_[k][1] == a.tensor);
      if (allowed && same_tensor(a, b)) continue;
      if (tensors_overlap(*a.tensor, *b.tensor)) {
        error(SSMK_INVALID_ARGUMENT,
              "%s: is written, so it must not share memory with %s, got tensors that overlap",
              a.name, b.name);
        return;
      }
    }
  }
}

}  // namespace ssmk
