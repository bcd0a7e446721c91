#include "flash_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "attnhub_cpu.h"
#include "ort_tensor.h"

namespace attnhub::ort {
namespace {

// Names in messages, by InputIndex.
constexpr const char* kNames[kInputs] = {"Q",          "K",          "V",     "attn_mask", "past_key",
                                         "past_value", "nonpad_kv_seqlen", "sinks", "leftpad",   "alibi_slopes"};

// The newest version of the node that is served. A node of a later one says so by its attribute `version`.
constexpr int64_t kVersion = 1;

struct Sizes {
    int64_t batch, q_heads, kv_heads, seqlen_q, past, total, head_dim, v_head_dim;
};

void need_rank_4(const Input& input, InputIndex index, const char* layout) {
    if (input.shape.size() != 4) reject(kNames[index], " must have the 4 dimensions ", layout, ", got shape ", to_string(input.shape));
}

void need_shape(const Input& input, InputIndex index, const Shape& shape) {
    if (input.shape != shape) reject(kNames[index], " must have shape ", to_string(shape), ", got ", to_string(input.shape));
}

// Checks Q, K, V and the past against each other.
Sizes read_sizes(const Input* inputs) {
    const Input &q = inputs[kQ], &k = inputs[kK], &v = inputs[kV], &past_key = inputs[kPastKey], &past_value = inputs[kPastValue];
    need_rank_4(q, kQ, "[batch, q_heads, seqlen_q, head_dim]");
    need_rank_4(k, kK, "[batch, kv_heads, seqlen_k, head_dim]");
    need_rank_4(v, kV, "[batch, kv_heads, seqlen_k, v_head_dim]");
    Sizes sizes{q.shape[0], q.shape[1], k.shape[1], q.shape[2], 0, k.shape[2], q.shape[3], v.shape[3]};
    if (k.shape[0] != sizes.batch || k.shape[3] != sizes.head_dim)
        reject("K must agree with Q in batch and head_dim: Q is ", to_string(q.shape), ", K is ", to_string(k.shape));
    if (v.shape[0] != sizes.batch || v.shape[1] != sizes.kv_heads || v.shape[2] != k.shape[2])
        reject("V must agree with K in batch, kv_heads and seqlen_k: K is ", to_string(k.shape), ", V is ", to_string(v.shape));
    if (sizes.kv_heads < 1 || sizes.q_heads < 1 || sizes.q_heads % sizes.kv_heads != 0)
        reject("the ", sizes.q_heads, " heads of Q must be a multiple of the ", sizes.kv_heads, " heads of K and V");
    if (past_key.present != past_value.present) reject("past_key and past_value must be given together");
    if (past_key.present) {
        need_rank_4(past_key, kPastKey, "[batch, kv_heads, past_length, head_dim]");
        sizes.past = past_key.shape[2];
        sizes.total += sizes.past;
        need_shape(past_key, kPastKey, {sizes.batch, sizes.kv_heads, sizes.past, sizes.head_dim});
        need_shape(past_value, kPastValue, {sizes.batch, sizes.kv_heads, sizes.past, sizes.v_head_dim});
        if (inputs[kNonpadKvSeqlen].present) reject("nonpad_kv_seqlen and past_key cannot be given together");
    }
    return sizes;
}

int64_t core_dtype(int type) {
    switch (type) {
        case kFloat:
            return ATTNHUB_CPU_FP32;
        case kFloat16:
            return ATTNHUB_CPU_FP16;
        case kBFloat16:
            return ATTNHUB_CPU_BF16;
        default:
            reject("element type ", type, " is not float, float16 or bfloat16");
    }
}

std::size_t element_size(int type) { return type == kFloat ? 4 : 2; }

// Strides [batch, heads, rows, keys] of a mask that broadcasts to them; rank 1 to 4, aligned at the right.
void broadcast_strides(const Input& mask, const Sizes& sizes, int64_t* strides) {
    const int64_t full[4] = {sizes.batch, sizes.q_heads, sizes.seqlen_q, sizes.total};
    const std::size_t rank = mask.shape.size();
    bool fits = rank >= 1 && rank <= 4;
    int64_t step = 1;
    for (std::size_t back = 1; back <= 4; ++back) {
        const int64_t size = fits && back <= rank ? mask.shape[rank - back] : 1;
        fits = fits && (size == 1 || size == full[4 - back]);
        strides[4 - back] = size == 1 ? 0 : step;
        step *= size;
    }
    if (!fits) reject("attn_mask of shape ", to_string(mask.shape), " does not broadcast to [batch, q_heads, seqlen_q, seqlen_k] = ",
                      to_string(Shape(full, full + 4)));
}

// A vector of per-sequence lengths as the core wants it. Each must lie in [0, longest].
std::vector<int32_t> read_lengths(const Input& input, InputIndex index, int64_t batch, int64_t longest) {
    need_shape(input, index, {batch});
    const int64_t* values = static_cast<const int64_t*>(input.data);
    std::vector<int32_t> lengths(static_cast<std::size_t>(batch));
    for (int64_t b = 0; b < batch; ++b) {
        if (values[b] < 0 || values[b] > longest)
            reject(kNames[index], "[", b, "] is ", values[b], "; it must lie between 0 and the number of keys, ", longest);
        lengths[static_cast<std::size_t>(b)] = static_cast<int32_t>(values[b]);
    }
    return lengths;
}

// past and new, one behind the other along the tokens, for every (batch, head).
void concatenate(char* out, const Input& past, const Input& fresh) {
    const std::size_t width = static_cast<std::size_t>(fresh.shape[3]) * element_size(fresh.type);
    const std::size_t old_bytes = past.present ? static_cast<std::size_t>(past.shape[2]) * width : 0;
    const std::size_t new_bytes = static_cast<std::size_t>(fresh.shape[2]) * width;
    const int64_t slices = fresh.shape[0] * fresh.shape[1];
    const char* from_past = static_cast<const char*>(past.data);
    const char* from_fresh = static_cast<const char*>(fresh.data);
    for (int64_t slice = 0; slice < slices; ++slice) {
        if (old_bytes != 0) std::memcpy(out, from_past, old_bytes);
        if (new_bytes != 0) std::memcpy(out + old_bytes, from_fresh, new_bytes);
        from_past += old_bytes;
        from_fresh += new_bytes;
        out += old_bytes + new_bytes;
    }
}

// The keys (or values) to attend to: the new ones, or past and new in the present output, or else in `scratch`.
const void* gather(const Input& past, const Input& fresh, void* present, std::vector<char>* scratch) {
    if (present == nullptr && !past.present) return fresh.data;
    if (present == nullptr) {
        const int64_t rows = fresh.shape[0] * fresh.shape[1] * (past.shape[2] + fresh.shape[2]);
        scratch->resize(static_cast<std::size_t>(rows * fresh.shape[3]) * element_size(fresh.type));
        present = scratch->data();
    }
    concatenate(static_cast<char*>(present), past, fresh);
    return present;
}

void set_strides(int64_t* strides, int64_t heads, int64_t tokens, int64_t width) {
    strides[0] = heads * tokens * width;
    strides[1] = tokens * width;
    strides[2] = width;
}

// ONNX Runtime's own pool as the core's parallel_for.
struct Pool {
    const Api& api;
    const KernelContext* context;
    Status* failure;
};

struct Work {
    attnhub_cpu_task task;
    void* arg;
};

void run_in_pool(void* pool_pointer, int64_t count, attnhub_cpu_task task, void* arg) {
    Pool& pool = *static_cast<Pool*>(pool_pointer);
    Work work{task, arg};
    void (*run)(void*, std::size_t) = [](void* user, std::size_t index) {
        const Work& item = *static_cast<const Work*>(user);
        item.task(item.arg, static_cast<int64_t>(index));
    };
    Status* status =
        pool.api.call<ParallelFor>(pool.context, run, static_cast<std::size_t>(count), std::size_t{0}, static_cast<void*>(&work));
    if (status != nullptr) pool.failure = status;
}

}  // namespace

FlashAttention::FlashAttention(const Api& api, const KernelInfo* info, const std::string& name, Callback callback)
    : api_(api), name_(name), callback_(callback) {
    const Attributes attributes(api_, info);
    int64_t is_causal = 0, version = kVersion;
    attributes.read("version", &version);
    if (version < 1 || version > kVersion)
        reject("attribute version is ", version, "; this library knows the versions 1 to ", kVersion, ": update attnhub");
    std::string alignment = "bottom_right";
    attributes.read("is_causal", &is_causal);
    attributes.read("alignment", &alignment);
    has_scale_ = attributes.read("scale", &scale_);
    attributes.read("softcap", &softcap_);
    attributes.read("window_left", &window_left_);
    attributes.read("window_right", &window_right_);
    attributes.read("chunk", &chunk_);
    if (is_causal != 0 && is_causal != 1) reject("attribute is_causal is ", is_causal, "; it must be 0 or 1");
    if (alignment != "bottom_right" && alignment != "top_left")
        reject("attribute alignment is '", alignment, "'; it must be 'bottom_right' or 'top_left'");
    if (has_scale_ && !std::isfinite(scale_)) reject("attribute scale is ", scale_, "; it must be finite");
    if (!(softcap_ >= 0.0f) || !std::isfinite(softcap_)) reject("attribute softcap is ", softcap_, "; it must be at least 0, which is off");
    if (window_left_ < -1) reject("attribute window_left is ", window_left_, "; it must be at least 0, or -1 for unlimited");
    if (window_right_ < -1) reject("attribute window_right is ", window_right_, "; it must be at least 0, or -1 for unlimited");
    if (chunk_ < 0) reject("attribute chunk is ", chunk_, "; it must be at least 1, or 0 for none");
    is_causal_ = is_causal == 1;
    top_left_ = alignment == "top_left";
}

void FlashAttention::compute(KernelContext* context) const {
    std::size_t input_count = 0, output_count = 0;
    check(api_.call<GetInputCount>(static_cast<const KernelContext*>(context), &input_count));
    check(api_.call<GetOutputCount>(static_cast<const KernelContext*>(context), &output_count));
    Input inputs[kInputs];
    for (std::size_t i = 0; i < kInputs; ++i) inputs[i] = read_input(api_, context, i, input_count);
    const Sizes sizes = read_sizes(inputs);
    if (sizes.total > std::numeric_limits<int32_t>::max()) reject("more than 2^31 - 1 keys: ", sizes.total);

    attnhub_cpu_mask mask{};
    mask.window_left = window_left_;
    mask.window_right = window_right_;
    mask.chunk = chunk_;
    const Input& attn_mask = inputs[kAttnMask];
    if (attn_mask.present && attn_mask.type == kBool) {
        broadcast_strides(attn_mask, sizes, mask.bool_mask_strides);
        mask.bool_mask = static_cast<const uint8_t*>(attn_mask.data);
    } else if (attn_mask.present) {
        broadcast_strides(attn_mask, sizes, mask.bias_strides);
        mask.bias = attn_mask.data;
        mask.bias_dtype = core_dtype(attn_mask.type);
    }
    std::vector<int32_t> seqused_k, leftpad;
    if (inputs[kNonpadKvSeqlen].present) {
        seqused_k = read_lengths(inputs[kNonpadKvSeqlen], kNonpadKvSeqlen, sizes.batch, sizes.total);
        mask.seqused_k = seqused_k.data();
    }
    if (inputs[kLeftpad].present) {
        leftpad = read_lengths(inputs[kLeftpad], kLeftpad, sizes.batch, sizes.total);
        mask.leftpad = leftpad.data();
    }
    if (inputs[kSinks].present) {
        need_shape(inputs[kSinks], kSinks, {sizes.q_heads});
        mask.sinks = static_cast<const float*>(inputs[kSinks].data);
    }
    if (inputs[kAlibiSlopes].present) {
        const Shape& shape = inputs[kAlibiSlopes].shape;
        const bool per_sequence = shape == Shape{sizes.batch, sizes.q_heads};
        if (!per_sequence && shape != Shape{sizes.q_heads})
            reject("alibi_slopes must have shape [q_heads] or [batch, q_heads] = ", to_string({sizes.batch, sizes.q_heads}), ", got ",
                   to_string(shape));
        mask.alibi = static_cast<const float*>(inputs[kAlibiSlopes].data);
        mask.alibi_strides[0] = per_sequence ? sizes.q_heads : 0;
        mask.alibi_strides[1] = 1;
    }

    attnhub_cpu_call call{};
    call.abi_version = ATTNHUB_CPU_ABI_VERSION;
    call.dtype = core_dtype(inputs[kQ].type);
    call.isa = ATTNHUB_CPU_ISA_AUTO;
    call.flags = (is_causal_ ? ATTNHUB_CPU_CAUSAL : 0) | (top_left_ ? ATTNHUB_CPU_TOP_LEFT : 0);
    // The pool's size is not to be asked; tasks beyond it find the queue empty.
    call.threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
    call.batch = sizes.batch;
    call.q_heads = sizes.q_heads;
    call.kv_heads = sizes.kv_heads;
    call.seqlen_q = sizes.seqlen_q;
    call.seqlen_k = sizes.total;
    call.head_dim = sizes.head_dim;
    call.v_head_dim = sizes.v_head_dim;
    set_strides(call.q_strides, sizes.q_heads, sizes.seqlen_q, sizes.head_dim);
    set_strides(call.k_strides, sizes.kv_heads, sizes.total, sizes.head_dim);
    set_strides(call.v_strides, sizes.kv_heads, sizes.total, sizes.v_head_dim);
    set_strides(call.out_strides, sizes.q_heads, sizes.seqlen_q, sizes.v_head_dim);
    call.softmax_scale = has_scale_ ? scale_ : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, sizes.head_dim)));
    call.softcap = softcap_;
    call.mask = &mask;
    Pool pool{api_, context, nullptr};
    call.parallel_for = run_in_pool;
    call.parallel_ctx = &pool;

    const Shape present_key_shape{sizes.batch, sizes.kv_heads, sizes.total, sizes.head_dim};
    const Shape present_value_shape{sizes.batch, sizes.kv_heads, sizes.total, sizes.v_head_dim};
    call.out = make_output(api_, context, kY, output_count, {sizes.batch, sizes.q_heads, sizes.seqlen_q, sizes.v_head_dim});
    void* present_key = make_output(api_, context, kPresentKey, output_count, present_key_shape);
    void* present_value = make_output(api_, context, kPresentValue, output_count, present_value_shape);
    call.lse = static_cast<float*>(make_output(api_, context, kLse, output_count, {sizes.batch, sizes.q_heads, sizes.seqlen_q}));

    std::vector<char> key_scratch, value_scratch;
    call.q = inputs[kQ].data;
    call.k = gather(inputs[kPastKey], inputs[kK], present_key, &key_scratch);
    call.v = gather(inputs[kPastValue], inputs[kV], present_value, &value_scratch);

    if (callback_ != nullptr) {
        char reason[1024] = "";
        if (callback_(&call, reason, sizeof(reason)) != 0) throw std::runtime_error(reason);
        return;
    }
    const int32_t status = attnhub_cpu_forward(&call);
    check(pool.failure);
    if (status == ATTNHUB_CPU_NO_MEMORY) throw std::bad_alloc();
    if (status != ATTNHUB_CPU_OK) reject(attnhub_cpu_last_error());
}

}  // namespace attnhub::ort
