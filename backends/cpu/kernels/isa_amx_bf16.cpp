// The kernels for AVX-512 with vdpbf16ps and AMX tiles, which bf16 products of blocks run on; CMakeLists.txt gives this unit its flags.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_amx_bf16() { return &kKernels; }
