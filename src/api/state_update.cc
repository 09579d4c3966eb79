// SPDX-License-Identifier: MIT
#include <type_traits>

#include "api/mamba3.h"
#include "api/run.h"

namespace ssmk {
namespace {

struct Sizes {
  Dim batch{"batch"}, ntokens{"T"}, nheads{"nheads"}, headdim{"headdim"}, ngroups{"ngroups"},
      dstate{"dstate"};
  Dim dim{"dim"}, entries{"entries"}, rows{"rows"}, rank{"rank"}, nangles{"nangles"};
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

// One value a head and token: (batch, [T,] nheads).
View<3> per_token(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  return d.has_tokens ? c.in<3>(t, name, {&d.batch, &d.ntokens, &d.nheads}, kFloats)
                      : spread<3>(c.in<2>(t, name, {&d.batch, &d.nheads}, kFloats), {0, 2});
}

// (batch, [T,] nheads, nangles), or (batch, [T,] nangles) for all heads.
View<4> angles(Check &c, Sizes &d, const DLTensor *t) {
  const int base = d.has_tokens ? 3 : 2;
  if (!c.rank_is(t, "angles", {base, base + 1},
                 d.has_tokens ? "(batch, T, [nheads,] nangles)" : "(batch, [nheads,] nangles)"))
    return {};
  if (t->ndim == base)
    return d.has_tokens
               ? spread<4>(c.in<3>(t, "angles", {&d.batch, &d.ntokens, &d.nangles}, kFloats),
                           {0, 1, 3})
               : spread<4>(c.in<2>(t, "angles", {&d.batch, &d.nangles}, kFloats), {0, 3});
  return d.has_tokens ? c.in<4>(t, "angles", {&d.batch, &d.ntokens, &d.nheads, &d.nangles}, kFloats)
                      : spread<4>(c.in<3>(t, "angles", {&d.batch, &d.nheads, &d.nangles}, kFloats),
                                  {0, 2, 3});
}

// B or C without heads: (batch, [T,] [ngroups,] dstate).
View<5> headless_projection(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  const int base = d.has_tokens ? 3 : 2;
  if (!c.rank_is(t, name, {base, base + 1},
                 d.has_tokens ? "(batch, T, [ngroups,] dstate)" : "(batch, [ngroups,] dstate)"))
    return {};
  if (t->ndim > base)
    return d.has_tokens
               ? spread<5>(c.in<4>(t, name, {&d.batch, &d.ntokens, &d.ngroups, &d.dstate}, kFloats),
                           {0, 1, 3, 4})
               : spread<5>(c.in<3>(t, name, {&d.batch, &d.ngroups, &d.dstate}, kFloats), {0, 3, 4});
  if (!d.ngroups.bound()) d.ngroups.value = 1;
  c.that(d.ngroups.value == 1, name,
         "without an ngroups axis means one group, as in the other projection", d.ngroups.value);
  return d.has_tokens
             ? spread<5>(c.in<3>(t, name, {&d.batch, &d.ntokens, &d.dstate}, kFloats), {0, 1, 4})
             : spread<5>(c.in<2>(t, name, {&d.batch, &d.dstate}, kFloats), {0, 4});
}

// B or C: with heads (batch, [T,] [rank,] ngroups, dstate).
View<5> projection(Check &c, Sizes &d, const DLTensor *t, const char *name) {
  if (!d.heads) return headless_projection(c, d, t, name);
  const int base = d.has_tokens ? 4 : 3;
  if (!c.rank_is(t, name, {base, base + 1},
                 d.has_tokens ? "(batch, T, [rank,] ngroups, dstate)"
                              : "(batch, [rank,] ngroups, dstate)"))
    return {};
  if (t->ndim > base)
    return d.has_tokens
               ? c.in<5>(t, name, {&d.batch, &d.ntokens, &d.rank, &d.ngroups, &d.dstate}, kFloats)
               : spread<5>(c.in<4>(t, name, {&d.batch, &d.rank, &d.ngroups, &d.dstate}, kFloats),
                           {0, 2, 3, 4});
  if (!d.rank.bound()) d.rank.value = 1;
  c.that(d.rank.value == 1, name, "without a rank axis means rank 1, as in the other projection",
         d.rank.value);
  return d.has_tokens
             ? spread<5>(c.in<4>(t, name, {&d.batch, &d.ntokens, &d.ngroups, &d.dstate}, kFloats),
                         {0, 1, 3, 4})
             : spread<5>(c.in<3>(t, name, {&d.batch, &d.ngroups, &d.dstate}, kFloats), {0, 3, 4});
}

// out: as x, or with an axis of ranks that nothing sums up.
View<5> output(Check &c, Sizes &d, const ssmk_state_update_args &a) {
  if (d.rank.value <= 1 || a.mimo_out)
    return spread<5>(per_row(c, d, a.out, "out", false, true), {0, 1, 3, 4});
  return d.has_tokens ? c.out<5>(a.out, "out",
                                 {&d.batch, &d.ntokens, &d.rank, &d.nheads, &d.headdim}, kFloats)
                      : spread<5>(c.out<4>(a.out, "out", {&d.batch, &d.rank, &d.nheads, &d.headdim},
                                           kFloats),
                                  {0, 2, 3, 4});
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

// The parts of Mamba-3 beside B, C and out, and their states.
void read_mamba3(Check &c, Sizes &d, const ssmk_state_update_args &a, StateUpdateProblem *p) {
  if (!d.heads) {
    constexpr const char *kWhy = "without heads: state must have 4 axes for Mamba-3";
    c.forbidden(a.adt, "adt", kWhy);
    c.forbidden(a.trap, "trap", kWhy);
    c.forbidden(a.angles, "angles", kWhy);
    c.forbidden(a.B_bias, "B_bias", kWhy);
    c.forbidden(a.C_bias, "C_bias", kWhy);
    c.forbidden(a.mimo_x, "mimo_x", kWhy);
    c.forbidden(a.mimo_z, "mimo_z", kWhy);
    c.forbidden(a.mimo_out, "mimo_out", kWhy);
    c.forbidden(a.norm_weight, "norm_weight", kWhy);
  }
  const Mamba3Args parts = {a.B_bias, a.C_bias, a.mimo_x, a.mimo_z,   a.mimo_out, a.norm_weight,
                            a.z,      a.trap,   a.angles, a.norm_eps, a.rotary,   a.flags};
  only_with_parts(c, parts,
                  {a.angle_state, a.k_state, a.v_state, "angle_state", "k_state", "v_state"});
  only_with_parts(c, parts,
                  {a.intermediate_angle_states, a.intermediate_k_states, a.intermediate_v_states,
                   "intermediate_angle_states", "intermediate_k_states", "intermediate_v_states"});
  if (!c.ok() || !d.heads) return;

  p->adt = per_token(c, d, a.adt, "adt");
  p->trap = per_token(c, d, a.trap, "trap");
  p->angles = angles(c, d, a.angles);
  p->mamba3 = mamba3(c, parts, d.nheads, d.rank, d.headdim, d.dstate, d.nangles);
  if (a.angles) {
    constexpr const char *kWhy = "must be one value a head with angles (its number of axes)";
    c.that(a.dt->ndim == (d.has_tokens ? 3 : 2), "dt", kWhy, a.dt->ndim);
    c.that(!a.dt_bias || a.dt_bias->ndim == 1, "dt_bias", kWhy, a.dt_bias ? a.dt_bias->ndim : 0);
    c.required(a.angle_state, "angle_state");
  }
  if (a.trap) {
    c.required(a.k_state, "k_state");
    c.required(a.v_state, "v_state");
  }
  p->angle_state =
      c.out<3>(a.angle_state, "angle_state", {&d.entries, &d.nheads, &d.nangles}, kFloats);
  p->k_state = c.out<4>(a.k_state, "k_state", {&d.entries, &d.rank, &d.nheads, &d.dstate}, kFloats);
  p->v_state = c.out<3>(a.v_state, "v_state", {&d.entries, &d.nheads, &d.headdim}, kFloats);

  // A row goes back to all of its states or to none.
  if (!a.intermediate_states) {
    constexpr const char *kAlone = "without intermediate_states";
    c.forbidden(a.intermediate_angle_states, "intermediate_angle_states", kAlone);
    c.forbidden(a.intermediate_k_states, "intermediate_k_states", kAlone);
    c.forbidden(a.intermediate_v_states, "intermediate_v_states", kAlone);
    return;
  }
  if (a.angles) c.required(a.intermediate_angle_states, "intermediate_angle_states");
  if (a.trap) c.required(a.intermediate_k_states, "intermediate_k_states");
  if (a.trap) c.required(a.intermediate_v_states, "intermediate_v_states");
  p->intermediate_angle = c.out<4>(a.intermediate_angle_states, "intermediate_angle_states",
                                   {&d.rows, &d.ntokens, &d.nheads, &d.nangles}, kFloats);
  p->intermediate_k = c.out<5>(a.intermediate_k_states, "intermediate_k_states",
                               {&d.rows, &d.ntokens, &d.rank, &d.nheads, &d.dstate}, kFloats);
  p->intermediate_v = c.out<4>(a.intermediate_v_states, "intermediate_v_states",
                               {&d.rows, &d.ntokens, &d.nheads, &d.headdim}, kFloats);
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

  // shapes
  c.required(a.state, "state");
  c.required(a.x, "x");
  c.required(a.dt, "dt");
  if (!a.adt) c.required(a.A, "A");
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
  if (a.adt) c.forbidden(a.A, "A", "together with adt: it is the log decay itself");
  p->A = decay(c, d, a.A);
  p->B = projection(c, d, a.B, "B");
  p->C = projection(c, d, a.C, "C");
  c.multiple(d.heads ? d.nheads : d.dim, d.ngroups);
  c.that(!d.rank.bound() || d.rank.value > 0, "B", "rank must be at least 1", d.rank.value);
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
  read_mamba3(c, d, a, p);
  p->out = output(c, d, a);

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
    for (View<4> *v : {&p->x, &p->dt, &p->z}) split_channels(*v, 2, p->headdim);
    split_channels(p->out, 3, p->headdim);
    for (View<2> *v : {&p->D, &p->dt_bias}) split_channels(*v, 0, p->headdim);
    split_channels(p->A, 0, p->headdim);
    split_channels(p->state, 1, p->headdim);
    split_channels(p->intermediate, 2, p->headdim);
  }
}

constexpr Operation<ssmk_state_update_args, StateUpdateProblem> kOperation = {
    "state_update", read_problem, cpu::state_update_workspace, &cpu::Kernels::state_update,
    &cuda::Kernels::state_update};

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
