// Bad calls: each must return a status with a text that names what is wrong, and write nothing.
#include <cstdio>
#include <functional>
#include <string>

#include "check.h"

namespace native {
namespace {

// A valid call of two sequences whose members a case spoils.
struct Valid {
  attnhub_cpu_call call;
  attnhub_cpu_mask mask;
  attnhub_cpu_gradients gradients;
  Buffer q, k, v, out, lse, grad_out, grad_q;
  int32_t lengths[4] = {5, 7, 0, 0};
  int32_t starts[4] = {0, 3, 9, 9};
  int32_t table[4] = {0, 1, 2, 3};
  float floats[64] = {};

  explicit Valid(Random &r) {
    std::memset(&call, 0, sizeof call);
    std::memset(&mask, 0, sizeof mask);
    std::memset(&gradients, 0, sizeof gradients);
    mask.window_left = mask.window_right = -1;
    Freedom dense;
    dense.last_is_dense = true;
    const auto tensor = [&](Buffer &b, int64_t heads, int64_t length, int64_t *strides) {
      b = Buffer(r, kFp32, {{2, heads, length, 16}}, dense);
      b.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); });
      std::copy(b.strides(), b.strides() + 3, strides);
      return b.data();
    };
    call.abi_version = ATTNHUB_CPU_ABI_VERSION;
    call.threads = 1;
    call.batch = 2;
    call.q_heads = 4;
    call.kv_heads = 2;
    call.seqlen_q = 9;
    call.seqlen_k = 12;
    call.head_dim = call.v_head_dim = 16;
    call.softmax_scale = 0.25;
    call.q = tensor(q, 4, 9, call.q_strides);
    call.k = tensor(k, 2, 12, call.k_strides);
    call.v = tensor(v, 2, 12, call.v_strides);
    call.out = tensor(out, 4, 9, call.out_strides);
    lse = Buffer(r, kFp32, {{1, 1, 1, 72}}, dense);
    lse.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); });
    call.lse = lse.as<float>();
    call.mask = &mask;
    gradients.grad_out = tensor(grad_out, 4, 9, gradients.grad_out_strides);
    gradients.grad_q = tensor(grad_q, 4, 9, gradients.grad_q_strides);
  }

  void pack() {  // one batch of 9 and 12 tokens, two sequences
    call.batch = 1;
    mask.cu_seqlens_q = mask.cu_seqlens_k = starts;
    mask.num_sequences = 2;
  }
  void page() {  // pages of 12 keys
    mask.block_table = table;
    mask.block_table_strides[0] = 1;
    mask.block_table_strides[1] = 1;
    mask.max_pages = 1;
    mask.num_pages = 2;
    mask.seqused_k = lengths;
  }
};

struct Case {
  const char *name;
  const char *text;  // to be in the error
  std::function<void(Valid &)> spoil;
  int32_t status = ATTNHUB_CPU_INVALID;
};

template <class T>
T *shifted(T *p) {
  return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(p) + 1);
}

std::vector<Case> cases() {
  const auto absent_isa = [](Valid &x) {
    for (int32_t isa = 1; isa < ATTNHUB_CPU_ISA_COUNT; ++isa) {
      if (!attnhub_cpu_isa_available(isa)) x.call.isa = isa;
    }
  };
  return {
      {"abi 0", "abi_version", [](Valid &x) { x.call.abi_version = 0; }},
      {"abi of tomorrow", "abi_version", [](Valid &x) { x.call.abi_version = ATTNHUB_CPU_ABI_VERSION + 1; }},
      {"dtype -1", "dtype", [](Valid &x) { x.call.dtype = -1; }},
      {"dtype 3", "dtype", [](Valid &x) { x.call.dtype = 3; }},
      {"isa -1", "isa", [](Valid &x) { x.call.isa = -1; }},
      {"isa 7", "isa", [](Valid &x) { x.call.isa = ATTNHUB_CPU_ISA_COUNT; }},
      {"isa 2^32 + 1", "isa", [](Valid &x) { x.call.isa = (int64_t(1) << 32) + 1; }},
      {"isa of another processor", "lacks", absent_isa, ATTNHUB_CPU_UNSUPPORTED},
      {"flag 4", "flags", [](Valid &x) { x.call.flags = 4; }},
      {"flag sign", "flags", [](Valid &x) { x.call.flags = INT64_MIN; }},
      {"no threads", "threads", [](Valid &x) { x.call.threads = 0; }},
      {"negative threads", "threads", [](Valid &x) { x.call.threads = -4; }},
      {"too many threads", "threads", [](Valid &x) { x.call.threads = int64_t(1) << 40; }},
      {"q null", "q", [](Valid &x) { x.call.q = nullptr; }},
      {"k null", "k", [](Valid &x) { x.call.k = nullptr; }},
      {"v null", "v", [](Valid &x) { x.call.v = nullptr; }},
      {"out null", "out", [](Valid &x) { x.call.out = nullptr; }},
      {"q misaligned", "q is not aligned", [](Valid &x) { x.call.q = shifted(x.call.q); }},
      {"k misaligned", "k is not aligned", [](Valid &x) { x.call.k = shifted(x.call.k); }},
      {"v misaligned", "v is not aligned", [](Valid &x) { x.call.v = shifted(x.call.v); }},
      {"out misaligned", "out is not aligned", [](Valid &x) { x.call.out = shifted(x.call.out); }},
      {"lse misaligned", "lse is not aligned", [](Valid &x) { x.call.lse = shifted(x.call.lse); }},
      {"batch -1", "batch", [](Valid &x) { x.call.batch = -1; }},
      {"batch 2^40", "batch", [](Valid &x) { x.call.batch = int64_t(1) << 40; }},
      {"head_dim 0", "head_dim", [](Valid &x) { x.call.head_dim = 0; }},
      {"head_dim 513", "head_dim", [](Valid &x) { x.call.head_dim = 513; }},
      {"v_head_dim 0", "v_head_dim", [](Valid &x) { x.call.v_head_dim = 0; }},
      {"v_head_dim 2^62", "v_head_dim", [](Valid &x) { x.call.v_head_dim = int64_t(1) << 62; }},
      {"no heads", "heads", [](Valid &x) { x.call.q_heads = 0; }},
      {"no kv_heads", "kv_heads", [](Valid &x) { x.call.kv_heads = 0; }},
      {"negative heads", "heads", [](Valid &x) { x.call.q_heads = x.call.kv_heads = -2; }},
      {"heads that do not divide", "multiple", [](Valid &x) { x.call.kv_heads = 3; }},
      {"heads 2^33", "q_heads", [](Valid &x) { x.call.q_heads = int64_t(1) << 33; }},
      {"seqlen_q -1", "seqlen_q", [](Valid &x) { x.call.seqlen_q = -1; }},
      {"seqlen_k -1", "seqlen_k", [](Valid &x) { x.call.seqlen_k = -1; }},
      {"seqlen_k 2^31", "seqlen_k", [](Valid &x) { x.call.seqlen_k = int64_t(1) << 31; }},
      {"too much in all", "too large",
       [](Valid &x) { x.call.batch = x.call.seqlen_q = (int64_t(1) << 31) - 1; }},
      {"scale NaN", "softmax_scale", [](Valid &x) { x.call.softmax_scale = std::nan(""); }},
      {"scale Inf", "softmax_scale", [](Valid &x) { x.call.softmax_scale = kInfinity; }},
      {"softcap NaN", "softcap", [](Valid &x) { x.call.softcap = std::nan(""); }},
      {"softcap -1", "softcap", [](Valid &x) { x.call.softcap = -1; }},
      {"softcap Inf", "softcap", [](Valid &x) { x.call.softcap = kInfinity; }},
      {"dropout 1", "dropout_p", [](Valid &x) { x.call.dropout_p = 1; }},
      {"dropout -0.1", "dropout_p", [](Valid &x) { x.call.dropout_p = -0.1; }},
      {"dropout NaN", "dropout_p", [](Valid &x) { x.call.dropout_p = std::nan(""); }},
      {"window -2", "window", [](Valid &x) { x.mask.window_left = -2; }},
      {"right window -2", "window", [](Valid &x) { x.mask.window_right = -2; }},
      {"chunk -1", "chunk", [](Valid &x) { x.mask.chunk = -1; }},
      {"segment_q alone", "segment", [](Valid &x) { x.mask.segment_q = x.lengths; }},
      {"block_k alone", "block", [](Valid &x) { x.mask.block_k = x.lengths; }},
      {"bias of unknown dtype", "bias_dtype",
       [](Valid &x) {
         x.mask.bias = x.floats;
         x.mask.bias_dtype = 9;
       }},
      {"blocks of no rows", "block_sparse",
       [](Valid &x) {
         x.mask.block_sparse = reinterpret_cast<const uint8_t *>(x.floats);
         x.mask.block_sparse_keys = 4;
       }},
      {"blocks of no keys", "block_sparse",
       [](Valid &x) {
         x.mask.block_sparse = reinterpret_cast<const uint8_t *>(x.floats);
         x.mask.block_sparse_rows = 4;
       }},
      {"seqused_k too long", "seqused_k[1] is 13",
       [](Valid &x) {
         x.lengths[1] = 13;
         x.mask.seqused_k = x.lengths;
       }},
      {"seqused_k negative", "seqused_k[0] is -1",
       [](Valid &x) {
         x.lengths[0] = -1;
         x.mask.seqused_k = x.lengths;
       }},
      {"packed without keys", "go together",
       [](Valid &x) {
         x.pack();
         x.mask.cu_seqlens_k = nullptr;
       }},
      {"packed, batch 2", "batch",
       [](Valid &x) {
         x.pack();
         x.call.batch = 2;
       }},
      {"packed from 1", "must be 0",
       [](Valid &x) {
         x.pack();
         x.starts[0] = 1;
       }},
      {"packed backwards", "decreases",
       [](Valid &x) {
         x.pack();
         x.starts[1] = 10;
       }},
      {"packed beyond the tokens", "tokens",
       [](Valid &x) {
         x.pack();
         x.starts[2] = 10;
       }},
      {"-1 packed sequences", "num_sequences",
       [](Valid &x) {
         x.pack();
         x.mask.num_sequences = -1;
       }},
      {"packed and paged", "exclude",
       [](Valid &x) {
         x.pack();
         x.page();
       }},
      {"packed, seqused_k too long", "seqused_k",
       [](Valid &x) {
         x.pack();
         x.mask.seqused_k = x.lengths;
       }},
      {"pages without lengths", "seqused_k",
       [](Valid &x) {
         x.page();
         x.mask.seqused_k = nullptr;
       }},
      {"pages of no keys", "page size",
       [](Valid &x) {
         x.page();
         x.call.seqlen_k = 0;
       }},
      {"-1 pages", "num_pages",
       [](Valid &x) {
         x.page();
         x.mask.num_pages = -1;
       }},
      {"a page too far", "block_table[1, 0] is 2",
       [](Valid &x) {
         x.page();
         x.table[1] = 2;
       }},
      {"page -1", "block_table[0, 0] is -1",
       [](Valid &x) {
         x.page();
         x.table[0] = -1;
       }},
      {"packed keys and pages", "cu_seqlens_k must be null",
       [](Valid &x) {
         x.page();
         x.pack();
       }},
      {"packed queries over a page too far", "block_table[1, 0] is 2",
       [](Valid &x) {
         x.page();
         x.pack();
         x.mask.cu_seqlens_k = nullptr;
         x.table[1] = 2;
       }},
      {"longer than its pages", "seqused_k",
       [](Valid &x) {
         x.page();
         x.lengths[0] = 13;
       }},
  };
}

std::vector<Case> backward_cases() {
  return {
      {"grad_out null", "grad_out", [](Valid &x) { x.gradients.grad_out = nullptr; }},
      {"grad_out misaligned", "grad_out", [](Valid &x) { x.gradients.grad_out = shifted(x.gradients.grad_out); }},
      {"grad_q misaligned", "grad_q", [](Valid &x) { x.gradients.grad_q = shifted(x.gradients.grad_q); }},
      {"grad_lse misaligned", "grad_lse", [](Valid &x) { x.gradients.grad_lse = shifted(x.floats); }},
      {"lse null", "lse", [](Valid &x) { x.call.lse = nullptr; }},
      {"paged", "block_table", [](Valid &x) { x.page(); }},
      {"grad_bias without bias", "grad_bias", [](Valid &x) { x.gradients.grad_bias = x.floats; }},
      {"grad_sinks without sinks", "grad_sinks", [](Valid &x) { x.gradients.grad_sinks = x.floats; }},
  };
}

int64_t try_one(const Case &one, const char *function, const std::function<int32_t(Valid &)> &run) {
  Random random(1);
  Valid valid(random);
  if (run(valid) != ATTNHUB_CPU_OK) {
    std::printf("FAIL %s: the call that cases spoil is refused: %s\n", function, attnhub_cpu_last_error());
    return 1;
  }
  const std::vector<unsigned char> out = valid.out.copy(), lse = valid.lse.copy(), grad_q = valid.grad_q.copy();
  one.spoil(valid);
  const int32_t status = run(valid);
  const std::string message = attnhub_cpu_last_error();
  const bool written = !valid.out.same(out) || !valid.lse.same(lse) || !valid.grad_q.same(grad_q);
  if (status == one.status && message.find(one.text) != std::string::npos && !written) return 0;
  std::printf("FAIL %s, %s: status %d, text \"%s\"%s; expected status %d and \"%s\"\n", function, one.name, status, message.c_str(),
              written ? ", and memory was written" : "", one.status, one.text);
  return 1;
}

}  // namespace

int64_t check_errors(int64_t &tried) {
  int64_t wrong = 0;
  const auto expect = [&](bool right, const char *what) {
    ++tried;
    if (!right) std::printf("FAIL %s\n", what);
    wrong += !right;
  };
  expect(attnhub_cpu_forward(nullptr) == ATTNHUB_CPU_INVALID && *attnhub_cpu_last_error(), "attnhub_cpu_forward(null)");
  expect(attnhub_cpu_abi_version() == ATTNHUB_CPU_ABI_VERSION, "abi version");
  expect(attnhub_cpu_isa_available(attnhub_cpu_best_isa()) == 1, "the best instruction set is there");
  for (int32_t isa : {-1, static_cast<int32_t>(ATTNHUB_CPU_ISA_COUNT), 1000}) {
    expect(!attnhub_cpu_isa_available(isa) && !attnhub_cpu_isa_name(isa), "an unknown instruction set is not there and has no name");
  }
  const auto forward = [](Valid &x) { return attnhub_cpu_forward(&x.call); };
  for (const Case &one : cases()) {
    ++tried;
    wrong += try_one(one, "forward", forward);
  }
  const auto backward = [](Valid &x) { return attnhub_cpu_backward(&x.call, &x.gradients); };
  for (const auto &list : {cases(), backward_cases()}) {
    for (const Case &one : list) {
      ++tried;
      wrong += try_one(one, "backward", backward);
    }
  }
  Random random(1);
  Valid valid(random);
  expect(attnhub_cpu_backward(nullptr, &valid.gradients) == ATTNHUB_CPU_INVALID, "attnhub_cpu_backward(null call)");
  expect(attnhub_cpu_backward(&valid.call, nullptr) == ATTNHUB_CPU_INVALID, "attnhub_cpu_backward(null gradients)");
  return wrong;
}

}  // namespace native
