// The size of the second-level cache, which decides how much a task works on at a time.
#include <unistd.h>

#include <cstdio>

#include "job.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kUnknown = 1 << 20;
constexpr int64_t kLeast = 256 << 10, kMost = 4 << 20;  // what lies outside is not a core's own

// glibc knows it from cpuid on x86; elsewhere the kernel tells it, as "1024K".
int64_t from_system() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (known > 0) return known;
#endif
  long long kib = 0;
  if (std::FILE *file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index2/size", "r")) {
    if (std::fscanf(file, "%lldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? kib << 10 : kUnknown;
}

}  // namespace

int64_t level2_cache() {
  static const int64_t bytes = [] {
    const int64_t found = from_system();
    return found < kLeast ? kLeast : found > kMost ? kMost : found;
  }();
  return bytes;
}

int64_t choose_block_keys(int64_t bytes_a_key, int64_t fixed_bytes) {
  const int64_t room = level2_cache() * 3 / 4 - fixed_bytes;
  for (int64_t keys = kMostBlockKeys; keys > 64; keys /= 2) {
    if (keys * bytes_a_key <= room) return keys;
  }
  return 64;
}

}  // namespace attnhub_cpu
