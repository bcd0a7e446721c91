// From a checked backward call to tasks and threads.
#include <cmath>
#include <cstring>

#include "job.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kTasks = 32;                         // keys are split until there are as many tasks
constexpr int64_t kPartialBytes = int64_t(32) << 20;   // and no further than the parts of dQ take this
constexpr int64_t kLeastKeys = 128;                    // of a split
constexpr int64_t kRows = 96;                          // rows that a task works on at a time, at most

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t dim) { return ceil_div(dim, 16) * 16; }

// Tokens behind the last packed sequence get gradients of 0.
void clear_unowned(const Job &job) {
  const attnhub_cpu_call &c = job.call;
  const attnhub_cpu_mask &m = job.mask;
  const attnhub_cpu_gradients &g = *job.gradients;
  if (!m.cu_seqlens_q) return;
  const auto clear = [&](void *data, const int64_t *strides, int64_t heads, int64_t from, int64_t to, int64_t dim) {
    for (int64_t h = 0; data && h < heads; ++h) {
      for (int64_t t = from; t < to; ++t) {
        std::memset(static_cast<char *>(data) + (h * strides[1] + t * strides[2]) * job.element_size, 0, static_cast<size_t>(dim * job.element_size));
      }
    }
  };
  clear(g.grad_q, g.grad_q_strides, c.q_heads, m.cu_seqlens_q[job.sequences], c.seqlen_q, c.head_dim);
  clear(g.grad_k, g.grad_k_strides, c.kv_heads, m.cu_seqlens_k[job.sequences], c.seqlen_k, c.head_dim);
  clear(g.grad_v, g.grad_v_strides, c.kv_heads, m.cu_seqlens_k[job.sequences], c.seqlen_k, c.v_head_dim);
}

}  // namespace

// Depends on the shape alone: see Job.
void cut_backward(Job &job, const Kernels &kernels) {
  const attnhub_cpu_call &c = job.call;
  const int64_t heads = job.sequences * c.kv_heads, rows = job.max_len_q * job.group, dims = padded(c.head_dim) + padded(c.v_head_dim);
  // Panels of K and V, and K again by columns; dK, dV, P and dP in fp32. Beside them Q and dO of the rows.
  const int64_t packed = kernels.packed_bytes[c.dtype];
  job.block_keys = choose_block_keys(packed * (dims + padded(c.head_dim)) + 4 * (dims + 2 * kRows), packed * kRows * dims);
  job.partial_stride = padded(rows) * padded(c.head_dim);  // tiles write whole blocks of 16 rows
  int64_t splits = heads >= kTasks ? 1 : ceil_div(kTasks, heads);
  const int64_t room = kPartialBytes / (4 * heads * (job.partial_stride > 0 ? job.partial_stride : 1));
  if (splits > room) splits = room > 1 ? room : 1;
  job.split_keys = ceil_div(ceil_div(job.max_len_k > 0 ? job.max_len_k : 1, splits), kLeastKeys) * kLeastKeys;
  job.splits = job.max_len_k > 0 ? ceil_div(job.max_len_k, job.split_keys) : 1;
  if (job.split_keys < job.block_keys) job.block_keys = job.split_keys;
  job.tasks = heads * job.splits;
  job.block_rows = kRows;

  const attnhub_cpu_gradients &g = *job.gradients;
  job.bias_gradient = kNoBias;
  if (!g.grad_bias) return;
  const int64_t *strides = g.grad_bias_strides;
  const bool apart = (strides[0] || job.sequences == 1) && (strides[1] || c.kv_heads == 1) && (strides[3] || job.splits == 1);
  job.bias_gradient = apart ? kBiasInTask : kBiasPass;
  BiasParts &parts = job.bias_parts;
  parts.sequences = strides[0] ? job.sequences : 1;
  parts.heads = strides[1] ? c.kv_heads : 1;
  parts.queries = ceil_div(4 * kRows, job.group);
  parts.rows = strides[2] ? ceil_div(job.max_len_q, parts.queries) : 1;
  parts.keys = strides[3] && job.max_len_k > 0 ? ceil_div(job.max_len_k, job.block_keys) : 1;
}

int32_t run_backward(Job &job, const Kernels &kernels) {
  const attnhub_cpu_call &c = job.call;
  const attnhub_cpu_gradients &g = *job.gradients;
  clear_unowned(job);
  if (g.grad_sinks) std::memset(g.grad_sinks, 0, static_cast<size_t>(c.q_heads) * sizeof(float));
  if (job.sequences == 0) return ATTNHUB_CPU_OK;
  cut_backward(job, kernels);
  const size_t rows = static_cast<size_t>(c.batch * c.q_heads * c.seqlen_q), heads = static_cast<size_t>(job.sequences * c.q_heads);
  const size_t sink_bytes = g.grad_sinks && job.mask.sinks ? heads * sizeof(double) : 0;
  char *shared = static_cast<char *>(scratch(kDeltaScratch, sink_bytes + rows * sizeof(float) + 64));
  if (!shared) return ATTNHUB_CPU_NO_MEMORY;
  job.sink_parts = sink_bytes ? reinterpret_cast<double *>(shared) : nullptr;
  job.delta = reinterpret_cast<float *>(shared + sink_bytes);
  job.partial = nullptr;
  if (job.splits > 1) {
    job.partial = static_cast<float *>(scratch(kPartialScratch, static_cast<size_t>(job.tasks * job.partial_stride) * sizeof(float)));
    if (!job.partial) return ATTNHUB_CPU_NO_MEMORY;
  }

  const double row_work = static_cast<double>(rows) * static_cast<double>(c.v_head_dim);
  const double pairs = static_cast<double>(job.sequences * c.q_heads) * static_cast<double>(job.max_len_q) * static_cast<double>(job.max_len_k);
  const double work = pairs * 2.5 * static_cast<double>(c.head_dim + c.v_head_dim);
  int32_t status = run_all(job, kernels.delta[c.dtype], static_cast<int64_t>(heads), row_work);
  if (status == ATTNHUB_CPU_OK && (g.grad_q || g.grad_k || g.grad_v || job.bias_gradient == kBiasInTask)) {
    status = run_all(job, kernels.backward[c.dtype], job.tasks, work);
    const int64_t blocks = job.sequences * c.kv_heads * ceil_div(job.max_len_q * job.group, kReduceRows);
    if (status == ATTNHUB_CPU_OK && job.splits > 1 && g.grad_q) status = run_all(job, kernels.reduce[c.dtype], blocks, row_work * static_cast<double>(job.splits));
  }
  if (status == ATTNHUB_CPU_OK && job.bias_gradient == kBiasPass) {
    const BiasParts &p = job.bias_parts;
    status = run_all(job, kernels.bias[c.dtype], p.sequences * p.heads * p.rows * p.keys, work);
  }
  for (size_t i = 0; job.sink_parts && i < heads; ++i) g.grad_sinks[i % static_cast<size_t>(c.q_heads)] += static_cast<float>(job.sink_parts[i]);
  return status;
}

}  // namespace attnhub_cpu

extern "C" int32_t attnhub_cpu_backward(const attnhub_cpu_call *call, const attnhub_cpu_gradients *gradients) {
  using namespace attnhub_cpu;
  if (!call || !gradients) {
    fail("%s is null", call ? "gradients" : "call");
    return ATTNHUB_CPU_INVALID;
  }
  Job job;
  if (normalise(*call, job) || check_gradients(job, *gradients)) return ATTNHUB_CPU_INVALID;
  const Kernels *kernels = find_kernels(call->isa);
  if (!kernels) return unsupported(call->isa);
  job.gradients = gradients;
  const int32_t status = run_backward(job, *kernels);
  if (status == ATTNHUB_CPU_NO_MEMORY) fail("scratch memory could not be allocated");
  return status;
}
