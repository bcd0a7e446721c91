// The limits of this machine, measured: every thread works until a common deadline, so that one that starts late or is taken
// away lowers the rate and never raises it.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "job.h"

namespace attnhub_cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kWindow(20);
constexpr int64_t kRounds = 2000;              // some 20 us: what looking at the clock costs is lost in it
constexpr int64_t kPiece = int64_t(1) << 18;   // floats read between two looks at the clock: 1 MiB

double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

struct Work {
  const Ceiling *ceiling;
  int64_t dtype;
  float *data;
  int64_t floats;  // of one thread
  Clock::time_point start;
  std::atomic<int64_t> done{0};  // operations, or floats read
  std::atomic<int64_t> end{0};   // when the last thread stopped, in ticks behind start
  volatile float sink = 0;       // what the work made, so that it has to be done

  void finish(double amount, float sum) {
    done.fetch_add(static_cast<int64_t>(amount), std::memory_order_relaxed);
    sink = sum;
    const int64_t mine = (Clock::now() - start).count();
    for (int64_t seen = end.load(); seen < mine && !end.compare_exchange_weak(seen, mine);) {
    }
  }
  double rate() const { return static_cast<double>(done.load()) / seconds(Clock::duration(end.load())); }
};

void compute(void *arg, int64_t) {
  Work &work = *static_cast<Work *>(arg);
  double flops = 0;
  float sum = 0;
  while (Clock::now() - work.start < kWindow) flops += work.ceiling->flops[work.dtype](kRounds, &sum);
  work.finish(flops, sum);
}

void touch(void *arg, int64_t index) {
  Work &work = *static_cast<Work *>(arg);
  std::memset(work.data + index * work.floats, 1, static_cast<size_t>(work.floats) * sizeof(float));
}

void read(void *arg, int64_t index) {
  Work &work = *static_cast<Work *>(arg);
  const float *mine = work.data + index * work.floats;
  int64_t total = 0;
  float sum = 0;
  for (int64_t at = 0; Clock::now() - work.start < kWindow; at = at + 2 * kPiece <= work.floats ? at + kPiece : 0) {
    sum += work.ceiling->read(mine + at, kPiece);
    total += kPiece;
  }
  work.finish(static_cast<double>(total), sum);
}

}  // namespace
}  // namespace attnhub_cpu

using namespace attnhub_cpu;

extern "C" double attnhub_cpu_peak_flops(int32_t isa, int32_t dtype, int64_t threads) {
  const Kernels *kernels = find_kernels(isa);
  if (!kernels || dtype < ATTNHUB_CPU_FP32 || dtype > ATTNHUB_CPU_FP16 || threads < 1) return 0;
  Work work{};
  work.ceiling = &kernels->ceiling;
  work.dtype = dtype;
  work.start = Clock::now();
  default_parallel_for(nullptr, threads, compute, &work);
  return work.rate();
}

extern "C" double attnhub_cpu_read_rate(int32_t isa, int64_t threads, int64_t bytes, int32_t huge_pages) {
  const Kernels *kernels = find_kernels(isa);
  if (!kernels || threads < 1 || bytes < 0) return 0;
  Work work{};
  work.ceiling = &kernels->ceiling;
  const int64_t piece_bytes = kPiece * static_cast<int64_t>(sizeof(float));
  work.floats = 2 * (bytes / threads / piece_bytes / 2 + 1) * kPiece;  // whole huge pages
  const size_t size = static_cast<size_t>(work.floats * threads) * sizeof(float);
  work.data = static_cast<float *>(std::aligned_alloc(size_t(2) << 20, size));
  if (!work.data) return 0;
#if defined(MADV_HUGEPAGE)
  if (huge_pages) madvise(work.data, size, MADV_HUGEPAGE);
#else
  (void)huge_pages;
#endif
  default_parallel_for(nullptr, threads, touch, &work);
  work.start = Clock::now();
  default_parallel_for(nullptr, threads, read, &work);
  std::free(work.data);
  return work.rate() * static_cast<double>(sizeof(float));
}
