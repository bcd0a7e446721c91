// Tolerances. A computed value may miss the exact one by
//     rounding(dtype) * |value| + smallest(dtype) + relative * size,
// where size is the sum of the magnitudes of all terms, times 1 + a quarter of the row's largest score (reference.h): an error
// of the score is a relative error of the weight. `relative` is 32 units of fp32 for everything that is added up in fp32, and
// 2^-8 where a path rounds weights (or, in a backward, gradients of scores) to bf16 before it multiplies. A pair too many or too
// few, a factor or a sink that is forgotten is 100 to 10,000 times that.
#include "check.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <thread>

namespace native {
namespace {

constexpr double kFp32Sums = 0x1p-19;
constexpr double kBf16Weights = 0x1p-8;
constexpr double kShortExp = 0x1p-17;  // of the polynomial that is used for weights which are rounded anyway; lse feels it

double rounding(int64_t kind) { return kind == kFp32 ? 0x1p-24 : kind == kBf16 ? 0x1p-8 : 0x1p-11; }
double smallest(int64_t kind) { return kind == kFp16 ? 0x1p-25 : 0x1p-100; }  // weights below 2^-126 are 0 by design

std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char *format, ...) {
  char line[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

struct Output {
  const char *name;
  Buffer *buffer;
  const Values *expected;
  double relative;
  bool added = false;  // to what is there: to start()
};

double start(int64_t at) { return static_cast<double>(at % 7 - 3) / 4; }

void prepare(const Output &o) {
  o.buffer->fill();
  int64_t at = 0;
  if (o.added) o.buffer->set_each([&](int64_t, int64_t, int64_t, int64_t) { return start(at++); });
}

// Every element of an array, in the order of its dimensions, against the expected values.
std::string compare(const Output &o, double &worst) {
  const Buffer &got = *o.buffer;
  const Values &expected = *o.expected;
  const char *name = o.name;
  std::string error;
  int64_t at = 0;
  got.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
    const double x = got.get(a, b, c, d), before = o.added ? start(at) : 0;
    const double want = before + expected.value[static_cast<size_t>(at)], size = std::fabs(before) + expected.size[static_cast<size_t>(at)];
    const double allowed = rounding(got.kind()) * std::fabs(want) + smallest(got.kind()) + o.relative * size;
    ++at;
    const double miss = x == want ? 0 : std::fabs(x - want) / allowed;
    if (miss > worst) worst = miss;
    if (!(miss <= 1) && error.empty())
      error = text("%s[%lld, %lld, %lld, %lld] is %.9g, expected %.9g within %.2g", name, (long long)a, (long long)b, (long long)c,
                   (long long)d, x, want, allowed);
  });
  if (error.empty() && at != static_cast<int64_t>(expected.value.size()))
    error = text("%s: the driver compares %lld elements", name, (long long)at);
  return error;
}

// A parallel_for as a caller may bring one: more threads than sense, and the last index first.
void scattered(void *context, int64_t count, attnhub_cpu_task fn, void *arg) {
  std::atomic<int64_t> &largest = *static_cast<std::atomic<int64_t> *>(context);
  if (count > 1) ++threaded_calls;
  if (count > largest.load()) largest.store(count);
  std::vector<std::thread> threads;
  for (int64_t i = count - 1; i >= 0; --i) threads.emplace_back(fn, arg, i);
  for (std::thread &thread : threads) thread.join();
}

// Calls `run` with one thread and with several.
template <class Run>
std::string check(Problem &p, const std::vector<Output> &outputs, int64_t isa, int64_t threads, double &worst, Run run) {
  std::vector<std::vector<unsigned char>> inputs, single;
  for (const Buffer *b : p.inputs()) inputs.push_back(b->copy());
  std::atomic<int64_t> largest{0};
  p.call.isa = isa;
  for (int64_t count : {int64_t(1), threads}) {
    p.call.threads = count;
    p.call.parallel_for = p.seed % 2 ? scattered : nullptr;
    p.call.parallel_ctx = &largest;
    for (const Output &o : outputs) prepare(o);
    const int32_t status = run();
    if (status != ATTNHUB_CPU_OK) return text("status %d: %s", status, attnhub_cpu_last_error());
    if (largest.load() > count) return text("parallel_for was asked for %lld threads of %lld", (long long)largest.load(), (long long)count);
    for (size_t n = 0; n < outputs.size(); ++n) {
      const Output &o = outputs[n];
      if (single.size() < outputs.size()) {
        const std::string error = compare(o, worst);
        if (!error.empty()) return error;
        if (!o.buffer->red_zone_intact()) return text("memory around %s was written", o.name);
        single.push_back(o.buffer->copy());
      } else if (!o.buffer->same(single[n])) {
        return text("%s has other bits with %lld threads", o.name, (long long)count);
      }
    }
  }
  size_t n = 0;
  for (const Buffer *b : p.inputs()) {
    if (!b->same(inputs[n++])) return "an input was written";
  }
  return "";
}

bool rounds_weights(const Problem &p, int64_t isa) {
  return p.call.dtype == kBf16 && (isa == ATTNHUB_CPU_ISA_AVX512_BF16 || isa == ATTNHUB_CPU_ISA_AMX_BF16);
}

}  // namespace

std::atomic<int64_t> threaded_calls{0};

std::string check_forward(Problem &p, const Results &expected, int64_t isa, int64_t threads, double &worst) {
  const bool rounds = rounds_weights(p, isa);
  std::vector<Output> outputs{{"out", &p.out, &expected.out, rounds ? kBf16Weights : kFp32Sums}};
  if (p.lse) outputs.push_back({"lse", &p.lse, &expected.lse, rounds ? kFp32Sums + kShortExp : kFp32Sums});
  return check(p, outputs, isa, threads, worst, [&] { return attnhub_cpu_forward(&p.call); });
}

std::string check_backward(Problem &p, const Results &expected, int64_t isa, int64_t threads, double &worst) {
  // out and lse as a forward gives them: those of the reference, rounded.
  int64_t at = 0;
  p.out.set_each([&](int64_t, int64_t, int64_t, int64_t) { return expected.out.value[static_cast<size_t>(at++)]; });
  p.lse.set_each([&](int64_t, int64_t, int64_t, int64_t i) { return expected.lse.value[static_cast<size_t>(i)]; });
  const std::vector<unsigned char> out = p.out.copy(), lse = p.lse.copy();
  const double input = p.call.dtype == kFp32 ? kFp32Sums : rounding(p.call.dtype);  // `out` is rounded, and gradients are taken from it
  const double relative = rounds_weights(p, isa) ? kBf16Weights : input;
  std::vector<Output> outputs;
  if (p.grad_q) outputs.push_back({"grad_q", &p.grad_q, &expected.grad_q, relative});
  if (p.grad_k) outputs.push_back({"grad_k", &p.grad_k, &expected.grad_k, relative});
  if (p.grad_v) outputs.push_back({"grad_v", &p.grad_v, &expected.grad_v, relative});
  if (p.grad_bias) outputs.push_back({"grad_bias", &p.grad_bias, &expected.grad_bias, relative, true});
  if (p.grad_sinks) outputs.push_back({"grad_sinks", &p.grad_sinks, &expected.grad_sinks, relative});
  const std::string error = check(p, outputs, isa, threads, worst, [&] { return attnhub_cpu_backward(&p.call, &p.gradients); });
  if (error.empty() && !(p.out.same(out) && p.lse.same(lse))) return "out or lse was written";
  return error;
}

}  // namespace native
