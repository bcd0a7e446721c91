// Attention and its gradients by the definition in attnhub_cpu.h, in double precision, pair by pair. Beside every sum stands
// the sum of its terms' magnitudes, which is what rounding errors are measured by.
#pragma once

#include <vector>

#include "numbers.h"

namespace native {

// A sequence of the batch: its tokens and where they lie.
struct Span {
  int64_t index;
  int64_t batch;
  int64_t q_begin;
  int64_t len_q;
  int64_t k_begin;
  int64_t len_k;
};

Span span_of(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, int64_t sequence);

// Whether query i of head h attends to key j.
bool allowed(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, const Span &span, int64_t h, int64_t i, int64_t j);

// Element offset of a row of k or v (paged or not), and of q, out or grad_out.
int64_t key_offset(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, const Span &span, const int64_t *strides, int64_t kv,
                   int64_t j);
int64_t query_offset(const Span &span, const int64_t *strides, int64_t h, int64_t i);

// Values, and a bound that an error is to be compared with: `size` sums the magnitudes of a value's terms.
struct Values {
  std::vector<double> value;
  std::vector<double> size;
  void resize(int64_t n) {
    value.assign(static_cast<size_t>(n), 0);
    size.assign(static_cast<size_t>(n), 0);
  }
  void add(int64_t at, double x, double magnitude) {
    value[static_cast<size_t>(at)] += x;
    size[static_cast<size_t>(at)] += magnitude;
  }
};

// All in [batch, heads, tokens, dim], whatever the strides of the call. The size of an element of lse, and a factor in every
// other size, is 1 + the largest score's magnitude in its row.
struct Results {
  Values out, lse;
  Values grad_q, grad_k, grad_v;
  Values grad_bias;  // [sequences, q_heads, longest len_q, longest len_k], 1 where the bias is broadcast
  Values grad_sinks;
};

Results reference(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, int64_t sequences);

// As above with gradients; bias_shape is that of grad_bias.
Results reference(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, int64_t sequences, const attnhub_cpu_gradients &gradients,
                  const int64_t *bias_shape);

}  // namespace native
