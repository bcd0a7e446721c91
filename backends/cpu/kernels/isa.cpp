// Which instruction sets this processor has, and the kernels compiled for them.
#include "job.h"

namespace attnhub_cpu {
namespace {

bool has(int64_t isa) {
#if defined(ATTNHUB_CPU_X86)
  __builtin_cpu_init();
  switch (isa) {
    case ATTNHUB_CPU_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case ATTNHUB_CPU_ISA_AVX512:
      return has(ATTNHUB_CPU_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case ATTNHUB_CPU_ISA_AVX512_BF16:
      return has(ATTNHUB_CPU_ISA_AVX512) && __builtin_cpu_supports("avx512bf16");
    default:
      break;
  }
#elif defined(ATTNHUB_CPU_ARM64)
  if (isa == ATTNHUB_CPU_ISA_NEON) return true;  // part of every aarch64
#endif
  return isa == ATTNHUB_CPU_ISA_PORTABLE;
}

const Kernels *compiled(int64_t isa) {
  switch (isa) {
    case ATTNHUB_CPU_ISA_PORTABLE:
      return kernels_portable();
#if defined(ATTNHUB_CPU_X86)
    case ATTNHUB_CPU_ISA_AVX2:
      return kernels_avx2();
    case ATTNHUB_CPU_ISA_AVX512:
      return kernels_avx512();
    case ATTNHUB_CPU_ISA_AVX512_BF16:
      return kernels_avx512_bf16();
#elif defined(ATTNHUB_CPU_ARM64)
    case ATTNHUB_CPU_ISA_NEON:
      return kernels_neon();
#endif
    default:
      return nullptr;
  }
}

int64_t best() {
  for (int64_t isa = ATTNHUB_CPU_ISA_COUNT - 1; isa > ATTNHUB_CPU_ISA_PORTABLE; --isa) {
    if (has(isa)) return isa;
  }
  return ATTNHUB_CPU_ISA_PORTABLE;
}

}  // namespace

const Kernels *find_kernels(int64_t isa) {
  static const int64_t automatic = best();
  if (isa == ATTNHUB_CPU_ISA_AUTO) isa = automatic;
  return has(isa) ? compiled(isa) : nullptr;
}

}  // namespace attnhub_cpu

using namespace attnhub_cpu;

extern "C" int32_t attnhub_cpu_isa_available(int32_t isa) { return find_kernels(isa) != nullptr; }

extern "C" int32_t attnhub_cpu_best_isa(void) { return static_cast<int32_t>(best()); }

extern "C" const char *attnhub_cpu_isa_name(int32_t isa) {
  static const char *const names[ATTNHUB_CPU_ISA_COUNT] = {"auto", "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"};
  return isa >= 0 && isa < ATTNHUB_CPU_ISA_COUNT ? names[isa] : nullptr;
}
