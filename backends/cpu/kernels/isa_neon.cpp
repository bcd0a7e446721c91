// The kernels for Advanced SIMD of aarch64; CMakeLists.txt defines ATTNHUB_NEON for this unit.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_neon() { return &kKernels; }
