// SPDX-License-Identifier: MIT
#include <type_traits>

#include "api/mamba3.h"
#include "api/run.h"

namespace ssmk {
namespace {

struct Sizes {
  Dim batch{"batch"}, seqlen{"seqlen"}, nheads{"nheads"}, headdim{"headdim"}, rank{"rank"};
  Dim ngroups{"ngroups"}, dstate{"dstate"}, nangles{"nangles"}, ncaptures{"ncaptures"};
};

// B or C: (batch, seqlen, [rank,] ngroups, dstate).
View<5> projection(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  if (!c.rank_is(t, name, {4, 5}, "(batch, seqlen, [rank,] ngroups, dstate)")) return {};
  if (t->ndim == 5)
    return c.in<5>(t, name, {&d.batch, &d.seqlen, &d.rank, &d.ngroups, &d.dstate}, kFloats);
  if (!d.rank.bound()) d.rank.value = 1;
  c.that(d.rank.value == 1, name, "without a rank axis means rank 1, as in the other projection",
         d.rank.value);
  return spread<5>(c.in<4>(t, name, {&d.batch, &d.seqlen, &d.ngroups, &d.dstate}, kFloats),
                   {0, 1, 3, 4});
}

// (batch, seqlen, nheads, nangles), or without heads.
View<4> rotation(Check &c, Sizes &d, const DLTensor *t) {
  if (t && t->ndim == 3)
    return spread<4>(c.in<3>(t, "angles", {&d.batch, &d.seqlen, &d.nangles}, kFloats), {0, 1, 3});
  return c.in<4>(t, "angles", {&d.batch, &d.seqlen, &d.nheads, &d.nangles}, kFloats);
}

// The four states at one moment: as arguments, by name.
struct StateArgs {
  const DLTensor *h, *angle, *k, *v;
  const char *h_name, *angle_name, *k_name, *v_name;
  bool written;
};

HeadStates states(Check &c, Sizes &d, const Mamba3Args &parts, const StateArgs &a, Dim &entries) {
  const auto take = [&](auto rank, const DLTensor *t, const char *name,
                        std::initializer_list<Dim *> dims) {
    return a.written ? c.out<rank>(t, name, dims, kFloats) : c.in<rank>(t, name, dims, kFloats);
  };
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  only_with_parts(c, parts, {a.angle, a.k, a.v, a.angle_name, a.k_name, a.v_name});
  HeadStates s;
  s.h = take(four, a.h, a.h_name, {&entries, &d.nheads, &d.headdim, &d.dstate});
  s.angle = take(three, a.angle, a.angle_name, {&entries, &d.nheads, &d.nangles});
  s.k = take(four, a.k, a.k_name, {&entries, &d.rank, &d.nheads, &d.dstate});
  s.v = take(three, a.v, a.v_name, {&entries, &d.nheads, &d.headdim});
  return s;
}

const DLTensor *any_of(std::initializer_list<const DLTensor *> tensors) {
  for (const DLTensor *t : tensors)
    if (t) return t;
  return nullptr;
}

void read_captures(Check &c, Sizes &d, const ssmk_ssd_chunk_args &a, const Mamba3Args &parts,
                   SsdChunkProblem *p) {
  const StateArgs captured = {a.captured_states,   a.captured_angle_states, a.captured_k_states,
                              a.captured_v_states, "captured_states",       "captured_angle_states",
                              "captured_k_states", "captured_v_states",     true};
  const DLTensor *any = any_of({captured.h, captured.angle, captured.k, captured.v});
  if (!any)
    c.forbidden(a.capture_positions, "capture_positions", "without captured_states to write to");
  if (any && !a.capture_positions)
    c.error(SSMK_INVALID_ARGUMENT, "capture_positions: is required with captured states, got NULL");
  p->capture_positions =
      c.in<1>(a.capture_positions, "capture_positions", {&d.ncaptures}, kIndices);
  p->captured = states(c, d, parts, captured, d.ncaptures);
  check_range(c, p->capture_positions, "capture_positions", d.ncaptures.value, INT64_MIN,
              d.batch.value * d.seqlen.value - 1, "below batch * seqlen");
}

void read_problem(Check &c, const ssmk_ssd_chunk_args *user, SsdChunkProblem *p) {
  ssmk_ssd_chunk_args a;
  c.args(user, &a);
  Sizes d;

  // shapes
  c.required(a.x, "x");
  c.required(a.dt, "dt");
  c.required(a.B, "B");
  c.required(a.C, "C");
  c.required(a.out, "out");
  if (!a.A && !a.adt)
    c.error(SSMK_INVALID_ARGUMENT, "A: one of A and adt is required, got neither");
  if (a.A) c.forbidden(a.adt, "adt", "together with A");
  const std::initializer_list<Dim *> tokens = {&d.batch, &d.seqlen, &d.nheads};
  const std::initializer_list<Dim *> rows = {&d.batch, &d.seqlen, &d.nheads, &d.headdim};
  p->x = c.in<4>(a.x, "x", rows, kFloats);
  p->dt = c.in<3>(a.dt, "dt", tokens, kFloats);
  p->A = c.in<1>(a.A, "A", {&d.nheads}, kFloats);
  p->adt = c.in<3>(a.adt, "adt", tokens, kFloats);
  p->B = projection(c, d, a.B, "B");
  p->C = projection(c, d, a.C, "C");
  c.multiple(d.nheads, d.ngroups);
  c.that(d.rank.value >= 1, "B", "rank must be at least 1", d.rank.value);
  if (a.D && a.D->ndim == 2) {
    p->D = c.in<2>(a.D, "D", {&d.nheads, &d.headdim}, kFloats);
  } else {
    p->D = spread<2>(c.in<1>(a.D, "D", {&d.nheads}, kFloats), {0});
  }
  p->z = c.in<4>(a.z, "z", rows, kFloats);
  p->dt_bias = c.in<1>(a.dt_bias, "dt_bias", {&d.nheads}, kFloats);

  // Mamba-3
  p->trap = c.in<3>(a.trap, "trap", tokens, kFloats);
  p->angles = rotation(c, d, a.angles);
  const Mamba3Args parts = {a.B_bias, a.C_bias, a.mimo_x, a.mimo_z,   a.mimo_out, a.norm_weight,
                            a.z,      a.trap,   a.angles, a.norm_eps, a.rotary,   a.flags};
  p->mamba3 = mamba3(c, parts, d.nheads, d.rank, d.headdim, d.dstate, d.nangles);
  if (d.rank.value > 1 && !a.mimo_out) {
    p->out = c.out<5>(a.out, "out", {&d.batch, &d.seqlen, &d.rank, &d.nheads, &d.headdim}, kFloats);
  } else {
    p->out = spread<5>(c.out<4>(a.out, "out", rows, kFloats), {0, 1, 3, 4});
  }

  // sequences and states
  const StateArgs initial = {a.initial_states,   a.initial_angle_states, a.initial_k_states,
                             a.initial_v_states, "initial_states",       "initial_angle_states",
                             "initial_k_states", "initial_v_states",     false};
  const StateArgs final = {a.final_states,   a.final_angle_states, a.final_k_states,
                           a.final_v_states, "final_states",       "final_angle_states",
                           "final_k_states", "final_v_states",     true};
  const DLTensor *any_final = any_of({final.h, final.angle, final.k, final.v});
  Dim slots{""};
  p->seqs = sequences(c,
                      {a.cu_seqlens, a.seq_idx, a.state_indices, a.has_initial_state,
                       any_of({initial.h, initial.angle, initial.k, initial.v}), any_final},
                      d.batch, d.seqlen, slots);
  c.may_alias(a.initial_states, a.final_states);
  c.may_alias(a.initial_angle_states, a.final_angle_states);
  c.may_alias(a.initial_k_states, a.final_k_states);
  c.may_alias(a.initial_v_states, a.final_v_states);
  p->initial = states(c, d, parts, initial, slots);
  p->final = states(c, d, parts, final, slots);
  finish_sequences(c, p->seqs, slots, d.seqlen, a.flags, a.pad_slot, any_final != nullptr);
  read_captures(c, d, a, parts, p);

  // scalars
  p->dt_transform = dt_transform(c, a.dt_softplus, a.dt_min, a.dt_max);
  c.that(a.chunk_size >= 0, "chunk_size", "must not be negative", a.chunk_size);
  only_flags(c, a.flags, SSMK_BATCH_INVARIANT | SSMK_PAD_SLOT | SSMK_TRAP_SIGMOID);
  p->batch_invariant = (a.flags & SSMK_BATCH_INVARIANT) != 0;
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();

  p->batch = d.batch.value;
  p->seqlen = d.seqlen.value;
  p->nheads = d.nheads.value;
  p->headdim = d.headdim.value;
  p->ngroups = d.ngroups.value;
  p->dstate = d.dstate.value;
  p->ncaptures = a.capture_positions ? d.ncaptures.value : 0;
  p->chunk_size = a.chunk_size;
}

constexpr Operation<ssmk_ssd_chunk_args, SsdChunkProblem> kOperation = {
    "ssd_chunk", read_problem, cpu::ssd_chunk_workspace, &cpu::Kernels::ssd_chunk,
    &cuda::Kernels::ssd_chunk};

}  // namespace
}  // namespace ssmk

extern "C" {

SSMK_API ssmk_status ssmk_ssd_chunk(const ssmk_ssd_chunk_args *args) {
  return ssmk::kOperation.run(args);
}

SSMK_API ssmk_status ssmk_ssd_chunk_workspace(const ssmk_ssd_chunk_args *args, uint64_t *bytes) {
  return ssmk::kOperation.workspace(args, bytes);
}

// For tests, not in ssmk.h: which CUDA path a call would take on a GPU of a compute capability (90
// for 9.0), after those that would not and why.  Nothing runs; no device is needed.  NULL without
// CUDA in the build, or if the arguments are wrong.
SSMK_API const char *ssmk_debug_ssd_chunk_path(const ssmk_ssd_chunk_args *args,
                                               int32_t capability) {
  ssmk::Check c("ssd_chunk", false);
  ssmk::SsdChunkProblem problem;
  ssmk::read_problem(c, args, &problem);
  const auto path = ssmk::cuda::kernels().ssd_chunk_path;
  return c.ok() && path ? path(problem, capability) : nullptr;
}

}  // extern "C"
