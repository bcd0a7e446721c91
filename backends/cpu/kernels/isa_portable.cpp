// The kernels for any processor: vectors of four floats, which every 64-bit instruction set has.
#include "kernels.h"

const attnhub_cpu::Kernels *attnhub_cpu::kernels_portable() { return &kKernels; }
