// One random attention call with all its operands. The seed says everything about it.
#pragma once

#include <string>

#include "buffer.h"

namespace native {

struct Problem {
  uint64_t seed = 0;
  attnhub_cpu_call call;
  attnhub_cpu_mask mask;
  int64_t sequences = 0;  // batch, or the number of packed sequences
  std::string text;       // one line about it

  Buffer q, k, v, out, lse;
  Buffer seqused_k, leftpad, prefix, segment_q, segment_k, block_q, block_k, bool_mask, bias, alibi, block_sparse, sinks, cu_seqlens_q,
      cu_seqlens_k, block_table;

  // Only for a backward.
  attnhub_cpu_gradients gradients;
  Buffer grad_out, grad_lse, grad_q, grad_k, grad_v, grad_bias, grad_sinks;

  // Every operand that the library may only read.
  std::vector<const Buffer *> inputs() const;
};

// max_work bounds the multiply-adds, so that slow builds and slow machines stay quick.
std::unique_ptr<Problem> make_problem(uint64_t seed, bool backward, double max_work);

}  // namespace native
