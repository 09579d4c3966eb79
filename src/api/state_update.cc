// SPDX-License-Identifier: MIT
#include <type_traits>

#include "api/run.h"

namespace ssmk {
namespace {

struct Sizes {
  Dim batch{"batch"}, ntokens{"T"}, nheads{"nheads"}, headdim{"headdim"}, ngroups{"ngroups"},
      dstate{"dstate"};
  Dim dim{"dim"}, entries{"entries"}, rows{"rows"};
  bool heads = false;       // the rank of state says so
  bool has_tokens = false;  // the rank of x says so
};

// (batch, [T,] nheads, headdim), tied (batch, [T,] nheads) if `tied_ok`, or without heads (batch,
// [T,] dim).
View<4> per_row(Check &c, Sizes &d, const DLTensor *t, const char *name, bool tied_ok,
                bool write = false) {
  if (!t || !c.ok()) return {};
  const auto take = [&](auto rank, std::initializer_list<Dim *> dims) {
    return write ? c.out<rank>(t, name, dims, kFloats) : c.in<rank>(t, name, dims, kFloats);
  };
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  const bool tied = d.heads && tied_ok && t->ndim == (d.has_tokens ? 3 : 2);
  Dim *const last = d.heads ? &d.nheads : &d.dim;
  const int last_axis = d.heads ? 2 : 3;
  if (!d.heads || tied)
    return d.has_tokens ? spread<4>(take(three, {&d.batch, &d.ntokens, last}), {0, 1, last_axis})
                        : spread<4>(take(two, {&d.batch, last}), {0, last_axis});
  return d.has_tokens ? take(four, {&d.batch, &d.ntokens, &d.nheads, &d.headdim})
                      : spread<4>(take(three, {&d.batch, &d.nheads, &d.headdim}), {0, 2, 3});
}

// (batch, [T,] ngroups, dstate), and without heads also (batch, [T,] dstate).
View<4> projection(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  const int base = d.has_tokens ? 3 : 2;
  const bool fits =
      d.heads ? c.rank_is(t, name, {base + 1},
                          d.has_tokens ? "(batch, T, ngroups, dstate)" : "(batch, ngroups, dstate)")
              : c.rank_is(
                    t, name, {base, base + 1},
                    d.has_tokens ? "(batch, T, [ngroups,] dstate)" : "(batch, [ngroups,] dstate)");
  if (!fits) return {};
  if (t->ndim > base)
    return d.has_tokens
               ? c.in<4>(t, name, {&d.batch, &d.ntokens, &d.ngroups, &d.dstate}, kFloats)
               : spread<4>(c.in<3>(t, name, {&d.batch, &d.ngroups, &d.dstate}, kFloats), {0, 2, 3});
  if (!d.ngroups.bound()) d.ngroups.value = 1;
  c.that(d.ngroups.value == 1, name,
         "without an ngroups axis means one group, as in the other projection", d.ngroups.value);
  return d.has_tokens
             ? spread<4>(c.in<3>(t, name, {&d.batch, &d.ntokens, &d.dstate}, kFloats), {0, 1, 3})
             : spread<4>(c.in<2>(t, name, {&d.batch, &d.dstate}, kFloats), {0, 3});
}

// D or dt_bias: (nheads,), (nheads, headdim), or without heads (dim,).
View<2> per_head(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  if (t && d.heads && t->ndim == 2) return c.in<2>(t, name, {&d.nheads, &d.headdim}, kFloats);
  return spread<2>(c.in<1>(t, name, {d.heads ? &d.nheads : &d.dim}, kFloats), {d.heads ? 0 : 1});
}

// A: (nheads, headdim, dstate), tied (nheads,), or without heads (dim, dstate).
View<3> decay(Check &c, Sizes &d, const DLTensor *t) {
  if (t && d.heads && t->ndim != 1)
    return c.in<3>(t, "A", {&d.nheads, &d.headdim, &d.dstate}, kFloats);
  return d.heads ? spread<3>(c.in<1>(t, "A", {&d.nheads}, kFloats), {0})
                 : spread<3>(c.in<2>(t, "A", {&d.dim, &d.dstate}, kFloats), {1, 2});
}

// Without heads the channels of group g are the rows of head g: (dim) is (ngroups, dim / ngroups)
// to the backends.
template <int Rank>
void split_channels(View<Rank> &v, int head_axis, int64_t headdim) {
  v.stride[head_axis] = v.stride[head_axis + 1] * headdim;
}

void read_slots(Check &c, Sizes &d, const ssmk_state_update_args &a, Slots *s) {
  const auto slot_view = [&](const DLTensor *t, const char *name, Dim *second, bool *two) {
    *two = t && t->ndim == 2;
    if (!c.rank_is(t, name, {1, 2}, "(batch,), or (batch, K) to read from, (batch, T) to write to"))
      return View<2>{};
    return *two ? c.in<2>(t, name, {&d.batch, second}, kIndices)
                : spread<2>(c.in<1>(t, name, {&d.batch}, kIndices), {0});
  };
  Dim choices{"K"};
  bool chosen, per_token;
  s->in = slot_view(a.state_indices, "state_indices", &choices, &chosen);
  s->out = slot_view(a.state_indices_out, "state_indices_out", &d.ntokens, &per_token);
  s->in_choices = chosen ? choices.value : 1;
  s->in_chosen = chosen;
  s->out_per_token = per_token;
  s->num_tokens = c.in<1>(a.num_tokens, "num_tokens", {&d.batch}, kIndices);
  s->num_accepted = c.in<1>(a.num_accepted_tokens, "num_accepted_tokens", {&d.batch}, kIndices);
  s->intermediate_indices =
      c.in<1>(a.intermediate_indices, "intermediate_indices", {&d.batch}, kIndices);
  s->pad = pad_rule(a.flags, a.pad_slot, d.entries.value);
  s->keep_state = (a.flags & SSMK_KEEP_STATE) != 0;
  if (!c.ok()) return;

  // What needs what.
  if (chosen) {
    c.that(choices.value >= 1, "state_indices", "must have at least one column", choices.value);
    if (!a.num_accepted_tokens && choices.value > 1)
      c.error(SSMK_INVALID_ARGUMENT,
              "num_accepted_tokens: is required with state_indices of %lld columns, got NULL",
              (long long)choices.value);
  } else if (a.num_accepted_tokens && !a.intermediate_states) {
    c.forbidden(a.num_accepted_tokens, "num_accepted_tokens",
                "without 2-D state_indices or intermediate_states to choose from");
  }
  if (!a.intermediate_states)
    c.forbidden(a.intermediate_indices, "intermediate_indices", "without intermediate_states");
  if (s->keep_state) c.forbidden(a.state_indices_out, "state_indices_out", "with SSMK_KEEP_STATE");
  if (!a.state_indices && c.ok() && d.entries.value < d.batch.value)
    c.error(
        SSMK_INVALID_ARGUMENT,
        "state: without state_indices it must have a slot for each of the batch = %lld rows, got "
        "entries = %lld",
        (long long)d.batch.value, (long long)d.entries.value);
  if (a.intermediate_states && !a.intermediate_indices && c.ok() && d.rows.value < d.batch.value)
    c.error(SSMK_INVALID_ARGUMENT,
            "intermediate_states: without intermediate_indices it must have a row for each of the "
            "batch = %lld rows, got %lld",
            (long long)d.batch.value, (long long)d.rows.value);

  // What only the data can tell.
  check_range(c, s->num_tokens, "num_tokens", d.batch.value, 0, d.ntokens.value, "0 to T");
  check_range(c, s->num_accepted, "num_accepted_tokens", d.batch.value, 0,
              chosen ? choices.value : d.ntokens.value,
              chosen ? "0 to the columns of state_indices" : "0 to T of intermediate_states");
  check_slots(
      c,
      {s->in, s->out, s->num_accepted, d.batch.value, s->in_choices,
       per_token ? d.ntokens.value : 1, !s->keep_state, "state_indices", "state_indices_out"},
      s->pad);
  if (s->intermediate_indices.given()) {
    const View<2> rows = spread<2>(s->intermediate_indices, {0});
    PadRule no_pad_slot;
    no_pad_slot.entries = d.rows.value;
    const char *name = "intermediate_indices";
    check_slots(c, {rows, rows, {}, d.batch.value, 1, 1, true, name, name}, no_pad_slot);
  }
}

void read_problem(Check &c, const ssmk_state_update_args *user, StateUpdateProblem *p) {
  ssmk_state_update_args a;
  c.args(user, &a);
  Sizes d;

  // Mamba-3 is declared, not built.
  if (c.ok() &&
      (a.adt || a.trap || a.angles || a.B_bias || a.C_bias || a.mimo_x || a.mimo_z || a.mimo_out ||
       a.norm_weight || a.angle_state || a.k_state || a.v_state || a.intermediate_angle_states ||
       a.intermediate_k_states || a.intermediate_v_states || (a.flags & SSMK_TRAP_SIGMOID)))
    c.unsupported(
        "Mamba-3 arguments (adt, trap, angles, ...) are declared but not built in this version, on "
        "any backend");

  // shapes
  c.required(a.state, "state");
  c.required(a.x, "x");
  c.required(a.dt, "dt");
  c.required(a.A, "A");
  c.required(a.B, "B");
  c.required(a.C, "C");
  c.required(a.out, "out");
  if (!c.rank_is(a.state, "state", {3, 4},
                 "(entries, dim, dstate) or (entries, nheads, headdim, dstate)"))
    return;
  d.heads = a.state->ndim == 4;
  const int row_axes = d.heads ? 3 : 2;
  if (!c.rank_is(a.x, "x", {row_axes, row_axes + 1},
                 d.heads ? "(batch, [T,] nheads, headdim)" : "(batch, [T,] dim)"))
    return;
  d.has_tokens = a.x->ndim == row_axes + 1;
  if (!d.has_tokens) d.ntokens.value = 1;
  if (d.heads) {
    p->state = c.out<4>(a.state, "state", {&d.entries, &d.nheads, &d.headdim, &d.dstate}, kFloats);
  } else {
    p->state =
        spread<4>(c.out<3>(a.state, "state", {&d.entries, &d.dim, &d.dstate}, kFloats), {0, 2, 3});
  }
  p->x = per_row(c, d, a.x, "x", false);
  p->dt = per_row(c, d, a.dt, "dt", true);
  p->A = decay(c, d, a.A);
  p->B = projection(c, d, a.B, "B");
  p->C = projection(c, d, a.C, "C");
  c.multiple(d.heads ? d.nheads : d.dim, d.ngroups);
  p->D = per_head(c, d, a.D, "D");
  p->z = per_row(c, d, a.z, "z", false);
  p->dt_bias = per_head(c, d, a.dt_bias, "dt_bias");
  if (a.intermediate_states && c.ok()) {
    if (d.heads) {
      p->intermediate = c.out<5>(a.intermediate_states, "intermediate_states",
                                 {&d.rows, &d.ntokens, &d.nheads, &d.headdim, &d.dstate}, kFloats);
    } else {
      p->intermediate = spread<5>(c.out<4>(a.intermediate_states, "intermediate_states",
                                           {&d.rows, &d.ntokens, &d.dim, &d.dstate}, kFloats),
                                  {0, 1, 3, 4});
    }
  }
  p->out = per_row(c, d, a.out, "out", false, true);

  // slots and scalars
  read_slots(c, d, a, &p->slots);
  p->slots.intermediate_entries = d.rows.value;
  p->dt_transform = dt_transform(c, a.dt_softplus, a.dt_min, a.dt_max);
  only_flags(c, a.flags,
             SSMK_PAD_SLOT | SSMK_KEEP_STATE | SSMK_TRAP_SIGMOID | SSMK_BATCH_INVARIANT);
  c.that(a.reserved == 0, "reserved", "must be 0", a.reserved);
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();
  if (!c.ok()) return;

  p->batch = d.batch.value;
  p->ntokens = d.ntokens.value;
  p->ngroups = d.ngroups.value;
  p->dstate = d.dstate.value;
  p->nheads = d.heads ? d.nheads.value : d.ngroups.value;
  p->headdim = d.heads ? d.headdim.value : d.dim.value / d.ngroups.value;
  if (!d.heads) {
    for (View<4> *v : {&p->x, &p->dt, &p->z, &p->out}) split_channels(*v, 2, p->headdim);
    for (View<2> *v : {&p->D, &p->dt_bias}) split_channels(*v, 0, p->headdim);
    split_channels(p->A, 0, p->headdim);
    split_channels(p->state, 1, p->headdim);
    split_channels(p->intermediate, 2, p->headdim);
  }
}

constexpr Operation<ssmk_state_update_args, StateUpdateProblem> kOperation = {
    "state_update", read_problem, cpu::state_update_workspace, &cpu::Kernels::state_update};

}  // namespace
}  // namespace ssmk

extern "C" {

SSMK_API ssmk_status ssmk_state_update(const ssmk_state_update_args *args) {
  return ssmk::kOperation.run(args);
}

SSMK_API ssmk_status ssmk_state_update_workspace(const ssmk_state_update_args *args,
                                                 uint64_t *bytes) {
  return ssmk::kOperation.workspace(args, bytes);
}

}  // extern "C"
