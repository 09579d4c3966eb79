// SPDX-License-Identifier: MIT
#include "api/mamba3.h"

namespace ssmk {
namespace {

// (nheads, rank, dstate), or (nheads, dstate) if rank is 1.
View<3> bias(Check &c, const DLTensor *t, const char *name, Dim &nheads, Dim &rank, Dim &dstate) {
  if (t && t->ndim == 2 && rank.value == 1)
    return spread<3>(c.in<2>(t, name, {&nheads, &dstate}, kFloats), {0, 2});
  return c.in<3>(t, name, {&nheads, &rank, &dstate}, kFloats);
}

}  // namespace

Mamba3 mamba3(Check &c, const Mamba3Args &a, Dim &nheads, Dim &rank, Dim &headdim, Dim &dstate,
              const Dim &nangles) {
  Mamba3 m;
  m.B_bias = bias(c, a.B_bias, "B_bias", nheads, rank, dstate);
  m.C_bias = bias(c, a.C_bias, "C_bias", nheads, rank, dstate);
  m.mimo_x = c.in<3>(a.mimo_x, "mimo_x", {&nheads, &rank, &headdim}, kFloats);
  m.mimo_z = c.in<3>(a.mimo_z, "mimo_z", {&nheads, &rank, &headdim}, kFloats);
  m.mimo_out = c.in<3>(a.mimo_out, "mimo_out", {&nheads, &rank, &headdim}, kFloats);
  m.norm_weight = c.in<2>(a.norm_weight, "norm_weight", {&nheads, &headdim}, kFloats);
  if (!a.z) c.forbidden(a.mimo_z, "mimo_z", "without z: it scales z");
  if (rank.value > 1 && !a.mimo_out)
    c.forbidden(a.norm_weight, "norm_weight", "without mimo_out if rank > 1");
  c.that(!a.angles || nangles.value <= dstate.value / 2, "angles",
         "nangles must be at most dstate / 2", nangles.value);
  c.that(a.rotary == SSMK_ROTARY_INTERLEAVED || a.rotary == SSMK_ROTARY_HALF, "rotary",
         "must be SSMK_ROTARY_INTERLEAVED (0) or SSMK_ROTARY_HALF (1)", a.rotary);
  m.rank = rank.value;
  m.nangles = a.angles ? nangles.value : 0;
  m.norm_eps = a.norm_eps;
  m.rotary_half = a.rotary == SSMK_ROTARY_HALF;
  m.trap_sigmoid = (a.flags & SSMK_TRAP_SIGMOID) != 0;
  return m;
}

void only_with_parts(Check &c, const Mamba3Args &a, const Mamba3StateArgs &s) {
  if (!a.angles) c.forbidden(s.angle, s.angle_name, "without angles");
  if (!a.trap) c.forbidden(s.k, s.k_name, "without trap");
  if (!a.trap) c.forbidden(s.v, s.v_name, "without trap");
}

}  // namespace ssmk
