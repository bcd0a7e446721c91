// The kernels for AVX-512 with vdpbf16ps, which bf16 products run on; CMakeLists.txt gives this unit its flags.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_avx512_bf16() { return &kKernels; }
