// One attention call as the kernels see it: plain data, shared by the portable part and every instruction-set unit.
//
// No function with external linkage may be defined in a header here: every instruction-set unit is compiled with its own
// flags, and the linker would keep one copy of such a function, possibly one that this processor cannot execute.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attnhub_cpu.h"

namespace attnhub_cpu {

// Who adds up the gradient of the bias: the tasks of the backward, where no two of them meet in an element of it, else a pass of
// its own, cut along the dimensions that the bias is not broadcast over.
enum BiasGradient { kNoBias, kBiasInTask, kBiasPass };
struct BiasParts {
  int64_t sequences, heads, rows, keys;  // how many parts along each; heads are K/V heads
  int64_t queries;                       // of a part along the rows
};

// A call with every default filled in, and how it is cut into tasks. Rows: the query heads that share a K/V head are
// folded into the rows, so that K/V is read once for all of them: row r is query r / group of head kv_head * group + r % group.
struct Job {
  attnhub_cpu_call call;
  attnhub_cpu_mask mask;
  int64_t sequences;   // batch, or the number of packed sequences
  int64_t group;       // q_heads / kv_heads
  int64_t element_size;
  int64_t max_len_q;   // of the longest sequence
  int64_t max_len_k;
  bool predicated;     // the mask needs more than one interval of keys per row, or scores need more than a scale
  // Tasks: (row block, sequence, kv head, split). Row blocks never change a row's arithmetic; splits do, so they are
  // derived from the shape alone and results do not depend on the number of threads.
  int64_t block_rows;
  int64_t row_blocks;
  int64_t block_keys;  // keys that are packed and multiplied at a time
  int64_t splits;
  int64_t split_keys;
  int64_t tasks;
  // Partial results when splits > 1: [sequences * kv_heads * max_len_q * group, splits] of {v_head_dim floats, max, sum}.
  // Backward: dQ of every task, [sequences * kv_heads, splits] of max_len_q * group rows.
  float *partial;
  int64_t partial_stride;
  // Of the backward alone.
  const attnhub_cpu_gradients *gradients;
  float *delta;        // as lse: rowsum(grad_out * out) - grad_lse
  double *sink_parts;  // [sequences, q_heads], or null when no gradient of the sinks is wanted
  BiasGradient bias_gradient;
  BiasParts bias_parts;
};

// A sequence of the batch: where its tokens lie.
struct Sequence {
  int64_t index;
  int64_t batch;  // index along the batch dimension of q, k, v, out
  int64_t q_begin;
  int64_t len_q;
  int64_t k_begin;
  int64_t len_k;
  int64_t offset;  // position of query 0 on the key axis
};

static inline Sequence sequence_of(const Job &job, int64_t index) {
  const attnhub_cpu_mask &mask = job.mask;
  Sequence s;
  s.index = index;
  s.batch = mask.cu_seqlens_q ? 0 : index;
  s.q_begin = mask.cu_seqlens_q ? mask.cu_seqlens_q[index] : 0;
  s.len_q = mask.cu_seqlens_q ? mask.cu_seqlens_q[index + 1] - s.q_begin : job.call.seqlen_q;
  s.k_begin = mask.cu_seqlens_k ? mask.cu_seqlens_k[index] : 0;
  s.len_k = mask.cu_seqlens_k ? mask.cu_seqlens_k[index + 1] - s.k_begin : job.call.seqlen_k;
  if (mask.seqused_k) s.len_k = mask.seqused_k[index];
  s.offset = job.call.flags & ATTNHUB_CPU_TOP_LEFT ? 0 : s.len_k - s.len_q;
  return s;
}

// The limits of a core, for benchmarks (ceiling.h).
struct Ceiling {
  double (*flops[3])(int64_t rounds, float *sum);  // per dtype: does `rounds` rounds of work on registers, returns its operations
  float (*read)(const float *data, int64_t count);
};

// What one instruction-set unit offers, per dtype. Each returns an attnhub_cpu_status.
struct Kernels {
  int32_t (*task[3])(const Job &job, int64_t index);
  int32_t (*combine[3])(const Job &job, int64_t row);  // merges the splits of one row
  int32_t (*delta[3])(const Job &job, int64_t index);  // the backward, in this order
  int32_t (*backward[3])(const Job &job, int64_t index);
  int32_t (*reduce[3])(const Job &job, int64_t index);
  int32_t (*bias[3])(const Job &job, int64_t index);
  int64_t packed_bytes[3];  // of an element of Q, K or V as blocks are multiplied
  Ceiling ceiling;
};

const Kernels *kernels_portable();
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_bf16();
const Kernels *kernels_amx_bf16();
const Kernels *kernels_neon();

// The kernels of an instruction set, or null if this processor or build lacks it. AUTO is resolved.
const Kernels *find_kernels(int64_t isa);

// Checks a call and fills job with it. Returns null, or why the call is wrong (text of this thread, see fail()).
const char *normalise(const attnhub_cpu_call &call, Job &job);
const char *normalise_sizes(const attnhub_cpu_call &call, Job &job);  // the same without reading any tensor or mask
int32_t unsupported(int64_t isa);  // the status of a call whose instruction set is not there
const char *fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Checks the gradients of a job that normalise() has filled. Returns as normalise() does.
const char *check_gradients(const Job &job, const attnhub_cpu_gradients &gradients);

// Cuts the job into tasks and runs them. Returns an attnhub_cpu_status.
int32_t run_forward(Job &job, const Kernels &kernels);
int32_t run_backward(Job &job, const Kernels &kernels);
void cut_backward(Job &job, const Kernels &kernels);

// Runs fn(job, index) for every index below count on the job's threads; on one where `work`, in multiply-adds, is little.
int32_t run_all(const Job &job, int32_t (*fn)(const Job &, int64_t), int64_t count, double work);

// Keys that are packed at a time, so that what they need stays within the second-level cache beside what is there anyway.
// A power of two from 64 to kMostBlockKeys.
int64_t choose_block_keys(int64_t bytes_a_key, int64_t fixed_bytes);
constexpr int64_t kMostBlockKeys = 512;
constexpr int64_t kReduceRows = 64;  // rows of dQ that one call of Kernels::reduce sums

// Bytes of the second-level cache of one core.
int64_t level2_cache();

// The parallel_for that is used when the caller brings none.
void default_parallel_for(void *ctx, int64_t count, attnhub_cpu_task fn, void *arg);

// At least `bytes` of 64-byte aligned memory that belongs to this thread until its next call with the same slot; null
// when there is none.
enum ScratchSlot { kTaskScratch = 0, kPartialScratch = 1, kDeltaScratch = 2, kScratchSlots = 3 };
void *scratch(ScratchSlot slot, size_t bytes);

}  // namespace attnhub_cpu
