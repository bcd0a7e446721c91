// The kernels for AVX-512 F, BW, VL and DQ; CMakeLists.txt gives this unit its flags.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_avx512() { return &kKernels; }
