// SPDX-License-Identifier: MIT
// One level's table of operations (compiled once per level, like the operations themselves).
#include "cpu/kernels.h"

#define SSMK_TEXT_OF(x) #x
#define SSMK_TEXT(x) SSMK_TEXT_OF(x)

namespace ssmk::cpu::SSMK_ISA {

void selective_scan(const SelectiveScanProblem &);
void ssd_chunk(const SsdChunkProblem &);
void state_update(const StateUpdateProblem &);
void causal_conv1d(const CausalConv1dProblem &);
void causal_conv1d_update(const CausalConv1dUpdateProblem &);
void mla_decode(const MlaDecodeProblem &);

extern const Kernels table;
const Kernels table = {SSMK_ISA_NAME, selective_scan,       ssd_chunk, state_update,
                       causal_conv1d, causal_conv1d_update, mla_decode};

}  // namespace ssmk::cpu::SSMK_ISA
