// Compares ort_abi.h with the official header, at compile time. Not part of the library: tests/backends/test_onnx.py compiles
// it where `onnxruntime_c_api.h` is installed (Debian's libonnxruntime-dev, or ATTNHUB_ORT_INCLUDE naming its folder).

#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ort_abi.h"

namespace ort = attnhub::ort;

#define SAME_SLOT(ours, theirs) static_assert(offsetof(OrtApi, theirs) / sizeof(void*) == ort::ours::index, #theirs)
#define SAME_FIELD(ours, theirs) static_assert(offsetof(OrtCustomOp, theirs) == offsetof(ort::CustomOp, ours), #theirs)

SAME_SLOT(CreateStatus, CreateStatus);
SAME_SLOT(CreateOpDomain, CreateCustomOpDomain);
SAME_SLOT(OpDomainAdd, CustomOpDomain_Add);
SAME_SLOT(AddOpDomain, AddCustomOpDomain);
SAME_SLOT(GetTensorMutableData, GetTensorMutableData);
SAME_SLOT(GetTensorElementType, GetTensorElementType);
SAME_SLOT(GetDimensionsCount, GetDimensionsCount);
SAME_SLOT(GetDimensions, GetDimensions);
SAME_SLOT(GetTensorTypeAndShape, GetTensorTypeAndShape);
SAME_SLOT(GetAttributeFloat, KernelInfoGetAttribute_float);
SAME_SLOT(GetAttributeInt, KernelInfoGetAttribute_int64);
SAME_SLOT(GetAttributeString, KernelInfoGetAttribute_string);
SAME_SLOT(GetInputCount, KernelContext_GetInputCount);
SAME_SLOT(GetOutputCount, KernelContext_GetOutputCount);
SAME_SLOT(GetInput, KernelContext_GetInput);
SAME_SLOT(GetOutput, KernelContext_GetOutput);
SAME_SLOT(ReleaseStatus, ReleaseStatus);
SAME_SLOT(ReleaseTensorInfo, ReleaseTensorTypeAndShapeInfo);
SAME_SLOT(AddSessionConfigEntry, AddSessionConfigEntry);
SAME_SLOT(HasSessionConfigEntry, HasSessionConfigEntry);
SAME_SLOT(GetSessionConfigEntry, GetSessionConfigEntry);
SAME_SLOT(GetNodeName, KernelInfo_GetNodeName);
SAME_SLOT(ParallelFor, KernelContext_ParallelFor);

SAME_FIELD(version, version);
SAME_FIELD(create_kernel, CreateKernel);
SAME_FIELD(get_name, GetName);
SAME_FIELD(get_execution_provider, GetExecutionProviderType);
SAME_FIELD(get_input_type, GetInputType);
SAME_FIELD(get_input_count, GetInputTypeCount);
SAME_FIELD(get_output_type, GetOutputType);
SAME_FIELD(get_output_count, GetOutputTypeCount);
SAME_FIELD(compute, KernelCompute);
SAME_FIELD(destroy, KernelDestroy);
SAME_FIELD(get_input_characteristic, GetInputCharacteristic);
SAME_FIELD(get_output_characteristic, GetOutputCharacteristic);
SAME_FIELD(get_input_memory_type, GetInputMemoryType);
SAME_FIELD(get_variadic_input_min_arity, GetVariadicInputMinArity);
SAME_FIELD(get_variadic_input_homogeneity, GetVariadicInputHomogeneity);
SAME_FIELD(get_variadic_output_min_arity, GetVariadicOutputMinArity);
SAME_FIELD(get_variadic_output_homogeneity, GetVariadicOutputHomogeneity);
SAME_FIELD(create_kernel_v2, CreateKernelV2);
SAME_FIELD(compute_v2, KernelComputeV2);
SAME_FIELD(infer_output_shape, InferOutputShapeFn);
SAME_FIELD(get_start_version, GetStartVersion);
SAME_FIELD(get_end_version, GetEndVersion);
SAME_FIELD(get_may_inplace, GetMayInplace);
SAME_FIELD(release_may_inplace, ReleaseMayInplace);
SAME_FIELD(get_alias_map, GetAliasMap);
SAME_FIELD(release_alias_map, ReleaseAliasMap);

static_assert(ORT_FAIL == ort::kFail && ORT_INVALID_ARGUMENT == ort::kInvalidArgument && ORT_RUNTIME_EXCEPTION == ort::kRuntimeException);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED == ort::kUndefined && ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == ort::kFloat);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == ort::kInt64 && ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL == ort::kBool);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == ort::kFloat16 && ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == ort::kBFloat16);
static_assert(INPUT_OUTPUT_REQUIRED == ort::kRequired && INPUT_OUTPUT_OPTIONAL == ort::kOptional && OrtMemTypeDefault == ort::kMemoryDefault);
