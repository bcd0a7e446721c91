// Which instruction sets this processor has, and the kernels compiled for them.
#include "job.h"

#if defined(ATTNHUB_CPU_AMX) && !defined(ATTNHUB_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attnhub_cpu {
namespace {

#if defined(ATTNHUB_CPU_AMX)
// Whether this processor has AMX with bf16, the kernel keeps its registers, and lets this process use them.
bool amx_granted() {
#if defined(ATTNHUB_EMULATE_AMX)
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kTileState = 3u << 17;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));  // whoever has AVX-512 enabled has it
  if ((eax & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

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
#if defined(ATTNHUB_CPU_AMX)
    case ATTNHUB_CPU_ISA_AMX_BF16: {
      static const bool granted = has(ATTNHUB_CPU_ISA_AVX512_BF16) && amx_granted();  // once for the process and all its threads
      return granted;
    }
#endif
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
#if defined(ATTNHUB_CPU_AMX)
    case ATTNHUB_CPU_ISA_AMX_BF16:
      return kernels_amx_bf16();
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
