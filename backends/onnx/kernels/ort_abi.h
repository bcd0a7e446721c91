// The part of ONNX Runtime's C interface that this library uses, declared from its documentation.
//
// No ONNX Runtime wheel ships the C headers. The OrtApi table is append-only: a function keeps its place for ever, so a
// place and a signature are all that a caller needs, and the library links against nothing. `abi_check.cpp` compares every
// place below with the official header where one is at hand.

#pragma once

#include <cstddef>
#include <cstdint>

namespace attnhub::ort {

// Opaque on both sides.
struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct SessionOptions;
struct OpDomain;
struct ShapeContext;

// The interface version asked for: 17 (ONNX Runtime 1.17) is the first with everything used here, and every later runtime serves it.
constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6 };

enum ElementType : int { kUndefined = 0, kFloat = 1, kInt64 = 7, kBool = 9, kFloat16 = 10, kBFloat16 = 16 };

enum Characteristic : int { kRequired = 0, kOptional = 1 };

enum MemoryType : int { kMemoryDefault = 0 };

// A function of the table: where it stands, and what it looks like.
template <std::size_t Index, class Signature>
struct Slot {
    static constexpr std::size_t index = Index;
    using Function = Signature*;
};

using CreateStatus = Slot<0, Status*(int code, const char* message)>;
using CreateOpDomain = Slot<26, Status*(const char* name, OpDomain** out)>;
using OpDomainAdd = Slot<27, Status*(OpDomain* domain, const struct CustomOp* op)>;
using AddOpDomain = Slot<28, Status*(SessionOptions* options, OpDomain* domain)>;
using GetTensorMutableData = Slot<51, Status*(Value* value, void** out)>;
using GetTensorElementType = Slot<60, Status*(const TensorInfo* info, int* out)>;
using GetDimensionsCount = Slot<61, Status*(const TensorInfo* info, std::size_t* out)>;
using GetDimensions = Slot<62, Status*(const TensorInfo* info, int64_t* out, std::size_t count)>;
using GetTensorTypeAndShape = Slot<65, Status*(const Value* value, TensorInfo** out)>;
using GetAttributeFloat = Slot<85, Status*(const KernelInfo* info, const char* name, float* out)>;
using GetAttributeInt = Slot<86, Status*(const KernelInfo* info, const char* name, int64_t* out)>;
using GetAttributeString = Slot<87, Status*(const KernelInfo* info, const char* name, char* out, std::size_t* size)>;
using GetInputCount = Slot<88, Status*(const KernelContext* context, std::size_t* out)>;
using GetOutputCount = Slot<89, Status*(const KernelContext* context, std::size_t* out)>;
using GetInput = Slot<90, Status*(const KernelContext* context, std::size_t index, const Value** out)>;
using GetOutput = Slot<91, Status*(KernelContext* context, std::size_t index, const int64_t* dims, std::size_t count, Value** out)>;
using ReleaseStatus = Slot<93, void(Status* status)>;
using ReleaseTensorInfo = Slot<99, void(TensorInfo* info)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions* options, const char* key, const char* value)>;
using HasSessionConfigEntry = Slot<237, Status*(const SessionOptions* options, const char* key, int* out)>;
using GetSessionConfigEntry = Slot<238, Status*(const SessionOptions* options, const char* key, char* out, std::size_t* size)>;
using GetNodeName = Slot<244, Status*(const KernelInfo* info, char* out, std::size_t* size)>;
using ParallelFor = Slot<274, Status*(const KernelContext* context, void (*task)(void*, std::size_t), std::size_t total, std::size_t batches, void* user)>;

using ApiTable = const void* const*;

struct ApiBase {
    ApiTable (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// Calls by slot: `api.call<GetInput>(context, index, &value)`.
class Api {
   public:
    Api() = default;
    explicit Api(ApiTable table) : table_(table) {}

    template <class S, class... Args>
    auto call(Args... args) const {
        return reinterpret_cast<typename S::Function>(const_cast<void*>(table_[S::index]))(args...);
    }

   private:
    ApiTable table_ = nullptr;
};

// OrtCustomOp as of version 17. Later versions append; a runtime reads no further than `version` allows.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, ApiTable, const KernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider)(const CustomOp*);
    int (*get_input_type)(const CustomOp*, std::size_t);
    std::size_t (*get_input_count)(const CustomOp*);
    int (*get_output_type)(const CustomOp*, std::size_t);
    std::size_t (*get_output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    int (*get_input_characteristic)(const CustomOp*, std::size_t);
    int (*get_output_characteristic)(const CustomOp*, std::size_t);
    int (*get_input_memory_type)(const CustomOp*, std::size_t);
    int (*get_variadic_input_min_arity)(const CustomOp*);
    int (*get_variadic_input_homogeneity)(const CustomOp*);
    int (*get_variadic_output_min_arity)(const CustomOp*);
    int (*get_variadic_output_homogeneity)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, ApiTable, const KernelInfo*, void**);
    Status* (*compute_v2)(void*, KernelContext*);
    Status* (*infer_output_shape)(const CustomOp*, ShapeContext*);
    int (*get_start_version)(const CustomOp*);
    int (*get_end_version)(const CustomOp*);
    std::size_t (*get_may_inplace)(int**, int**);
    void (*release_may_inplace)(int*, int*);
    std::size_t (*get_alias_map)(int**, int**);
    void (*release_alias_map)(int*, int*);
};

}  // namespace attnhub::ort
