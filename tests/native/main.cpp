// attnhub_cpu_test: random problems through the C interface of the CPU kernels, judged in double precision.
//
//   attnhub_cpu_test [--isa NAME|all] [--seed N] [--count N] [--threads N] [--callers N] [--work N] [--mode forward|backward|errors|all]
//
// Problem n of a run has seed + n; a failure prints the options that repeat it alone. Exit status: 0, 1 after a failure, 2 for
// options that mean nothing here.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "check.h"
#include "coverage.h"

namespace native {
namespace {

struct Options {
  std::string isa = "all";
  std::string mode = "all";
  uint64_t seed = 1;
  int64_t count = 300;
  int64_t threads = 3;
  int64_t callers = 1;  // threads that call the library at once
  int64_t work = 4000000;
};

int usage(const std::string &what) {
  std::fprintf(stderr,
               "attnhub_cpu_test: %s\nattnhub_cpu_test [--isa NAME|all] [--seed N] [--count N] [--threads N] [--callers N] [--work N] "
               "[--mode forward|backward|errors|all]\n",
               what.c_str());
  return 2;
}

class Run {
 public:
  Run(const Options &options, std::vector<int32_t> isas, bool backward)
      : options_(options), isas_(std::move(isas)), backward_(backward), worst_(3 * isas_.size(), 0) {}

  int64_t failures() const { return failures_; }

  void all() {
    std::vector<std::thread> callers;
    for (int64_t n = 1; n < options_.callers; ++n) callers.emplace_back([this, n] { some(n); });
    some(0);
    for (std::thread &caller : callers) caller.join();
    for (size_t n = 0; n < isas_.size(); ++n) {
      const double *worst = &worst_[3 * n];
      std::printf("%s %s: %lld problems, worst errors of fp32, bf16, fp16: %.3f, %.3f, %.3f of what is allowed\n", name(),
                  attnhub_cpu_isa_name(isas_[n]), (long long)options_.count, worst[0], worst[1], worst[2]);
    }
    std::printf("parts:");
    for (const auto &part : coverage_.parts) std::printf(" %s %lld", part.first.c_str(), (long long)part.second);
    std::printf("\nloops on several threads: %lld, and about as many in the library's own way\n", (long long)threaded_calls.exchange(0));
  }

 private:
  const char *name() const { return backward_ ? "backward" : "forward"; }

  // Every callers-th problem.
  void some(int64_t first) {
    for (int64_t n = first; n < options_.count; n += options_.callers) {
      const uint64_t seed = options_.seed + static_cast<uint64_t>(n);
      const std::unique_ptr<Problem> p = make_problem(seed, backward_, static_cast<double>(options_.work));
      const int64_t *bias_shape = p->grad_bias ? p->grad_bias.shape().size : nullptr;
      const Results expected = backward_ ? reference(p->call, p->mask, p->sequences, p->gradients, bias_shape)
                                         : reference(p->call, p->mask, p->sequences);
      for (size_t i = 0; i < isas_.size(); ++i) {
        double worst = 0;
        const std::string error = backward_ ? check_backward(*p, expected, isas_[i], options_.threads, worst)
                                            : check_forward(*p, expected, isas_[i], options_.threads, worst);
        const std::lock_guard<std::mutex> lock(mutex_);
        double &worst_so_far = worst_[3 * i + static_cast<size_t>(p->call.dtype)];
        if (error.empty()) worst_so_far = std::max(worst_so_far, worst);
        if (!error.empty() && ++failures_ <= 20) {
          std::printf("FAIL attnhub_cpu_test --mode %s --isa %s --seed %llu --count 1 --threads %lld --work %lld: %s\n     %s\n", name(),
                      attnhub_cpu_isa_name(isas_[i]), (unsigned long long)p->seed, (long long)options_.threads, (long long)options_.work,
                      error.c_str(), p->text.c_str());
          std::fflush(stdout);
        }
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      count_parts(*p, coverage_);
    }
  }

  const Options &options_;
  const std::vector<int32_t> isas_;
  const bool backward_;
  std::mutex mutex_;  // guards what follows
  std::vector<double> worst_;
  int64_t failures_ = 0;
  Coverage coverage_;
};

int run(int argc, char **argv) {
  Options options;
  for (int n = 1; n < argc; ++n) {
    const std::string option = argv[n];
    if (n + 1 == argc) return usage(option + " needs a value");
    const char *value = argv[++n];
    if (option == "--isa") {
      options.isa = value;
    } else if (option == "--mode") {
      options.mode = value;
    } else if (option == "--seed") {
      options.seed = std::strtoull(value, nullptr, 0);
    } else {
      int64_t *const to = option == "--count"     ? &options.count
                          : option == "--threads" ? &options.threads
                          : option == "--callers" ? &options.callers
                          : option == "--work"    ? &options.work
                                                  : nullptr;
      if (!to || (*to = std::strtoll(value, nullptr, 0)) < 1) return usage(option + " " + value);
    }
  }
  std::vector<int32_t> isas;
  for (int32_t isa = 1; isa < ATTNHUB_CPU_ISA_COUNT; ++isa) {
    const bool wanted = options.isa == "all" || options.isa == attnhub_cpu_isa_name(isa);
    if (wanted && attnhub_cpu_isa_available(isa)) isas.push_back(isa);
  }
  if (isas.empty()) return usage("--isa " + options.isa + ": this processor or this build has no such instruction set");
  const bool all = options.mode == "all";
  bool known = false;
  int64_t failures = 0;
  if (all || options.mode == "errors") {
    known = true;
    int64_t tried = 0;
    failures += check_errors(tried);
    std::printf("errors: %lld bad calls\n", (long long)tried);
  }
  for (bool backward : {false, true}) {
    if (!all && options.mode != (backward ? "backward" : "forward")) continue;
    known = true;
    Run one(options, isas, backward);
    one.all();
    failures += one.failures();
  }
  if (!known) return usage("--mode " + options.mode);
  std::printf(failures ? "%lld failures\n" : "ok\n", (long long)failures);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace native

int main(int argc, char **argv) { return native::run(argc, argv); }
