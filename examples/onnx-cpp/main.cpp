// Runs a file of attnhub.onnx.export by the native kernel, with ONNX Runtime's C API and nothing else.
//   main MODEL LIBRARY   where the library is what attnhub.onnx.library_path() names; inputs Q, K, V of [1, 2, 5, 8], output Y
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

static const OrtApi* api = OrtGetApiBase()->GetApi(17);  // ONNX Runtime 1.17 and every later one serve this version

static void check(OrtStatus* status) {
    if (status == nullptr) return;
    std::fprintf(stderr, "%s\n", api->GetErrorMessage(status));
    std::exit(1);
}

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: %s MODEL LIBRARY\n", argv[0]), 2;
    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "example", &env));
    check(api->CreateSessionOptions(&options));
    check(api->RegisterCustomOpsLibrary_V2(options, argv[2]));
    check(api->CreateSession(env, argv[1], options, &session));

    OrtMemoryInfo* memory;
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    const int64_t shape[] = {1, 2, 5, 8};
    std::vector<float> values(80);
    for (size_t i = 0; i < values.size(); ++i) values[i] = 0.01f * static_cast<float>(i);
    OrtValue *input, *output = nullptr;
    check(api->CreateTensorWithDataAsOrtValue(memory, values.data(), 80 * sizeof(float), shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
    const char *input_names[] = {"Q", "K", "V"}, *output_names[] = {"Y"};
    const OrtValue* inputs[] = {input, input, input};
    check(api->Run(session, nullptr, input_names, inputs, 3, output_names, 1, &output));
    float* out;
    check(api->GetTensorMutableData(output, reinterpret_cast<void**>(&out)));
    for (int i = 0; i < 80; ++i) std::printf("%.9g\n", out[i]);
}
