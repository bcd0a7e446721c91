// From a checked call to tasks and threads.
#include <atomic>
#include <cmath>
#include <cstring>

#include "job.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kSplitQueries = 16;   // up to here a call is decoding: bound by reading K and V, it wants every thread's reads
constexpr int64_t kSplitTasks = 64;     // and is split until batch, heads and splits give this many tasks
constexpr int64_t kSplitKeys = 512;     // a split is worth at least this many keys; a multiple of every key block
constexpr int64_t kPrefillTasks = 32;   // prefill is split only where its row blocks are fewer than this (few heads, few rows)
constexpr int64_t kPrefillKeys = 2048;  // and keys are many
constexpr int64_t kRowStep = 96;        // row blocks are multiples of every sub-block
constexpr double kSerialWork = 1 << 20; // multiply-adds below which waking a thread costs more than it gives

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

void cut(Job &job, const Kernels &kernels) {
  const attnhub_cpu_call &c = job.call;
  const int64_t heads = job.sequences * c.kv_heads, rows = job.max_len_q * job.group;
  // Depends on the shape alone: see Job.
  const bool decoding = job.max_len_q <= kSplitQueries;
  const int64_t owners = decoding ? heads : heads * ceil_div(rows, kRowStep), least = decoding ? kSplitKeys : kPrefillKeys;
  const int64_t enough = decoding ? kSplitTasks : kPrefillTasks;
  job.splits = 1;
  job.split_keys = job.max_len_k;
  if (owners < enough && job.max_len_k > least) {
    const int64_t most = ceil_div(job.max_len_k, ceil_div(enough, owners));
    job.split_keys = ceil_div(most > least ? most : least, kSplitKeys) * kSplitKeys;
    job.splits = ceil_div(job.max_len_k, job.split_keys);
  }
  // Large row blocks share the packing of K and V, small ones feed the threads. They change no row's arithmetic.
  job.block_keys = choose_block_keys(kernels.packed_bytes[c.dtype] * (c.head_dim + c.v_head_dim) + 4 * kRowStep, level2_cache() * 2 / 5);  // which the rows take
  const int64_t largest = clamp(level2_cache() * 2 / 5 / (4 * (c.head_dim + c.v_head_dim)) / kRowStep * kRowStep, kRowStep, 8 * kRowStep);
  const int64_t wanted = c.threads == 1 ? 1 : ceil_div(4 * c.threads, heads * job.splits);
  job.block_rows = clamp(ceil_div(ceil_div(rows, wanted), kRowStep) * kRowStep, kRowStep, largest);
  job.row_blocks = ceil_div(rows, job.block_rows);
  job.tasks = job.row_blocks * heads * job.splits;
}

// Rows behind the last packed sequence.
void clear_unowned(const Job &job) {
  if (!job.mask.cu_seqlens_q) return;
  const attnhub_cpu_call &c = job.call;
  for (int64_t h = 0; h < c.q_heads; ++h) {
    for (int64_t t = job.mask.cu_seqlens_q[job.sequences]; t < c.seqlen_q; ++t) {
      char *row = static_cast<char *>(c.out) + (h * c.out_strides[1] + t * c.out_strides[2]) * job.element_size;
      std::memset(row, 0, static_cast<size_t>(c.v_head_dim * job.element_size));
      if (c.lse) c.lse[h * c.seqlen_q + t] = -INFINITY;
    }
  }
}

struct Shared {
  const Job *job;
  int32_t (*fn)(const Job &, int64_t);
  int64_t count;
  std::atomic<int64_t> next;
  std::atomic<int32_t> status;
};

// A worker takes units until none is left, so that a slow or absent thread delays nothing but its own unit.
void worker(void *arg, int64_t) {
  Shared &shared = *static_cast<Shared *>(arg);
  for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) {
    const int32_t status = shared.fn(*shared.job, i);
    if (status != ATTNHUB_CPU_OK) shared.status.store(status, std::memory_order_relaxed);
  }
}

}  // namespace

int32_t run_all(const Job &job, int32_t (*fn)(const Job &, int64_t), int64_t count, double work) {
  Shared shared{&job, fn, count, {0}, {ATTNHUB_CPU_OK}};
  const int64_t threads = work < kSerialWork ? 1 : clamp(job.call.threads, 1, count);
  if (threads <= 1) {
    worker(&shared, 0);
  } else {
    const attnhub_cpu_parallel_for loop = job.call.parallel_for ? job.call.parallel_for : default_parallel_for;
    loop(job.call.parallel_ctx, threads, worker, &shared);
  }
  return shared.status.load(std::memory_order_relaxed);
}

int32_t unsupported(int64_t isa) {
  fail("this processor or this build lacks %s", attnhub_cpu_isa_name(static_cast<int32_t>(isa)));
  return ATTNHUB_CPU_UNSUPPORTED;
}

int32_t run_forward(Job &job, const Kernels &kernels) {
  clear_unowned(job);
  const attnhub_cpu_call &c = job.call;
  if (job.sequences == 0 || job.max_len_q == 0) return ATTNHUB_CPU_OK;
  cut(job, kernels);
  const double dims = static_cast<double>(c.head_dim + c.v_head_dim);
  const double rows = static_cast<double>(job.sequences * c.q_heads) * static_cast<double>(job.max_len_q);
  const int64_t partial_rows = job.sequences * c.kv_heads * job.max_len_q * job.group;
  job.partial = nullptr;
  job.partial_stride = c.v_head_dim + 2;
  if (job.splits > 1) {
    const size_t bytes = static_cast<size_t>(partial_rows * job.splits * job.partial_stride) * sizeof(float);
    job.partial = static_cast<float *>(scratch(kPartialScratch, bytes));
    if (!job.partial) return ATTNHUB_CPU_NO_MEMORY;
  }
  const int32_t status = run_all(job, kernels.task[c.dtype], job.tasks, rows * static_cast<double>(job.max_len_k) * dims);
  if (status != ATTNHUB_CPU_OK || job.splits == 1) return status;
  return run_all(job, kernels.combine[c.dtype], partial_rows, rows * static_cast<double>(job.splits) * dims);
}

}  // namespace attnhub_cpu

extern "C" int32_t attnhub_cpu_abi_version(void) { return ATTNHUB_CPU_ABI_VERSION; }

extern "C" int32_t attnhub_cpu_cut(const attnhub_cpu_call *call, attnhub_cpu_blocks *forward, attnhub_cpu_blocks *backward) {
  using namespace attnhub_cpu;
  Job job;
  const attnhub_cpu_gradients gradients{};
  if (!call || normalise_sizes(*call, job)) {
    if (!call) fail("call is null");
    return ATTNHUB_CPU_INVALID;
  }
  const Kernels *kernels = find_kernels(call->isa);
  if (!kernels) return unsupported(call->isa);
  const auto tell = [&job](attnhub_cpu_blocks *to) {
    if (to) *to = {job.block_rows, job.block_keys, job.splits, job.split_keys, job.tasks, level2_cache()};
  };
  const bool empty = job.sequences == 0 || job.max_len_q == 0;
  if (!empty) cut(job, *kernels);
  tell(forward);
  job.gradients = &gradients;
  if (!empty) cut_backward(job, *kernels);
  tell(backward);
  return ATTNHUB_CPU_OK;
}

extern "C" int32_t attnhub_cpu_forward(const attnhub_cpu_call *call) {
  using namespace attnhub_cpu;
  if (!call) {
    fail("call is null");
    return ATTNHUB_CPU_INVALID;
  }
  Job job;
  if (normalise(*call, job)) return ATTNHUB_CPU_INVALID;
  const Kernels *kernels = find_kernels(call->isa);
  if (!kernels) return unsupported(call->isa);
  const int32_t status = run_forward(job, *kernels);
  if (status == ATTNHUB_CPU_NO_MEMORY) fail("scratch memory could not be allocated");
  return status;
}
