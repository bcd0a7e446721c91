// Scratch memory: one growing buffer per thread and slot, kept between calls and freed when the thread ends.
#include <cstdlib>

#include "job.h"

namespace attnhub_cpu {
namespace {

// What is larger is given back after use is over (at the next, smaller request), so that one long call does not pin memory.
constexpr size_t kKeepBytes = size_t(16) << 20;

struct Buffers {
  void *data[kScratchSlots] = {};
  size_t size[kScratchSlots] = {};
  ~Buffers() {
    for (void *p : data) std::free(p);
  }
};

thread_local Buffers buffers;

}  // namespace

void *scratch(ScratchSlot slot, size_t bytes) {
  void *&data = buffers.data[slot];
  size_t &size = buffers.size[slot];
  const bool wasteful = size > kKeepBytes && bytes < size / 4;
  if (size < bytes || wasteful) {
    std::free(data);
    size = (bytes + 4095) & ~size_t(4095);
    data = std::aligned_alloc(4096, size);
    if (!data) size = 0;
  }
  return data;
}

}  // namespace attnhub_cpu
