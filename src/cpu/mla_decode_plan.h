// SPDX-License-Identifier: MIT
// How a call is cut into tasks, and where its scratch lies in the workspace.  Compiled once, for
// the baseline: no level's code may be shared with another.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace ssmk::cpu {

// A "query" is one head of one of the T tokens: queries t nheads + head of a row, in blocks.  A
// row's cache is cut into pieces; what a block of queries makes of a piece is a partial result, and
// the pieces of a row are merged by the logarithms of their sums.
struct MlaDecodePlan {
  int64_t queries = 0;      // of a row
  int64_t block = 0;        // queries of a task, a multiple of kMlaQueryBlock
  int64_t blocks = 0;       // tasks of a row and piece
  int64_t width = 0;        // latent + rope
  int64_t q_pitch = 0;      // floats between two queries
  int64_t out_pitch = 0;    // floats between two partial outputs
  int64_t most_pieces = 0;  // of the whole call
  int64_t cuts = 1;         // pieces of even length, about: of the whole call, or
  bool of_row = false;      // of each row
  // Bytes from the start of the workspace
  uint64_t pieces_at = 0;  // int64_t (batch + 1): the number of each row's first piece
  uint64_t q_at = 0;       // float (batch, blocks block, q_pitch): scaled, in units of log2
  uint64_t max_at = 0;     // float (piece, blocks block): the largest score
  uint64_t sum_at = 0;     // float (piece, blocks block): of the exponentials
  uint64_t out_at = 0;     // float (piece, blocks block, out_pitch): not divided by the sum
  uint64_t bytes = 0;

  int64_t padded_queries() const { return blocks * block; }

  // Tokens of a piece of a row of `seqlen` tokens, in a call of `total` tokens: sizes alone decide,
  // never the number of threads.
  int64_t piece(int64_t seqlen, int64_t total) const;
};

constexpr int64_t kMlaQueryBlock = 4;    // queries of the inner loops
constexpr int64_t kMlaMostQueries = 32;  // of a task
constexpr int64_t kMlaTile = 32;         // cache tokens that are looked at together
constexpr int64_t kMlaMinPiece = 256;    // tokens; a smaller piece is hardly worth its merging
constexpr int64_t kMlaMostPieces = 64;   // of a row

MlaDecodePlan mla_decode_plan(const MlaDecodeProblem &);

}  // namespace ssmk::cpu
