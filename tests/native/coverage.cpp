#include "coverage.h"

namespace native {

void Coverage::count(const std::string &part, bool present) {
  for (auto &known : parts) {
    if (known.first == part) {
      known.second += present;
      return;
    }
  }
  parts.emplace_back(part, present);
}

void count_parts(const Problem &p, Coverage &coverage) {
  const attnhub_cpu_call &c = p.call;
  const attnhub_cpu_mask &m = p.mask;
  coverage.count("fp32", c.dtype == kFp32);
  coverage.count("bf16", c.dtype == kBf16);
  coverage.count("fp16", c.dtype == kFp16);
  coverage.count("causal", c.flags & ATTNHUB_CPU_CAUSAL);
  coverage.count("top_left", c.flags & ATTNHUB_CPU_TOP_LEFT);
  coverage.count("window", m.window_left >= 0 || m.window_right >= 0);
  coverage.count("chunk", m.chunk > 0);
  coverage.count("seqused_k", m.seqused_k);
  coverage.count("leftpad", m.leftpad);
  coverage.count("prefix", m.prefix);
  coverage.count("segments", m.segment_q);
  coverage.count("blocks", m.block_q);
  coverage.count("bool_mask", m.bool_mask);
  coverage.count("bias_fp32", m.bias && m.bias_dtype == kFp32);
  coverage.count("bias_bf16", m.bias && m.bias_dtype == kBf16);
  coverage.count("bias_fp16", m.bias && m.bias_dtype == kFp16);
  coverage.count("alibi", m.alibi);
  coverage.count("block_sparse", m.block_sparse);
  coverage.count("sinks", m.sinks);
  coverage.count("packed", m.cu_seqlens_q);
  coverage.count("paged", m.block_table);
  coverage.count("packed_over_pages", m.block_table && m.cu_seqlens_q);
  coverage.count("softcap", c.softcap > 0);
  coverage.count("dropout", c.dropout_p > 0);
  coverage.count("groups", c.q_heads > c.kv_heads);
  coverage.count("other_v_dim", c.v_head_dim != c.head_dim);
  coverage.count("no_mask", !c.mask);
  coverage.count("splits", c.seqlen_q <= 16 && c.seqlen_k > 512);
}

}  // namespace native
