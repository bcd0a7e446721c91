// The kernels for AVX2, FMA and F16C; CMakeLists.txt gives this unit its flags.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_avx2() { return &kKernels; }
