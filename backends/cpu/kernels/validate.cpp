// Everything that can be wrong with a call, found before anything is computed.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "job.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxTokens = int64_t(1) << 31;    // positions are exact in 32 bits, as in the int32 length arrays
constexpr int64_t kMaxElements = int64_t(1) << 56;  // and products of sizes below this never overflow 64 bits
constexpr int64_t kFarAway = int64_t(1) << 40;      // a window that reaches beyond any key

thread_local char message[256] = "";

const char *check_sizes(const attnhub_cpu_call &c) {
  if (c.abi_version != ATTNHUB_CPU_ABI_VERSION)
    return fail("abi_version is %lld; this library has %d", (long long)c.abi_version, ATTNHUB_CPU_ABI_VERSION);
  if (c.dtype < ATTNHUB_CPU_FP32 || c.dtype > ATTNHUB_CPU_FP16) return fail("dtype %lld is unknown", (long long)c.dtype);
  if (c.isa < 0 || c.isa >= ATTNHUB_CPU_ISA_COUNT) return fail("isa %lld is unknown", (long long)c.isa);
  if (c.flags & ~int64_t(ATTNHUB_CPU_CAUSAL | ATTNHUB_CPU_TOP_LEFT)) return fail("flags 0x%llx has unknown bits", (long long)c.flags);
  if (c.threads < 1 || c.threads > 65536) return fail("threads is %lld; it must be in [1, 65536]", (long long)c.threads);
  if (c.head_dim < 1 || c.head_dim > kMaxHeadDim) return fail("head_dim is %lld; it must be in [1, 512]", (long long)c.head_dim);
  if (c.v_head_dim < 1 || c.v_head_dim > kMaxHeadDim) return fail("v_head_dim is %lld; it must be in [1, 512]", (long long)c.v_head_dim);
  if (c.q_heads < 1 || c.kv_heads < 1 || c.q_heads % c.kv_heads)
    return fail("q_heads (%lld) must be a positive multiple of kv_heads (%lld)", (long long)c.q_heads, (long long)c.kv_heads);
  if (c.q_heads >= kMaxTokens) return fail("q_heads is %lld; it must be below 2^31", (long long)c.q_heads);
  if (c.batch < 0 || c.batch >= kMaxTokens) return fail("batch is %lld; it must be in [0, 2^31)", (long long)c.batch);
  if (c.seqlen_q < 0 || c.seqlen_q >= kMaxTokens) return fail("seqlen_q is %lld; it must be in [0, 2^31)", (long long)c.seqlen_q);
  if (c.seqlen_k < 0 || c.seqlen_k >= kMaxTokens) return fail("seqlen_k is %lld; it must be in [0, 2^31)", (long long)c.seqlen_k);
  if (static_cast<double>(c.batch) * static_cast<double>(c.q_heads) * static_cast<double>(c.seqlen_q) * 512.0 > static_cast<double>(kMaxElements))
    return fail("batch * q_heads * seqlen_q is too large");
  if (!std::isfinite(c.softmax_scale)) return fail("softmax_scale must be finite");
  if (!(c.softcap >= 0) || !std::isfinite(c.softcap)) return fail("softcap must be finite and at least 0 (0 is off)");
  if (!(c.dropout_p >= 0 && c.dropout_p < 1)) return fail("dropout_p must be in [0, 1)");
  return nullptr;
}

const char *check_pointers(const attnhub_cpu_call &c, bool keys) {
  if (!c.q) return fail("q is null");
  if (!c.out) return fail("out is null");
  if (keys && !c.k) return fail("k is null");
  if (keys && !c.v) return fail("v is null");
  const uintptr_t mask = c.dtype == ATTNHUB_CPU_FP32 ? 3 : 1;
  const void *pointers[] = {c.q, c.k, c.v, c.out};
  const char *const names[] = {"q", "k", "v", "out"};
  for (int i = 0; i < 4; ++i) {
    if (reinterpret_cast<uintptr_t>(pointers[i]) & mask) return fail("%s is not aligned to its elements", names[i]);
  }
  if (reinterpret_cast<uintptr_t>(c.lse) & 3) return fail("lse is not aligned to its elements");
  return nullptr;
}

const char *check_packed(const attnhub_cpu_call &c, const attnhub_cpu_mask &m) {
  if (m.block_table && m.cu_seqlens_k) return fail("packed keys and a block_table exclude each other: cu_seqlens_k must be null");
  if (!m.cu_seqlens_q != !m.cu_seqlens_k && !m.block_table) return fail("cu_seqlens_q and cu_seqlens_k go together");
  if (!m.cu_seqlens_q) return nullptr;
  if (c.batch != 1) return fail("batch is %lld; packed sequences need 1", (long long)c.batch);
  if (m.num_sequences < 0) return fail("num_sequences is %lld", (long long)m.num_sequences);
  const int32_t *const arrays[] = {m.cu_seqlens_q, m.cu_seqlens_k};
  const int64_t tokens[] = {c.seqlen_q, c.seqlen_k};
  const char *const names[] = {"cu_seqlens_q", "cu_seqlens_k"};
  for (int a = 0; a < (m.block_table ? 1 : 2); ++a) {
    if (arrays[a][0] != 0) return fail("%s[0] is %d; it must be 0", names[a], arrays[a][0]);
    for (int64_t n = 0; n < m.num_sequences; ++n) {
      if (arrays[a][n + 1] < arrays[a][n]) return fail("%s decreases behind entry %lld", names[a], (long long)n);
    }
    if (arrays[a][m.num_sequences] > tokens[a])
      return fail("%s ends with %d; there are only %lld tokens", names[a], arrays[a][m.num_sequences], (long long)tokens[a]);
  }
  return nullptr;
}

// Lengths and page tables are read as addresses: each entry that will be used is checked.
const char *check_lengths(const attnhub_cpu_call &c, const attnhub_cpu_mask &m, int64_t sequences) {
  if (m.block_table) {
    if (!m.seqused_k) return fail("a block_table needs seqused_k");
    if (c.seqlen_k < 1) return fail("the page size (seqlen_k) is %lld", (long long)c.seqlen_k);
    if (m.max_pages < 0 || m.num_pages < 0) return fail("max_pages and num_pages must be at least 0");
  }
  for (int64_t n = 0; m.seqused_k && n < sequences; ++n) {
    const int64_t used = m.seqused_k[n];
    const int64_t room = m.block_table ? m.max_pages * c.seqlen_k : m.cu_seqlens_k ? m.cu_seqlens_k[n + 1] - m.cu_seqlens_k[n] : c.seqlen_k;
    if (used < 0 || used > room) return fail("seqused_k[%lld] is %lld; it must be in [0, %lld]", (long long)n, (long long)used, (long long)room);
    for (int64_t p = 0; m.block_table && p * c.seqlen_k < used; ++p) {
      const int32_t page = m.block_table[n * m.block_table_strides[0] + p * m.block_table_strides[1]];
      if (page < 0 || page >= m.num_pages)
        return fail("block_table[%lld, %lld] is %d; there are %lld pages", (long long)n, (long long)p, page, (long long)m.num_pages);
    }
  }
  return nullptr;
}

const char *check_mask(const attnhub_cpu_call &c, const attnhub_cpu_mask &m) {
  if (m.window_left < -1 || m.window_right < -1) return fail("window (%lld, %lld): each must be at least -1", (long long)m.window_left, (long long)m.window_right);
  if (m.chunk < 0) return fail("chunk is %lld", (long long)m.chunk);
  if (!m.segment_q != !m.segment_k) return fail("segment_q and segment_k go together");
  if (!m.block_q != !m.block_k) return fail("block_q and block_k go together");
  if (m.bias && (m.bias_dtype < ATTNHUB_CPU_FP32 || m.bias_dtype > ATTNHUB_CPU_FP16)) return fail("bias_dtype %lld is unknown", (long long)m.bias_dtype);
  if (m.block_sparse && (m.block_sparse_rows < 1 || m.block_sparse_keys < 1)) return fail("block_sparse needs positive block_sparse_rows and block_sparse_keys");
  (void)c;
  return nullptr;
}

const char *check_gradient(const Job &job, const char *name, const void *data, const void *source) {
  if (data && !source) return fail("%s is wanted, but there is nothing it belongs to", name);
  const uintptr_t mask = job.element_size == 4 ? 3 : 1;
  return reinterpret_cast<uintptr_t>(data) & mask ? fail("%s is not aligned to its elements", name) : nullptr;
}

attnhub_cpu_mask no_mask() {
  attnhub_cpu_mask m;
  std::memset(&m, 0, sizeof m);
  m.window_left = m.window_right = -1;
  return m;
}

}  // namespace

const char *fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return message;
}

const char *check_gradients(const Job &job, const attnhub_cpu_gradients &g) {
  const attnhub_cpu_call &c = job.call;
  if (job.mask.block_table) return fail("paged K/V has no backward: block_table must be null");
  const bool rows = c.batch > 0 && c.seqlen_q > 0;
  if (rows && !c.lse) return fail("lse is null; a backward needs the forward's");
  if (rows && !g.grad_out) return fail("grad_out is null");
  const char *error = check_gradient(job, "grad_out", g.grad_out, g.grad_out);
  if (!error && rows) error = check_gradient(job, "grad_q", g.grad_q, c.q);
  if (!error && rows && c.seqlen_k > 0) error = check_gradient(job, "grad_k", g.grad_k, c.k);
  if (!error && rows && c.seqlen_k > 0) error = check_gradient(job, "grad_v", g.grad_v, c.v);
  if (error) return error;
  if (reinterpret_cast<uintptr_t>(g.grad_lse) & 3) return fail("grad_lse is not aligned to its elements");
  if (g.grad_bias && !job.mask.bias) return fail("grad_bias is wanted, but there is no bias");
  if (g.grad_sinks && !job.mask.sinks) return fail("grad_sinks is wanted, but there are no sinks");
  if ((reinterpret_cast<uintptr_t>(g.grad_bias) | reinterpret_cast<uintptr_t>(g.grad_sinks)) & 3) return fail("grad_bias and grad_sinks must be aligned to floats");
  for (int d = 0; g.grad_bias && d < 4; ++d) {
    if (g.grad_bias_strides[d] < 0) return fail("grad_bias_strides[%d] is %lld; it must be at least 0", d, (long long)g.grad_bias_strides[d]);
  }
  return nullptr;
}

const char *normalise_sizes(const attnhub_cpu_call &call, Job &job) {
  job.call = call;
  job.call.mask = nullptr;
  job.mask = no_mask();
  if (const char *error = check_sizes(call)) return error;
  job.sequences = call.batch;
  job.group = call.q_heads / call.kv_heads;
  job.element_size = call.dtype == ATTNHUB_CPU_FP32 ? 4 : 2;
  job.max_len_q = call.seqlen_q;
  job.max_len_k = call.seqlen_k;
  return nullptr;
}

const char *normalise(const attnhub_cpu_call &call, Job &job) {
  job.call = call;
  job.mask = call.mask ? *call.mask : no_mask();
  const attnhub_cpu_call &c = job.call;
  attnhub_cpu_mask &m = job.mask;
  const char *error = check_sizes(c);
  if (!error && call.mask) error = check_mask(c, m);
  if (!error) error = check_packed(c, m);
  if (error) return error;

  job.sequences = m.cu_seqlens_q ? m.num_sequences : c.batch;
  const bool rows = c.batch > 0 && c.seqlen_q > 0;
  if (rows) error = check_pointers(c, c.seqlen_k > 0);
  if (!error) error = check_lengths(c, m, job.sequences);
  if (error) return error;

  job.group = c.q_heads / c.kv_heads;
  job.element_size = c.dtype == ATTNHUB_CPU_FP32 ? 4 : 2;
  job.max_len_q = job.max_len_k = 0;
  if (m.cu_seqlens_q || m.seqused_k) {
    for (int64_t n = 0; n < job.sequences; ++n) {
      const Sequence s = sequence_of(job, n);
      if (s.len_q > job.max_len_q) job.max_len_q = s.len_q;
      if (s.len_k > job.max_len_k) job.max_len_k = s.len_k;
    }
  } else {
    job.max_len_q = c.seqlen_q;
    job.max_len_k = c.seqlen_k;
  }
  if (m.window_left > kFarAway) m.window_left = -1;
  if (m.window_right > kFarAway) m.window_right = -1;
  if (m.chunk > kFarAway) m.chunk = kFarAway;
  job.predicated = !(c.softmax_scale > 0) || c.softcap > 0 || m.segment_q || m.block_q || m.bool_mask || m.bias || m.alibi || m.block_sparse;
  return nullptr;
}

}  // namespace attnhub_cpu

extern "C" const char *attnhub_cpu_last_error(void) { return attnhub_cpu::message; }
