// Everything that one instruction-set unit offers.
#pragma once

#include "backward.h"
#include "ceiling.h"

namespace attnhub_cpu {
namespace {

template <class T>
constexpr int64_t packed_bytes = sizeof(typename TileUnitsOf<T>::type::Unit) / TileUnitsOf<T>::type::kPerUnit;

constexpr Kernels kKernels = {
    {forward_task<float>, forward_task<Bf16>, forward_task<Fp16>},
    {combine<float>, combine<Bf16>, combine<Fp16>},
    {delta_task<float>, delta_task<Bf16>, delta_task<Fp16>},
    {backward_task<float>, backward_task<Bf16>, backward_task<Fp16>},
    {reduce_dq<float>, reduce_dq<Bf16>, reduce_dq<Fp16>},
    {bias_task<float>, bias_task<Bf16>, bias_task<Fp16>},
    {packed_bytes<float>, packed_bytes<Bf16>, packed_bytes<Fp16>},
    kCeiling,
};

}  // namespace
}  // namespace attnhub_cpu
