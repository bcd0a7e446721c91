// What ONNX Runtime looks for in a custom-op library: `RegisterCustomOps`. One operator per element type, under one name.

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

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

// An operator of ours: ONNX Runtime hands it back when it makes a node.
struct Op : CustomOp {
    Callback callback = nullptr;
};

Status* create(const CustomOp* op, ApiTable table, const KernelInfo* info, void** kernel) {
    const Api own(table);
    std::string name;
    return guard(own, name, [&] {
        name = read_text(own, [&](char* out, std::size_t* size) { return own.call<GetNodeName>(info, out, size); });
        *kernel = new FlashAttention(own, info, name, static_cast<const Op*>(op)->callback);
    });
}

Status* compute(void* kernel, KernelContext* context) {
    const FlashAttention& attention = *static_cast<const FlashAttention*>(kernel);
    return guard(attention.api(), attention.name(), [&] {
        attention.compute(context);
        if (attention.is_native()) calls.fetch_add(1, std::memory_order_relaxed);
    });
}

template <int Type>
Op make_op(Callback callback) {
    Op op{};
    op.callback = callback;
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

// attnhub, attnhub.2, ... attnhub.32: names of one operator, by which files tell function bodies apart (bodies.py).
constexpr int kDomains = 32;

using Domains = std::array<OpDomain*, kDomains>;

// The operators, for one runtime (a process can hold several) and one callback or none. They live as long as the library, which
// is linked never to be unloaded: sessions point to them.
const Domains& domains_of(ApiTable table, Callback callback) {
    static std::map<std::pair<ApiTable, Callback>, Domains> all;
    const auto key = std::make_pair(table, callback);
    const auto found = all.find(key);
    if (found != all.end()) return found->second;
    const Api api(table);
    const auto* ops = new std::array<Op, 3>{make_op<kFloat>(callback), make_op<kFloat16>(callback), make_op<kBFloat16>(callback)};
    Domains domains{};
    for (int i = 0; i < kDomains; ++i) {
        const std::string name = i == 0 ? "attnhub" : "attnhub." + std::to_string(i + 1);
        check(api.call<CreateOpDomain>(name.c_str(), &domains[i]));
        for (const Op& op : *ops) check(api.call<OpDomainAdd>(domains[i], static_cast<const CustomOp*>(&op)));
    }
    return all.emplace(key, domains).first->second;
}

// Marks session options that have the operators already: ONNX Runtime refuses the same domain twice.
constexpr const char* kMark = "attnhub.custom_ops";
// The number of a callback, from attnhub_onnx_add_callback, that is to compute in the sessions of these options.
constexpr const char* kCallback = "attnhub.callback";

std::mutex mutex;
std::vector<Callback> callbacks;

Callback callback_of(const Api& api, const SessionOptions* options) {
    int has = 0;
    check(api.call<HasSessionConfigEntry>(options, kCallback, &has));
    if (has == 0) return nullptr;
    const std::string text =
        read_text(api, [&](char* out, std::size_t* size) { return api.call<GetSessionConfigEntry>(options, kCallback, out, size); });
    for (std::size_t i = 0; i < callbacks.size(); ++i)
        if (text == std::to_string(i)) return callbacks[i];
    reject("session option ", kCallback, " is '", text, "', which attnhub_onnx_add_callback did not give");
}

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
    const std::lock_guard<std::mutex> lock(mutex);
    const Api api(table);
    return guard(api, "", [&] {
        int registered = 0;
        check(api.call<HasSessionConfigEntry>(static_cast<const SessionOptions*>(options), kMark, &registered));
        if (registered != 0) return;
        for (OpDomain* domain : domains_of(table, callback_of(api, options))) check(api.call<AddOpDomain>(options, domain));
        check(api.call<AddSessionConfigEntry>(options, kMark, "1"));
    });
}

// A number for the session option attnhub.callback. The function must stay callable as long as the process lives.
ATTNHUB_EXPORT int64_t attnhub_onnx_add_callback(attnhub::ort::Callback callback) {
    using namespace attnhub::ort;
    const std::lock_guard<std::mutex> lock(mutex);
    callbacks.push_back(callback);
    return static_cast<int64_t>(callbacks.size()) - 1;
}

// How many times a native kernel of this library has run to its end in this process.
ATTNHUB_EXPORT uint64_t attnhub_onnx_calls() { return attnhub::ort::calls.load(std::memory_order_relaxed); }

// Version of the operator set "attnhub" that the library serves.
ATTNHUB_EXPORT int32_t attnhub_onnx_opset_version() { return 1; }
