/* attnhub_cpu.h: the plain C interface of attnhub's CPU attention kernels.
 *
 * out = softmax(bias + softcap(softmax_scale * q k^T), masked, sinks in the denominator) v, computed in tiles with an
 * online softmax (arXiv 1805.02867, 2205.14135): fp32 accumulation, no N x N memory, the same bits for any number of
 * threads. The library reads no environment and keeps no state but a scratch buffer per thread; every function may be
 * called from several threads at once.
 *
 * Layout: q [batch, q_heads, seqlen_q, head_dim], k [batch, kv_heads, seqlen_k, head_dim], v [batch, kv_heads, seqlen_k,
 * v_head_dim], out [batch, q_heads, seqlen_q, v_head_dim]; strides in elements, last stride 1, the others arbitrary (0
 * included for inputs). Query head h reads K/V head h / (q_heads / kv_heads).
 *
 * Packed sequences: batch is 1, seqlen_q and seqlen_k are the numbers of tokens, and attnhub_cpu_mask.cu_seqlens_q/k
 * delimit num_sequences sequences. Data indexed by b is then indexed by the sequence, i and j are local to it. Tokens
 * that belong to no sequence get out 0 and lse -inf.
 *
 * Paged K/V: k is [num_pages, kv_heads, page_size, head_dim] (its "batch" stride is the page's), seqlen_k is page_size,
 * and attnhub_cpu_mask.block_table [batch, max_pages] names the pages of each sequence; seqused_k is then required. With
 * cu_seqlens_q, cu_seqlens_k being null, queries are packed over pages: block_table and seqused_k are those of the sequences.
 *
 * A row without any key: out 0, lse -inf (with a sink: lse = sink). Pairs that the mask removes are selected away: NaN or
 * Inf in masked or padded K/V reaches no result. lse is the natural logarithm of the whole denominator, sink included.
 */
#ifndef ATTNHUB_CPU_H
#define ATTNHUB_CPU_H

#include <stdint.h>

#if defined(__GNUC__)
#define ATTNHUB_CPU_EXPORT __attribute__((visibility("default")))
#else
#define ATTNHUB_CPU_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a meaning below changes; attnhub_cpu_call.abi_version must equal it. */
#define ATTNHUB_CPU_ABI_VERSION 2

enum attnhub_cpu_status {
  ATTNHUB_CPU_OK = 0,
  ATTNHUB_CPU_INVALID = 1,     /* an argument is wrong: attnhub_cpu_last_error() names it */
  ATTNHUB_CPU_UNSUPPORTED = 2, /* the instruction set asked for is not in this processor or not in this build */
  ATTNHUB_CPU_NO_MEMORY = 3    /* scratch memory could not be allocated */
};

enum attnhub_cpu_dtype { ATTNHUB_CPU_FP32 = 0, ATTNHUB_CPU_BF16 = 1, ATTNHUB_CPU_FP16 = 2 };

/* AUTO is the best one of this processor. The order is that of preference; a processor may have gaps. */
enum attnhub_cpu_isa {
  ATTNHUB_CPU_ISA_AUTO = 0,
  ATTNHUB_CPU_ISA_PORTABLE = 1,
  ATTNHUB_CPU_ISA_AVX2 = 2,        /* AVX2, FMA, F16C */
  ATTNHUB_CPU_ISA_AVX512 = 3,      /* AVX-512 F, BW, VL, DQ */
  ATTNHUB_CPU_ISA_AVX512_BF16 = 4, /* and vdpbf16ps, used for bf16 only */
  ATTNHUB_CPU_ISA_AMX_BF16 = 5,    /* and AMX tiles */
  ATTNHUB_CPU_ISA_NEON = 6,        /* Advanced SIMD of aarch64 */
  ATTNHUB_CPU_ISA_COUNT = 7
};

enum attnhub_cpu_flag {
  ATTNHUB_CPU_CAUSAL = 1,   /* j <= p, widened by prefix and blocks */
  ATTNHUB_CPU_TOP_LEFT = 2  /* position p of query i is i; without it p = i + len_k - len_q (bottom right) */
};

/* fn(arg, index) runs one unit of work; units are independent and may run on any thread, in any order. */
typedef void (*attnhub_cpu_task)(void *arg, int64_t index);

/* Calls fn(arg, index) for every index in [0, count) and returns when all have returned. It may run them one after
 * another. `count` never exceeds attnhub_cpu_call.threads. */
typedef void (*attnhub_cpu_parallel_for)(void *ctx, int64_t count, attnhub_cpu_task fn, void *arg);

/* Everything beyond a plain (causal) call. Zero-initialise it and set what is used; a null pointer means absent. */
typedef struct attnhub_cpu_mask {
  int64_t window_left;  /* j >= p - window_left;  -1 is unlimited */
  int64_t window_right; /* j <= p + window_right; -1 is unlimited */
  int64_t chunk;        /* floor(p / chunk) == floor(j / chunk); 0 is off */

  const int32_t *seqused_k; /* [batch]: len_k of each sequence, 0 <= seqused_k[b] <= its capacity */
  const int32_t *leftpad;   /* [batch]: j >= leftpad[b] */
  const int32_t *prefix;    /* [batch]: widens causal to j <= p or j < prefix[b] */

  const int32_t *segment_q; /* [batch, len_q]: segment_q[b, i] == segment_k[b, j] */
  const int32_t *segment_k; /* [batch, len_k] */
  int64_t segment_q_strides[2];
  int64_t segment_k_strides[2];

  const int32_t *block_q; /* as segments: widens causal to j <= p or block_q[b, i] == block_k[b, j] >= 0 */
  const int32_t *block_k;
  int64_t block_q_strides[2];
  int64_t block_k_strides[2];

  const uint8_t *bool_mask; /* [batch, q_heads, len_q, len_k] by strides (0 broadcasts): 0 removes the pair */
  int64_t bool_mask_strides[4];

  const void *bias; /* as bool_mask: added to the scaled, soft-capped score; -inf removes the pair */
  int64_t bias_strides[4];
  int64_t bias_dtype; /* attnhub_cpu_dtype */

  const float *alibi; /* [batch, q_heads] by strides: adds -alibi * |p - j| */
  int64_t alibi_strides[2];

  const uint8_t *block_sparse; /* [batch, q_heads, ceil(len_q / rows), ceil(len_k / keys)] by strides: 0 removes the block */
  int64_t block_sparse_strides[4];
  int64_t block_sparse_rows;
  int64_t block_sparse_keys;

  const float *sinks; /* [q_heads]: exp(sink) joins the denominator */

  const int32_t *cu_seqlens_q; /* [num_sequences + 1], starting with 0, not decreasing */
  const int32_t *cu_seqlens_k;
  int64_t num_sequences;

  const int32_t *block_table; /* [batch, max_pages] by strides */
  int64_t block_table_strides[2];
  int64_t max_pages;
  int64_t num_pages; /* entries that are used must lie in [0, num_pages) */
} attnhub_cpu_mask;

/* One attention call. Members are 8 bytes wide, so that any language can pack them without padding. */
typedef struct attnhub_cpu_call {
  int64_t abi_version; /* ATTNHUB_CPU_ABI_VERSION */
  int64_t dtype;       /* attnhub_cpu_dtype of q, k, v and out */
  int64_t isa;         /* attnhub_cpu_isa */
  int64_t flags;       /* attnhub_cpu_flag */
  int64_t threads;     /* at most this many threads work at once; at least 1 */

  const void *q;
  const void *k;
  const void *v;
  void *out;
  float *lse; /* [batch, q_heads, seqlen_q] contiguous, or null */

  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t head_dim;   /* 1 to 512 */
  int64_t v_head_dim; /* 1 to 512 */

  int64_t q_strides[3]; /* batch, head, token */
  int64_t k_strides[3];
  int64_t v_strides[3];
  int64_t out_strides[3];

  double softmax_scale;
  double softcap; /* 0 is off, else c * tanh(score / c), c > 0 */

  /* Dropout of the weights behind the softmax; the denominator and lse do not know of it. Philox4x32-10: the pair (b, h, i, j)
   * uses word j & 3 of counter (j >> 2, i, b * q_heads + h, offset mod 2^32) under the key (seed mod 2^32, seed >> 32) and is
   * kept if that word is at least floor(dropout_p * 2^32); kept weights are scaled by 1 / (1 - dropout_p). */
  double dropout_p; /* 0 is off; in [0, 1) */
  uint64_t dropout_seed;
  uint64_t dropout_offset;

  const attnhub_cpu_mask *mask; /* null for none */

  attnhub_cpu_parallel_for parallel_for; /* null: the library's own (the process's libgomp if it has one, else std::thread) */
  void *parallel_ctx;
} attnhub_cpu_call;

/* Computes one call; returns an attnhub_cpu_status. Nothing is written unless it returns ATTNHUB_CPU_OK, except after
 * ATTNHUB_CPU_NO_MEMORY, when out and lse are undefined. Sizes of 0 are served: no rows, or rows without keys. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_forward(const attnhub_cpu_call *call);

/* What a backward takes beside the call, whose `out` and `lse` are then inputs: those of any forward of the same call.
 * Gradients have the dtype of q and the shapes of q, k and v; a null pointer means that it is not wanted. They are written,
 * not added to; every element is written. grad_k and grad_v are sums over the query heads that share a K/V head. */
typedef struct attnhub_cpu_gradients {
  const void *grad_out; /* as out */
  int64_t grad_out_strides[3];
  const float *grad_lse; /* [batch, q_heads, seqlen_q] contiguous, or null for zeros. Where lse is -inf it is not read */

  void *grad_q;
  void *grad_k;
  void *grad_v;
  int64_t grad_q_strides[3];
  int64_t grad_k_strides[3];
  int64_t grad_v_strides[3];

  /* fp32, in the bias's shape: a stride of 0 wherever mask.bias_strides has one because the bias is broadcast there, and its gradient
   * is a sum. Alone among the gradients it is added to: its size is the caller's to know, and so is filling it with zeros. */
  float *grad_bias;
  int64_t grad_bias_strides[4];
  float *grad_sinks; /* [q_heads] */
} attnhub_cpu_gradients;

/* Computes the gradients of one call. Returns as attnhub_cpu_forward does. Paged K/V has no backward: a block_table is invalid.
 * A row without keys gives and gets gradients of 0. Deterministic like the forward: the same bits for any number of threads. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_backward(const attnhub_cpu_call *call, const attnhub_cpu_gradients *gradients);

/* How a call is cut into tasks. Follows from the sizes, the instruction set and the cache; block_rows alone also looks at
 * `threads`, and changes no result. The others change roundings. */
typedef struct attnhub_cpu_blocks {
  int64_t block_rows; /* rows (queries times heads of a K/V head) that share packed K and V */
  int64_t block_keys; /* keys that are packed at a time, from the size of the second-level cache */
  int64_t splits;     /* parts of the keys that are worked on apart and merged */
  int64_t split_keys;
  int64_t tasks;
  int64_t level2_bytes;
} attnhub_cpu_blocks;

/* The cut of a call of these sizes without mask; no pointer of the call is read. Either result may be null. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_cut(const attnhub_cpu_call *call, attnhub_cpu_blocks *forward, attnhub_cpu_blocks *backward);

/* Limits of this machine, for benchmarks; each measures for 20 ms. 0 when the instruction set is not there, an argument is out
 * of range, or memory is short.
 *
 * Operations a second of `threads` threads that multiply and add on registers alone, in the instructions that a call of this
 * dtype computes with: fp32 for FP32 and FP16; for BF16 AMX tiles, vdpbf16ps or fp32, whichever is the instruction set's. */
ATTNHUB_CPU_EXPORT double attnhub_cpu_peak_flops(int32_t isa, int32_t dtype, int64_t threads);

/* Bytes a second that `threads` threads read from `bytes` of memory between them, which should be several times the last
 * level's cache; allocated, written once, and freed. Other than 0, huge_pages asks for pages of 2 MiB, where Linux gives them to
 * those who ask: tensors lie on the pages that it gives without. */
ATTNHUB_CPU_EXPORT double attnhub_cpu_read_rate(int32_t isa, int64_t threads, int64_t bytes, int32_t huge_pages);

/* Why the last call on this thread failed. Never null; valid until the next failing call on this thread. */
ATTNHUB_CPU_EXPORT const char *attnhub_cpu_last_error(void);

/* 1 if this build and this processor have the instruction set, else 0. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_isa_available(int32_t isa);

/* What ATTNHUB_CPU_ISA_AUTO stands for here. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_best_isa(void);

/* "auto", "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"; null for other numbers. */
ATTNHUB_CPU_EXPORT const char *attnhub_cpu_isa_name(int32_t isa);

/* ATTNHUB_CPU_ABI_VERSION of the library, to be checked before the first call. */
ATTNHUB_CPU_EXPORT int32_t attnhub_cpu_abi_version(void);

#ifdef __cplusplus
}
#endif

#endif /* ATTNHUB_CPU_H */
