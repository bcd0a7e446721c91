// The node attnhub::FlashAttention, version 1, on the CPU. docs/onnx.md specifies it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "attnhub_cpu.h"
#include "ort_abi.h"

namespace attnhub::ort {

// Inputs in the order of ai.onnx Attention-24, then ours.
enum InputIndex : std::size_t { kQ, kK, kV, kAttnMask, kPastKey, kPastValue, kNonpadKvSeqlen, kSinks, kLeftpad, kAlibiSlopes, kInputs };

enum OutputIndex : std::size_t { kY, kPresentKey, kPresentValue, kLse, kOutputs };

// Computes a call in the place of the kernel: the session's user brought it (`register(options, backend=...)`). Everything the
// call points to is valid until it returns; `out` and `lse` are to be filled. Anything but 0 is an error, whose reason it writes.
using Callback = int32_t (*)(const attnhub_cpu_call* call, char* reason, int64_t reason_size);

// One node of a session: its attributes, and its kernel. `compute` may run on several threads at once.
class FlashAttention {
   public:
    // Throws InvalidArgument if an attribute has a value that the specification does not allow.
    FlashAttention(const Api& api, const KernelInfo* info, const std::string& name, Callback callback);

    // Throws InvalidArgument where the inputs do not fit each other; the message names them and their shapes.
    void compute(KernelContext* context) const;

    // The runtime that made this node.
    const Api& api() const { return api_; }

    // As in the graph.
    const std::string& name() const { return name_; }

    // Whether the kernel of this library computes, and not a callback.
    bool is_native() const { return callback_ == nullptr; }

   private:
    Api api_;
    std::string name_;
    Callback callback_;
    bool is_causal_ = false;
    bool top_left_ = false;
    bool has_scale_ = false;
    float scale_ = 0.0f;
    float softcap_ = 0.0f;
    int64_t window_left_ = -1;
    int64_t window_right_ = -1;
    int64_t chunk_ = 0;
};

}  // namespace attnhub::ort
