// The library's own parallel_for: the OpenMP pool that the process already has, or plain threads.
//
// PyTorch's CPU wheels run their loops on GNU OpenMP and load it into the global scope. Entering the same pool, found at
// run time, neither links a second OpenMP runtime into the process nor starts threads beside torch's own.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>

#include "job.h"

namespace attnhub_cpu {
namespace {

// GNU OpenMP's entry for `#pragma omp parallel num_threads(n)`, stable since GCC 4.9.
using GompParallel = void (*)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);

GompParallel find_gomp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

struct Loop {
  std::atomic<int64_t> next;
  int64_t count;
  attnhub_cpu_task fn;
  void *arg;
};

// Every thread of the team takes indices until none is left: a team smaller than asked for (nested parallelism, a thread
// limit) still does everything.
void work(void *data) {
  Loop &loop = *static_cast<Loop *>(data);
  for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.fn(loop.arg, i);
}

void run_on_threads(Loop &loop) {
  constexpr int64_t kMaxThreads = 64;
  std::thread threads[kMaxThreads];
  int64_t started = 0;
  try {
    while (started < loop.count - 1 && started < kMaxThreads) {
      threads[started] = std::thread(work, &loop);
      ++started;
    }
  } catch (const std::system_error &) {
    // The system gives no more threads: those that run and this one do the work.
  }
  work(&loop);
  for (int64_t i = 0; i < started; ++i) threads[i].join();
}

}  // namespace

void default_parallel_for(void *, int64_t count, attnhub_cpu_task fn, void *arg) {
  Loop loop{{0}, count, fn, arg};
  static std::atomic<GompParallel> known{nullptr};
  GompParallel gomp = known.load(std::memory_order_acquire);
  if (!gomp) {
    gomp = find_gomp();  // looked up again until found: torch may be imported after the first call
    known.store(gomp, std::memory_order_release);
  }
  if (gomp) {
    gomp(work, &loop, static_cast<unsigned>(count), 0);
  } else {
    run_on_threads(loop);
  }
}

}  // namespace attnhub_cpu
