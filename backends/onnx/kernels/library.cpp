// What ONNX Runtime looks for in a custom-op library: `RegisterCustomOps`. One operator per element type, under one name.

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include "flash_attention.h"
#include "ort_tensor.h"

#define ATTNHUB_EXPORT extern "C" __attribute__((visibility("default")))

namespace attnhub::ort {
namespace {

std::atomic<uint64_t> calls{0};

int element_type_of_input(int t, std::size_t index) {
    switch (index) {
        case kAttnMask:
            return kUndefined;  // any: bool, or a floating type
        case kNonpadKvSeqlen:
        case kLeftpad:
            return kInt64;
        case kSinks:
        case kAlibiSlopes:
            return kFloat;
        default:
            return t;
    }
}

Status* create(const CustomOp*, ApiTable table, const KernelInfo* info, void** kernel) {
    const Api own(table);
    return guard(own, [&] { *kernel = new FlashAttention(own, info); });
}

Status* compute(void* kernel, KernelContext* context) {
    const FlashAttention& attention = *static_cast<const FlashAttention*>(kernel);
    return guard(attention.api(), [&] {
        attention.compute(context);
        calls.fetch_add(1, std::memory_order_relaxed);
    });
}

template <int Type>
CustomOp make_op() {
    CustomOp op{};
    op.version = kApiVersion;
    op.get_name = [](const CustomOp*) { return "FlashAttention"; };
    op.get_execution_provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
    op.get_input_count = [](const CustomOp*) -> std::size_t { return kInputs; };
    op.get_input_type = [](const CustomOp*, std::size_t index) { return element_type_of_input(Type, index); };
    op.get_input_characteristic = [](const CustomOp*, std::size_t index) -> int { return index <= kV ? kRequired : kOptional; };
    op.get_input_memory_type = [](const CustomOp*, std::size_t) -> int { return kMemoryDefault; };
    op.get_output_count = [](const CustomOp*) -> std::size_t { return kOutputs; };
    op.get_output_type = [](const CustomOp*, std::size_t index) -> int { return index == kLse ? kFloat : Type; };
    op.get_output_characteristic = [](const CustomOp*, std::size_t index) -> int { return index == kY ? kRequired : kOptional; };
    op.get_variadic_input_min_arity = [](const CustomOp*) { return 0; };
    op.get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
    op.get_variadic_output_min_arity = [](const CustomOp*) { return 0; };
    op.get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
    op.create_kernel_v2 = create;
    op.compute_v2 = compute;
    op.destroy = [](void* kernel) { delete static_cast<FlashAttention*>(kernel); };
    // No infer_output_shape: runtimes up to 1.23 at least dereference null for an absent optional input before they call it.
    op.get_start_version = [](const CustomOp*) { return 1; };
    op.get_end_version = [](const CustomOp*) { return 1; };
    return op;
}

// The operators, for one runtime (a process can hold several). They live as long as the library, which is linked never to
// be unloaded: sessions point to them.
OpDomain* domain_of(ApiTable table) {
    static const std::array<CustomOp, 3> ops = {make_op<kFloat>(), make_op<kFloat16>(), make_op<kBFloat16>()};
    static std::map<ApiTable, OpDomain*> domains;
    OpDomain*& domain = domains[table];
    if (domain == nullptr) {
        const Api api(table);
        OpDomain* made = nullptr;
        check(api.call<CreateOpDomain>("attnhub", &made));
        for (const CustomOp& op : ops) check(api.call<OpDomainAdd>(made, &op));
        domain = made;
    }
    return domain;
}

// Marks session options that have the operators already: ONNX Runtime refuses the same domain twice.
constexpr const char* kMark = "attnhub.custom_ops";

}  // namespace
}  // namespace attnhub::ort

// Called by ONNX Runtime's register_custom_ops_library. Registering twice on the same options changes nothing.
ATTNHUB_EXPORT attnhub::ort::Status* RegisterCustomOps(attnhub::ort::SessionOptions* options, const attnhub::ort::ApiBase* base) {
    using namespace attnhub::ort;
    const ApiTable table = base->get_api(kApiVersion);
    if (table == nullptr) {
        // Every runtime serves version 1, which is enough to say so.
        const Api oldest(base->get_api(1));
        return oldest.call<CreateStatus>(static_cast<int>(kFail), "attnhub: ONNX Runtime 1.17 or newer is needed");
    }
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const Api api(table);
    return guard(api, [&] {
        int registered = 0;
        check(api.call<HasSessionConfigEntry>(static_cast<const SessionOptions*>(options), kMark, &registered));
        if (registered != 0) return;
        check(api.call<AddOpDomain>(options, domain_of(table)));
        check(api.call<AddSessionConfigEntry>(options, kMark, "1"));
    });
}

// How many times a native kernel of this library has run to its end in this process.
ATTNHUB_EXPORT uint64_t attnhub_onnx_calls() { return attnhub::ort::calls.load(std::memory_order_relaxed); }

// Version of the operator set "attnhub" that the library serves.
ATTNHUB_EXPORT int32_t attnhub_onnx_opset_version() { return 1; }
