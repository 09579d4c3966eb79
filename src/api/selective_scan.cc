// SPDX-License-Identifier: MIT
#include "api/run.h"

namespace ssmk {
namespace {

// A view of complex64, or of (re, im) pairs along its last axis, becomes one of float32 parts.
template <int Rank>
ComplexView<Rank> parts(View<Rank> v, int last_axis) {
  ComplexView<Rank> r;
  static_cast<View<Rank> &>(r) = v;
  if (v.dtype == DType::kC64) {
    for (int64_t &s : r.stride) s *= 2;
    r.dtype = DType::kF32;
    r.imag = 1;
  } else if (last_axis >= 0) {
    r.imag = v.stride[last_axis];
    r.stride[last_axis] *= 2;
  }
  return r;
}

struct Sizes {
  Dim batch{"batch"}, dim{"dim"}, seqlen{"seqlen"}, ngroups{"ngroups"}, dstate{"dstate"};
};

// B or C: constant, or per token with or without groups, each real or complex.  Axes of the result
// as in the Problem.
ComplexView<4> projection(Check &c, const DLTensor *t, const char *name, Sizes &d, bool complex,
                          bool channels_last, bool *varies) {
  *varies = t && t->ndim != 2;
  if (!c.rank_is(t, name, {2, 3, 4},
                 channels_last ? "(dim, dstate) or (batch, seqlen, [ngroups,] dstate)"
                               : "(dim, dstate) or (batch, [ngroups,] dstate, seqlen)"))
    return {};
  if (!*varies)
    return parts(
        spread<4>(c.in<2>(t, name, {&d.dim, &d.dstate}, complex ? kComplex : kFloats), {1, 2}), -1);

  // The last axis may hold pairs: read its real parts, the imaginary ones stand one further.
  const bool pairs = complex && t->dtype.code != kDLComplex;
  Dim twice_seqlen{"2 seqlen", 2 * d.seqlen.value}, twice_dstate{"2 dstate", 2 * d.dstate.value};
  Dim *const n = pairs && channels_last ? &twice_dstate : &d.dstate;
  Dim *const l = pairs && !channels_last ? &twice_seqlen : &d.seqlen;
  const unsigned dtypes = complex && !pairs ? kComplex : kFloats;
  View<4> v;
  if (t->ndim == 4) {
    v = channels_last
            ? spread<4>(c.in<4>(t, name, {&d.batch, l, &d.ngroups, n}, dtypes), {0, 3, 1, 2})
            : c.in<4>(t, name, {&d.batch, &d.ngroups, n, l}, dtypes);
  } else {
    if (!d.ngroups.bound()) d.ngroups.value = 1;
    c.that(d.ngroups.value == 1, name,
           "without an ngroups axis means one group, as in the other projection", d.ngroups.value);
    v = channels_last ? spread<4>(c.in<3>(t, name, {&d.batch, l, n}, dtypes), {0, 3, 2})
                      : spread<4>(c.in<3>(t, name, {&d.batch, n, l}, dtypes), {0, 2, 3});
  }
  return parts(v, !pairs ? -1 : channels_last ? 2 : 3);
}

void read_problem(Check &c, const ssmk_selective_scan_args *user, SelectiveScanProblem *p) {
  ssmk_selective_scan_args a;
  c.args(user, &a);
  Sizes d;
  const bool last = a.channels_last != 0;
  const auto tokens = [&](const DLTensor *t, const char *name, bool write) {
    const std::initializer_list<Dim *> dl = {&d.batch, &d.dim, &d.seqlen},
                                       ld = {&d.batch, &d.seqlen, &d.dim};
    const View<3> v = write ? c.out<3>(t, name, last ? ld : dl, kFloats)
                            : c.in<3>(t, name, last ? ld : dl, kFloats);
    return last ? spread<3>(v, {0, 2, 1}) : v;
  };

  // shapes
  c.required(a.x, "x");
  c.required(a.dt, "dt");
  c.required(a.A, "A");
  c.required(a.B, "B");
  c.required(a.C, "C");
  c.required(a.out, "out");
  p->x = tokens(a.x, "x", false);
  p->dt = tokens(a.dt, "dt", false);
  const View<2> A = c.in<2>(a.A, "A", {&d.dim, &d.dstate}, kFloats | kComplex);
  p->complex = A.dtype == DType::kC64;
  p->A = parts(A, -1);
  p->B = projection(c, a.B, "B", d, p->complex, last, &p->B_varies);
  p->C = projection(c, a.C, "C", d, p->complex, last, &p->C_varies);
  if (!d.ngroups.bound()) d.ngroups.value = 1;
  c.multiple(d.dim, d.ngroups);
  p->D = c.in<1>(a.D, "D", {&d.dim}, kFloats);
  p->z = tokens(a.z, "z", false);
  p->dt_bias = c.in<1>(a.dt_bias, "dt_bias", {&d.dim}, kFloats);
  p->out = tokens(a.out, "out", true);

  // sequences and states
  Dim slots{""};
  p->seqs = sequences(c,
                      {a.cu_seqlens, a.seq_idx, a.state_indices, a.has_initial_state,
                       a.initial_states, a.final_states},
                      d.batch, d.seqlen, slots);
  c.may_alias(a.initial_states, a.final_states);
  const unsigned state_dtypes = p->complex ? kComplex : kFloats;
  p->initial_states = parts(
      c.in<3>(a.initial_states, "initial_states", {&slots, &d.dim, &d.dstate}, state_dtypes), -1);
  p->final_states = parts(
      c.out<3>(a.final_states, "final_states", {&slots, &d.dim, &d.dstate}, state_dtypes), -1);
  finish_sequences(c, p->seqs, slots, d.seqlen, a.flags, a.pad_slot, a.final_states != nullptr);

  // scalars
  p->dt_transform = dt_transform(c, a.dt_softplus, a.dt_min, a.dt_max);
  only_flags(c, a.flags, SSMK_BATCH_INVARIANT | SSMK_PAD_SLOT);
  p->batch_invariant = (a.flags & SSMK_BATCH_INVARIANT) != 0;
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();

  p->batch = d.batch.value;
  p->dim = d.dim.value;
  p->seqlen = d.seqlen.value;
  p->ngroups = d.ngroups.value;
  p->dstate = d.dstate.value;
}

constexpr Operation<ssmk_selective_scan_args, SelectiveScanProblem> kOperation = {
    "selective_scan", read_problem, cpu::selective_scan_workspace, &cpu::Kernels::selective_scan};

}  // namespace
}  // namespace ssmk

extern "C" {

SSMK_API ssmk_status ssmk_selective_scan(const ssmk_selective_scan_args *args) {
  return ssmk::kOperation.run(args);
}

SSMK_API ssmk_status ssmk_selective_scan_workspace(const ssmk_selective_scan_args *args,
                                                   uint64_t *bytes) {
  return ssmk::kOperation.workspace(args, bytes);
}

}  // extern "C"
