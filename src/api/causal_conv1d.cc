// SPDX-License-Identifier: MIT
#include "api/run.h"

namespace ssmk {
namespace {

Activation activation(Check &c, int32_t value) {
  if (value != SSMK_ACTIVATION_NONE && value != SSMK_ACTIVATION_SILU)
    c.error(SSMK_INVALID_ARGUMENT,
            "activation: must be SSMK_ACTIVATION_NONE (0) or SSMK_ACTIVATION_SILU (1), got %d",
            value);
  return value == SSMK_ACTIVATION_SILU ? Activation::kSilu : Activation::kNone;
}

// (batch, dim, tokens), or (batch, tokens, dim) read as such.
View<3> tokens_of(Check &c, const DLTensor *t, const char *name, Dim &batch, Dim &dim, Dim &tokens,
                  bool channels_last, bool write) {
  const std::initializer_list<Dim *> first = {&batch, &dim, &tokens},
                                     last = {&batch, &tokens, &dim};
  const std::initializer_list<Dim *> &dims = channels_last ? last : first;
  const View<3> v = write ? c.out<3>(t, name, dims, kFloats) : c.in<3>(t, name, dims, kFloats);
  return channels_last ? spread<3>(v, {0, 2, 1}) : v;
}

// `states` is the tensor that bound state_len, if one did.
void check_width(Check &c, const Dim &width, const char *states, const Dim &state_len) {
  if (!c.ok()) return;
  c.that(width.value >= 2 && width.value <= kMaxConvWidth, "weight", "width must be 2 to 8",
         width.value);
  if (c.ok() && state_len.bound() && state_len.value < width.value - 1)
    c.error(SSMK_INVALID_ARGUMENT, "%s: state_len must be at least width - 1 = %lld, got %lld",
            states, (long long)(width.value - 1), (long long)state_len.value);
}

void read_problem(Check &c, const ssmk_causal_conv1d_args *user, CausalConv1dProblem *p) {
  ssmk_causal_conv1d_args a;
  c.args(user, &a);
  Dim batch{"batch"}, dim{"dim"}, seqlen{"seqlen"}, width{"width"}, state_len{"state_len"},
      slots{""};
  const bool last = a.channels_last != 0;

  c.required(a.x, "x");
  c.required(a.weight, "weight");
  c.required(a.out, "out");
  p->x = tokens_of(c, a.x, "x", batch, dim, seqlen, last, false);
  p->weight = c.in<2>(a.weight, "weight", {&dim, &width}, kFloats);
  p->bias = c.in<1>(a.bias, "bias", {&dim}, kFloats);
  p->out = tokens_of(c, a.out, "out", batch, dim, seqlen, last, true);
  p->seqs = sequences(c,
                      {a.cu_seqlens, a.seq_idx, a.state_indices, a.has_initial_state,
                       a.initial_states, a.final_states},
                      batch, seqlen, slots);
  c.may_alias(a.initial_states, a.final_states);
  p->initial_states =
      c.in<3>(a.initial_states, "initial_states", {&slots, &dim, &state_len}, kFloats);
  p->final_states = c.out<3>(a.final_states, "final_states", {&slots, &dim, &state_len}, kFloats);
  check_width(c, width, a.initial_states ? "initial_states" : "final_states", state_len);
  finish_sequences(c, p->seqs, slots, seqlen, a.flags, a.pad_slot, a.final_states != nullptr);
  p->activation = activation(c, a.activation);
  only_flags(c, a.flags, SSMK_BATCH_INVARIANT | SSMK_PAD_SLOT);
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();

  p->batch = batch.value;
  p->dim = dim.value;
  p->seqlen = seqlen.value;
  p->width = width.value;
  p->state_len = state_len.bound() ? state_len.value : 0;
}

void read_problem(Check &c, const ssmk_causal_conv1d_update_args *user,
                  CausalConv1dUpdateProblem *p) {
  ssmk_causal_conv1d_update_args a;
  c.args(user, &a);
  Dim batch{"batch"}, dim{"dim"}, ntokens{"T"}, width{"width"}, state_len{"state_len"},
      entries{"entries"};
  const bool last = a.channels_last != 0;

  c.required(a.x, "x");
  c.required(a.conv_state, "conv_state");
  c.required(a.weight, "weight");
  c.required(a.out, "out");
  const bool one_token = a.x && a.x->ndim == 2;
  const auto tokens = [&](const DLTensor *t, const char *name, bool write) {
    if (!one_token) return tokens_of(c, t, name, batch, dim, ntokens, last, write);
    const std::initializer_list<Dim *> dims = {&batch, &dim};
    return spread<3>(write ? c.out<2>(t, name, dims, kFloats) : c.in<2>(t, name, dims, kFloats),
                     {0, 1});
  };
  if (one_token) ntokens.value = 1;
  c.rank_is(a.x, "x", {2, 3}, "(batch, dim) or (batch, dim, T) (channels_last: (batch, T, dim))");
  p->x = tokens(a.x, "x", false);
  p->weight = c.in<2>(a.weight, "weight", {&dim, &width}, kFloats);
  p->bias = c.in<1>(a.bias, "bias", {&dim}, kFloats);
  p->conv_state = c.out<3>(a.conv_state, "conv_state", {&entries, &dim, &state_len}, kFloats);
  p->out = tokens(a.out, "out", true);
  check_width(c, width, "conv_state", state_len);

  // slots
  p->cache_seqlens = c.in<1>(a.cache_seqlens, "cache_seqlens", {&batch}, kIndices);
  p->state_indices = c.in<1>(a.state_indices, "state_indices", {&batch}, kIndices);
  p->state_indices_out = c.in<1>(a.state_indices_out, "state_indices_out", {&batch}, kIndices);
  p->num_tokens = c.in<1>(a.num_tokens, "num_tokens", {&batch}, kIndices);
  p->pad = pad_rule(a.flags, a.pad_slot, entries.value);
  check_range(c, p->cache_seqlens, "cache_seqlens", batch.value, 0,
              INT64_MAX - (ntokens.bound() ? ntokens.value : 0), "at least 0");
  check_range(c, p->num_tokens, "num_tokens", batch.value, 0, ntokens.value, "0 to T");
  if (!a.state_indices && c.ok() && entries.value < batch.value)
    c.error(
        SSMK_INVALID_ARGUMENT,
        "conv_state: without state_indices it must have a slot for each of the batch = %lld rows, "
        "got entries = %lld",
        (long long)batch.value, (long long)entries.value);
  const View<2> in = spread<2>(p->state_indices, {0}), out = spread<2>(p->state_indices_out, {0});
  check_slots(c, {in, out, {}, batch.value, 1, 1, true, "state_indices", "state_indices_out"},
              p->pad);
  p->activation = activation(c, a.activation);
  only_flags(c, a.flags, SSMK_PAD_SLOT);
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();

  p->batch = batch.value;
  p->dim = dim.value;
  p->ntokens = ntokens.value;
  p->width = width.value;
  p->state_len = state_len.value;
}

// The convolutions need no scratch on the CPU.
template <class Problem>
uint64_t no_workspace(const Problem &) {
  return 0;
}

constexpr Operation<ssmk_causal_conv1d_args, CausalConv1dProblem> kPrefill = {
    "causal_conv1d", read_problem, no_workspace, &cpu::Kernels::causal_conv1d};
constexpr Operation<ssmk_causal_conv1d_update_args, CausalConv1dUpdateProblem> kUpdate = {
    "causal_conv1d_update", read_problem, no_workspace, &cpu::Kernels::causal_conv1d_update,
    &cuda::Kernels::causal_conv1d_update};

}  // namespace
}  // namespace ssmk

extern "C" {

SSMK_API ssmk_status ssmk_causal_conv1d(const ssmk_causal_conv1d_args *args) {
  return ssmk::kPrefill.run(args);
}

SSMK_API ssmk_status ssmk_causal_conv1d_workspace(const ssmk_causal_conv1d_args *args,
                                                  uint64_t *bytes) {
  return ssmk::kPrefill.workspace(args, bytes);
}

SSMK_API ssmk_status ssmk_causal_conv1d_update(const ssmk_causal_conv1d_update_args *args) {
  return ssmk::kUpdate.run(args);
}

SSMK_API ssmk_status ssmk_causal_conv1d_update_workspace(const ssmk_causal_conv1d_update_args *args,
                                                         uint64_t *bytes) {
  return ssmk::kUpdate.workspace(args, bytes);
}

}  // extern "C"
