/* flashattn_ext: fused attention, the C API.
 *
 *   O = dropout(softmax(softcap(scale * Q K^T) + mask + alibi)) V
 *
 * One call computes one operator for a batch of heads without storing the S x S scores (Dao et al., "FlashAttention",
 * 2022; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
 *
 * Conventions
 *   - Letters: B batch, HQ query heads, HK key/value heads (HK divides HQ; query head h reads head h / (HQ / HK)),
 *     SQ queries, SK keys, D head dimension of Q and K, DV of V and O. D and DV are 1..512.
 *   - Every tensor is a 4-D view with strides in elements; any stride is allowed, also 0 (broadcast) on inputs.
 *   - N sequences: the batch, or with cu_q the sequences that are packed one behind the other in a batch of 1.
 *   - Logarithms are natural and the log-sum-exp is in nats.
 *   - A call is: fa_validate_* -> fa_plan_* -> caller provides plan.workspace bytes -> fa_run_*. Nothing here allocates,
 *     keeps state between calls, prints, or exits; every function may be called from any thread.
 */
#ifndef FA_H
#define FA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FA_MAX_HEAD_DIM 512
#define FA_MAX_SEQ ((int64_t)1 << 30) /* lanes count queries and keys in int32 */

/* ---- status ---------------------------------------------------------------------------------------------------- */

typedef enum fa_status {
    FA_OK = 0,
    FA_ERR_SHAPE,       /* sizes, strides, dtypes or devices that do not fit together */
    FA_ERR_VALUE,       /* a scalar out of its range */
    FA_ERR_UNSUPPORTED, /* valid, but no kernel on this machine can do it */
    FA_ERR_WORKSPACE,   /* the workspace handed in is missing or smaller than the plan says */
} fa_status;

/* The text of a refusal: names the value seen and the values allowed. */
typedef struct fa_error {
    char text[400];
} fa_error;

const char *fa_status_name(fa_status s);

/* ---- tensors --------------------------------------------------------------------------------------------------- */

typedef enum fa_dtype {
    FA_F32 = 0,
    FA_BF16,
    FA_F16,
    FA_F64,
    FA_BOOL, /* one byte, 0 or 1 */
    FA_I32,
    FA_I64,
    FA_I8,     /* keys and values of a quantised cache: value = stored * scale */
    FA_F8E4M3, /* likewise; float8_e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity (Micikevicius et al., 2022) */
} fa_dtype;

const char *fa_dtype_name(fa_dtype t);
size_t fa_dtype_size(fa_dtype t);

typedef struct fa_tensor {
    void *data;        /* NULL: the tensor is absent */
    int64_t size[4];
    int64_t stride[4]; /* in elements */
    fa_dtype dtype;
} fa_tensor;

/* ---- arguments -------------------------------------------------------------------------------------------------- */

typedef struct fa_args {
    /* inputs of both directions */
    fa_tensor q;          /* (B, HQ, SQ, D)   f32, bf16, f16 or f64; k and v have the same dtype */
    fa_tensor k;          /* (B, HK, SK, D) */
    fa_tensor v;          /* (B, HK, SK, DV) */
    fa_tensor mask;       /* each size full or 1 against (B, HQ, SQ, SK); bool (true = attend), f32 or q's dtype (added,
                             in nats); may be absent */
    fa_tensor sinks;      /* (B or 1, HQ, 1, 1) f32 or q's dtype: a logit of the denominator only; may be absent */
    fa_tensor alibi;      /* (B or 1, HQ, 1, 1) f32 or q's dtype: adds -slope * |i + offset - j|; may be absent */
    fa_tensor q_seqlens;  /* (B, 1, 1, 1) i32 or i64: rows at and past it give 0 and no gradient; may be absent */
    fa_tensor kv_seqlens; /* (B, 1, 1, 1) i32 or i64: keys at and past it are never read; may be absent */
    double scale;         /* multiplies Q K^T; any finite value */
    double softcap;       /* s -> softcap * tanh(s / softcap) right after the scale; 0 = off */
    int64_t window_left;  /* query i sees keys j with i + offset - left <= j <= i + offset + right; -1 = unbounded. */
    int64_t window_right; /* Causal is right = 0. */
    bool bottom_right;    /* offset: false = 0 (top-left), true = kv_len - q_len of the sequence */
    bool allow_tf32;      /* a GPU may round float32 to TF32 in products, which then keep 10 bits instead of 23 */
    double dropout_p;     /* in [0, 1]; see common/fa_philox.h for which weights it drops */
    uint64_t dropout_seed;

    /* Sequences. by_sequence: each is planned and computed as though it were alone, so that its bits depend on nothing
     * else in the call; needed by what follows up to first_batch. kv_seqlens counts as the length of each. */
    bool by_sequence;
    fa_tensor cu_q;        /* (N + 1, 1, 1, 1) i32 or i64, from 0 up: q, out, lse and their gradients have a batch of 1
                              and N sequences in a row, sequence n in the rows cu_q[n] .. cu_q[n + 1] - 1; rows past the
                              last give 0 and no gradient; may be absent */
    fa_tensor cu_k;        /* (N + 1, 1, 1, 1): the same of k, v and their gradients; may be absent */
    fa_tensor block_table; /* (N, pages, 1, 1) i32 or i64: k and v are pages (P, HK, page_size, D or DV), and key j of
                              sequence n is row j % page_size of page block_table[n][j / page_size]; what lies past the
                              length is never read; needs kv_seqlens; may be absent; forward only */
    int64_t page_size;     /* size[2] of k with block_table, else 0 */
    fa_tensor k_scale;     /* f32, given where k and v are i8 or f8e4m3: (1, 1, 1, 1), (1 or N, HK, 1, 1), or with */
    fa_tensor v_scale;     /* scale_per_token (N, HK, SK, 1), of pages (P, HK, page_size, 1) */
    bool scale_per_token;
    fa_tensor tree_mask;   /* (N, 1, SQ, SQ) bool: which of the last SQ keys each query sees (true = attend), instead of
                              causal; the keys before them are not masked by it; may be absent; forward only */
    int64_t splits_wanted; /* parts to cut the keys into, at most 1 a block; 0 = the planner's choice; forward only */
    int64_t mask_first;    /* key of the mask's first column, which hides nothing before it; the mask then has that many
                              columns less than SK. Set by fa_sequence for tree_mask, else 0 */
    int64_t first_batch;   /* what dropout calls the first of the batch */
    int64_t kv_appended;   /* in device memory: keys of each sequence behind those that kv_seqlens counts; else 0 */

    bool device_memory; /* the data of all tensors is memory of the CUDA device `device`: for fa_cuda_*, and then no */
    int device;         /* value, of a length or an offset either, is read or checked on the host */

    /* results of forward, inputs of backward */
    fa_tensor out; /* (B, HQ, SQ, DV) q's dtype */
    fa_tensor lse; /* (B, HQ, SQ, 1) f32 (f64 when q is f64); -inf for a row that sees nothing */

    /* backward only */
    fa_tensor dout;   /* (B, HQ, SQ, DV) q's dtype */
    fa_tensor dlse;   /* (B, HQ, SQ, 1) dtype of lse; may be absent */
    fa_tensor dq;     /* shape of q; absent = not wanted, likewise each of the others */
    fa_tensor dk;     /* shape of k */
    fa_tensor dv;     /* shape of v */
    fa_tensor dmask;  /* shape and dtype of mask (sizes of 1 are summed over); f32 or q's dtype */
    fa_tensor dsinks; /* shape of sinks, f32 (f64 when q is f64) */
} fa_args;

/* Full check of the arguments of one direction, before any work. Reads only what says where rows lie (q_seqlens,
 * kv_seqlens, cu_q, cu_k, block_table), which must be host memory. On refusal err->text says which value was seen and
 * which are allowed. */
fa_status fa_validate_forward(const fa_args *a, fa_error *err);
fa_status fa_validate_backward(const fa_args *a, fa_error *err);

/* ---- plan: a pure function of the arguments' integers ------------------------------------------------------------ */

typedef enum fa_kernel_kind {
    FA_KERNEL_SCALAR = 0, /* the reference in plain C; f64 always runs here */
    FA_KERNEL_PANEL,      /* queries in the lanes: prefill and training */
    FA_KERNEL_ROWS,       /* few query rows against many keys: streams K and V once */
    FA_KERNEL_CUDA,       /* on a GPU: a panel is the rows of a block, tasks the blocks of the (first) grid, threads and
                             thread_bytes the threads and the shared memory of a block */
} fa_kernel_kind;

typedef struct fa_plan {
    const char *kernel;      /* name of the kernel, e.g. "fa_fwd_avx512_f32" */
    fa_kernel_kind kind;
    int64_t block_rows;      /* BM: query rows of a panel */
    int64_t block_keys;      /* BN */
    int64_t panels;          /* panels of one (batch, kv head); of the rows kernel: kv heads */
    int64_t chunk_panels;    /* panels that share one pass over K and V; kv heads that one task takes in turn */
    int64_t splits;          /* parts the keys are cut into; never depends on the number of threads */
    int64_t split_keys;      /* keys of one part, a multiple of block_keys */
    int64_t tasks;           /* units of parallel work */
    int num_threads;         /* the number of workers asked for */
    int threads;             /* workers to start: at most that */
    size_t thread_bytes;     /* scratch of one worker */
    size_t shared_bytes;     /* partial results of split keys; fp32 dQ of backward */
    size_t workspace;        /* bytes to hand to fa_run_*: shared_bytes + threads * thread_bytes, plus alignment */
    double flops;            /* multiply-adds count 2; masked-out blocks do not count */
    double bytes;            /* each input read once, each output written once; on a GPU the workspace both */
    const char *why;         /* why this kernel */
    const char *why_splits;
    const void *family;      /* of a GPU's kernels, which runs the plan */
} fa_plan;

/* The arguments must have passed fa_validate_*. num_threads >= 1 is how many workers the caller can start. */
void fa_plan_forward(const fa_args *a, int num_threads, fa_plan *plan);
void fa_plan_backward(const fa_args *a, int num_threads, fa_plan *plan);
/* Writes a report of several lines, at most n bytes with the final 0; returns the length it wanted, as snprintf. */
int fa_plan_print(const fa_plan *plan, const fa_args *a, char *text, size_t n);

/* ---- execution -------------------------------------------------------------------------------------------------- */

/* Calls body(ctx, worker) once for each worker in [0, workers), possibly at the same time, and returns when all are
 * done. Running them one after the other in increasing order is allowed. */
typedef void fa_parallel_fn(void *pool, int workers, void (*body)(void *ctx, int worker), void *ctx);

typedef struct fa_exec {
    fa_parallel_fn *parallel; /* NULL: run serially */
    void *pool;               /* handed to parallel */
    void *workspace;          /* plan.workspace bytes, any alignment */
    size_t workspace_size;
    void *stream;             /* fa_cuda_run*: the cudaStream_t to use; NULL: the default one */
} fa_exec;

/* The results are the same, bit for bit, for any plan.threads and any schedule of the workers. */
fa_status fa_run_forward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err);
fa_status fa_run_backward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err);

/* ---- key/value caches -------------------------------------------------------------------------------------------- */

/* One step of filling a cache: rotary embedding (Su et al., "RoFormer", 2021) of queries and new keys, then new keys
 * and values written behind what each sequence holds, quantised where the cache is. */
typedef struct fa_append_args {
    fa_tensor k_new;       /* (N, HK, S_new, D), or with cu_new (1, HK, T, D)  f32, bf16, f16 or f64; may be absent */
    fa_tensor v_new;       /* the same with DV, k_new's dtype; given if and only if k_new is */
    fa_tensor cu_new;      /* (N + 1, 1, 1, 1) i32 or i64: rows of each sequence in k_new; may be absent */
    fa_tensor k_cache;     /* (N, HK, S_max, D), or with block_table pages (P, HK, page_size, D): k_new's dtype, i8 or */
    fa_tensor v_cache;     /* f8e4m3; written */
    fa_tensor block_table; /* (N, pages, 1, 1) i32 or i64; may be absent */
    fa_tensor seqlens;     /* (N, 1, 1, 1) i32 or i64: rows in the cache before; never written */
    fa_tensor k_scale;     /* as in fa_args; per token: written (largest magnitude / largest of the dtype) */
    fa_tensor v_scale;
    bool scale_per_token;
    fa_tensor q;           /* (N, HQ, SQ, D), to be turned into q_out; may be absent */
    fa_tensor q_out;       /* shape and dtype of q */
    fa_tensor rope_cos;    /* (positions, R / 2, 1, 1) f32 or k_new's dtype, R even and at most D: row i of sequence n */
    fa_tensor rope_sin;    /* turns by position seqlens[n] + i; may be absent: nothing is turned */
    bool rope_interleaved; /* pairs (2i, 2i + 1) instead of (i, i + R / 2) */
    bool device_memory;    /* as in fa_args */
    int device;
} fa_append_args;

fa_status fa_validate_append(const fa_append_args *a, fa_error *err);
/* Needs no workspace; num_threads workers at most. */
fa_status fa_run_append(const fa_append_args *a, int num_threads, const fa_exec *exec, fa_error *err);

/* Two results over disjoint keys become that over all of them. Rows of DV: out_* (B, H, S, DV), lse_* (B, H, S, 1);
 * lse f32 or f64. A row whose log-sum-exp is -inf takes no part, whatever its output holds. */
typedef struct fa_merge_args {
    fa_tensor out_a, lse_a, out_b, lse_b; /* out_a and out_b of one dtype, lse_a and lse_b likewise */
    fa_tensor out, lse;                   /* results, of the same */
} fa_merge_args;

fa_status fa_validate_merge(const fa_merge_args *a, fa_error *err);
fa_status fa_run_merge(const fa_merge_args *a, int num_threads, const fa_exec *exec, fa_error *err);

/* ---- CUDA: the same on tensors in the memory of a GPU (device_memory) --------------------------------------------- */

/* GPUs that can be used: 0 also without a driver, and in a build without CUDA. */
int fa_cuda_devices(void);

/* The arguments must have passed fa_validate_*. FLASHATTN_EXT_CUDA_ARCH = plain | sm80 | sm90 names the highest family
 * of kernels to use. */
void fa_cuda_plan_forward(const fa_args *a, fa_plan *plan);
void fa_cuda_plan_backward(const fa_args *a, fa_plan *plan);

/* As fa_run_append and fa_run_merge; what has no room in the cache or no page is dropped. device: of the tensors. */
fa_status fa_cuda_run_append(const fa_append_args *a, const fa_exec *exec, fa_error *err);
fa_status fa_cuda_run_merge(const fa_merge_args *a, int device, const fa_exec *exec, fa_error *err);

/* Waits for the device and copies bytes from its memory. */
fa_status fa_cuda_read(void *to, const void *from, size_t bytes, fa_error *err);

/* Starts the work on exec->stream and returns; nothing is synchronised, so that it can be captured in a CUDA graph.
 * plan.workspace bytes of the device's memory, aligned to 256. Lengths and offsets are not checked: beyond their range
 * they count as its end, and nothing outside of the tensors is read or written. */
fa_status fa_cuda_run(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err);

/* A kernel that fa_cuda_run would start. */
typedef struct fa_cuda_launch {
    char name[256];       /* mangled */
    int64_t blocks;
    int threads;          /* of a block */
    int shared_bytes;     /* of a block */
    int registers;        /* of a thread */
    int local_bytes;      /* of a thread: stack and spilled registers */
    int resident_blocks;  /* that a multiprocessor holds at a time */
} fa_cuda_launch;

/* Lists the kernels in the order of their start, at most n, and returns how many there are, without starting any; -1 and
 * err where that fails. The tensors need addresses, aligned as real ones are, but no memory. */
int fa_cuda_launches(const fa_args *a, const fa_plan *plan, fa_cuda_launch *list, int n, fa_error *err);

/* ---- what this machine and this build can do -------------------------------------------------------------------- */

typedef enum fa_cpu_flags {
    FA_CPU_AVX2 = 1 << 0,        /* with FMA and F16C */
    FA_CPU_AVX512 = 1 << 1,      /* F, BW, DQ, VL */
    FA_CPU_AVX512BF16 = 1 << 2,
    FA_CPU_AMX = 1 << 3,         /* tiles enabled by the system; no kernel yet */
    FA_CPU_NEON = 1 << 4,        /* no kernel yet */
} fa_cpu_flags;

/* What cpuid and xgetbv report. */
unsigned fa_cpu_detected(void);
/* The same, masked by the environment variable FLASHATTN_EXT_ISA = scalar | avx2 | avx512 | avx512bf16, the highest
 * instruction set to use; without it, all but those that are slower than a lower one on this processor. Read anew by
 * fa_cpu_refresh, and at the first call. */
unsigned fa_cpu_enabled(void);
void fa_cpu_refresh(void);

typedef struct fa_kernel_info {
    const char *name; /* fa_<op>_<target>_<dtype> */
    const char *op;   /* fwd, decode, bwd, dmask */
    const char *target;
    fa_dtype dtype;
    bool usable;      /* this machine has the instruction set and the environment allows it */
} fa_kernel_info;

/* Every kernel for the CPU in this build; returns their number, writes at most n. */
int fa_kernels(fa_kernel_info *list, int n);
/* Every kernel for GPUs; usable: on the machine's first. */
int fa_cuda_kernels(fa_kernel_info *list, int n);

/* Work whose time gives the machine's ceilings, on the calling thread, with the highest instruction set enabled. Each
 * returns how much it did: FLOP of fp32 multiply-adds, FLOP of bf16 dot products (0 where there is no such
 * instruction), bytes read. data holds `floats` fp32. */
double fa_probe_fma(int64_t steps);
double fa_probe_dot_bf16(int64_t steps);
double fa_probe_read(const float *data, int64_t floats);

#ifdef __cplusplus
}
#endif
#endif
