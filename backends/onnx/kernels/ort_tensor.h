// Tensors, attributes and errors of ONNX Runtime as C++ values.

#pragma once

#include <cstdint>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace attnhub::ort {

// An argument of the node is wrong; the message reaches the user of the session.
class InvalidArgument : public std::invalid_argument {
   public:
    using std::invalid_argument::invalid_argument;
};

// A call into ONNX Runtime failed; its status is handed back as it is.
struct RuntimeFailure {
    Status* status;
};

inline void check(Status* status) {
    if (status != nullptr) throw RuntimeFailure{status};
}

template <class... Parts>
[[noreturn]] void reject(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw InvalidArgument(text.str());
}

// "attnhub::FlashAttention 'name': reason"
inline std::string describe(const std::string& node, const char* reason) {
    return "attnhub::FlashAttention" + (node.empty() ? std::string() : " '" + node + "'") + ": " + reason;
}

// Runs `body`; no exception crosses the C boundary. `node` is the name that errors give.
template <class Body>
Status* guard(const Api& api, const std::string& node, Body&& body) noexcept {
    try {
        try {
            body();
            return nullptr;
        } catch (const RuntimeFailure& failure) {
            return failure.status;
        } catch (const InvalidArgument& error) {
            return api.call<CreateStatus>(static_cast<int>(kInvalidArgument), describe(node, error.what()).c_str());
        } catch (const std::bad_alloc&) {
            return api.call<CreateStatus>(static_cast<int>(kRuntimeException), describe(node, "out of memory").c_str());
        } catch (const std::exception& error) {
            return api.call<CreateStatus>(static_cast<int>(kRuntimeException), describe(node, error.what()).c_str());
        }
    } catch (...) {
        return api.call<CreateStatus>(static_cast<int>(kRuntimeException), "attnhub::FlashAttention: out of memory, or an unknown error");
    }
}

// The text that a runtime's function writes: first its size is asked, then the characters. Empty where it fails.
template <class Ask>
std::string read_text(const Api& api, Ask&& ask) {
    std::size_t size = 0;
    if (Status* status = ask(static_cast<char*>(nullptr), &size)) api.call<ReleaseStatus>(status);
    if (size == 0) return {};
    std::vector<char> text(size + 1, '\0');
    if (Status* status = ask(text.data(), &size)) {
        api.call<ReleaseStatus>(status);
        return {};
    }
    return text.data();
}

// TensorInfo that is released with its scope.
class OwnedTensorInfo {
   public:
    explicit OwnedTensorInfo(const Api& api) : api_(api) {}
    OwnedTensorInfo(const OwnedTensorInfo&) = delete;
    OwnedTensorInfo& operator=(const OwnedTensorInfo&) = delete;
    ~OwnedTensorInfo() {
        if (info_ != nullptr) api_.call<ReleaseTensorInfo>(info_);
    }
    TensorInfo** out() { return &info_; }
    TensorInfo* get() const { return info_; }

   private:
    const Api& api_;
    TensorInfo* info_ = nullptr;
};

using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {
    std::ostringstream text;
    text << '[';
    for (std::size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
    text << ']';
    return text.str();
}

// One input of the node: contiguous, row-major. Absent if `data` and `present` are unset.
struct Input {
    bool present = false;
    const void* data = nullptr;
    int type = kUndefined;
    Shape shape;
};

inline Input read_input(const Api& api, const KernelContext* context, std::size_t index, std::size_t count) {
    Input input;
    const Value* value = nullptr;
    if (index < count) check(api.call<GetInput>(context, index, &value));
    if (value == nullptr) return input;
    OwnedTensorInfo info(api);
    check(api.call<GetTensorTypeAndShape>(value, info.out()));
    std::size_t rank = 0;
    check(api.call<GetDimensionsCount>(static_cast<const TensorInfo*>(info.get()), &rank));
    input.shape.resize(rank);
    check(api.call<GetDimensions>(static_cast<const TensorInfo*>(info.get()), input.shape.data(), rank));
    check(api.call<GetTensorElementType>(static_cast<const TensorInfo*>(info.get()), &input.type));
    void* data = nullptr;
    check(api.call<GetTensorMutableData>(const_cast<Value*>(value), &data));
    input.data = data;
    input.present = true;
    return input;
}

// Memory of an output of the given shape; null where the node does not ask for that output.
inline void* make_output(const Api& api, KernelContext* context, std::size_t index, std::size_t count, const Shape& shape) {
    if (index >= count) return nullptr;
    Value* value = nullptr;
    check(api.call<GetOutput>(context, index, shape.data(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(api.call<GetTensorMutableData>(value, &data));
    return data;
}

// Attributes of a node. A missing one keeps its default; one of another type is an error, never ignored.
class Attributes {
   public:
    Attributes(const Api& api, const KernelInfo* info) : api_(api), info_(info) {}

    bool read(const char* name, int64_t* out) const {
        if (read_int(name, out)) return true;
        float real = 0;
        if (read_float(name, &real) || has_string(name)) reject("attribute ", name, " must be an integer");
        return false;
    }

    bool read(const char* name, float* out) const {
        if (read_float(name, out)) return true;
        int64_t whole = 0;
        if (read_int(name, &whole) || has_string(name)) reject("attribute ", name, " must be a float");
        return false;
    }

    bool read(const char* name, std::string* out) const {
        std::size_t size = 0;
        if (!succeeded(api_.call<GetAttributeString>(info_, name, static_cast<char*>(nullptr), &size))) {
            int64_t whole = 0;
            float real = 0;
            if (read_int(name, &whole) || read_float(name, &real)) reject("attribute ", name, " must be a string");
            return false;
        }
        std::vector<char> text(size + 1, '\0');
        check(api_.call<GetAttributeString>(info_, name, text.data(), &size));
        *out = text.data();
        return true;
    }

   private:
    bool succeeded(Status* status) const {
        if (status == nullptr) return true;
        api_.call<ReleaseStatus>(status);
        return false;
    }
    bool read_int(const char* name, int64_t* out) const { return succeeded(api_.call<GetAttributeInt>(info_, name, out)); }
    bool read_float(const char* name, float* out) const { return succeeded(api_.call<GetAttributeFloat>(info_, name, out)); }
    bool has_string(const char* name) const {
        std::size_t size = 0;
        return succeeded(api_.call<GetAttributeString>(info_, name, static_cast<char*>(nullptr), &size));
    }

    const Api& api_;
    const KernelInfo* info_;
};

}  // namespace attnhub::ort
