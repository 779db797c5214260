/* The plan of a call: which kernel, what tiles, how the work is cut. No tensor data is read here. */
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>

static const char why_scalar[] = "the reference in plain C: float64, or no vector kernel enabled";

static size_t align64(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

/* multiply-adds of one matrix product over the visible part of the scores, per unit of head dimension */
static double visible_scores(const fa_args *a)
{
    double sq = (double)a->q.size[2], sk = (double)a->k.size[2], heads = (double)(a->q.size[0] * a->q.size[1]);
    if (a->window_left < 0 && a->window_right < 0)
        return heads * sq * sk;
    double shift = a->bottom_right ? sk - sq : 0, seen = 0;
    const int samples = 64; /* rows spread evenly: exact enough for a report */
    for (int i = 0; i < samples; i++) {
        double row = (i + 0.5) / samples * sq + shift;
        double right = row + (double)a->window_right + 0.5, left = row - (double)a->window_left - 0.5;
        double hi = a->window_right >= 0 && right < sk ? right : sk, lo = a->window_left >= 0 && left > 0 ? left : 0;
        seen += hi > lo ? hi - lo : 0;
    }
    return heads * sq * seen / samples;
}

static double elements(const fa_tensor *t)
{
    if (!t->data)
        return 0;
    double n = 1;
    for (int i = 0; i < 4; i++)
        n *= (double)(t->stride[i] == 0 ? (t->size[i] > 0) : t->size[i]);
    return n;
}

static double bytes_of(const fa_tensor *t)
{
    return elements(t) * (double)fa_dtype_size(t->dtype);
}

void fa_plan_work(const fa_args *a, bool backward, fa_plan *p)
{
    double d = (double)a->q.size[3], dv = (double)a->v.size[3];
    double qkv = bytes_of(&a->q) + bytes_of(&a->k) + bytes_of(&a->v);
    p->flops = 2 * visible_scores(a) * (backward ? 3 * d + 2 * dv : d + dv);
    p->bytes = qkv * (backward ? 2 : 1) + bytes_of(&a->mask) + bytes_of(&a->out) +
               bytes_of(backward ? &a->dout : &a->lse);
}

void fa_plan_finish(fa_plan *p, int num_threads)
{
    const double worth_a_thread = 2e5; /* waking a worker costs some microseconds */
    double work = p->flops > p->bytes ? p->flops : p->bytes;
    int64_t most = work < worth_a_thread ? 1 : num_threads;
    p->num_threads = num_threads;
    p->threads = (int)fa_max64(1, fa_min64(most, p->tasks));
    p->thread_bytes = align64(p->thread_bytes);
    p->shared_bytes = align64(p->shared_bytes);
    p->workspace = p->shared_bytes + (size_t)p->threads * p->thread_bytes + 64;
}

enum { KEYS_LEAST = 512 }; /* shorter parts cost more in merging than they win */

static void plan_panels(const fa_args *a, const fa_target *t, int num_threads, fa_plan *p)
{
    enum { CHUNK_MAX = 16, CHUNK_USEFUL = 8, TASKS_A_THREAD = 4 };
    fa_panels panels = fa_panels_of(a, t->panel_rows);
    int64_t sequences = a->q.size[0] * a->k.size[1];
    p->panels = panels.count;
    p->split_keys = fa_split_keys(a, sequences * panels.count, KEYS_LEAST, t->key_block, &p->splits);
    /* The chunk may follow the number of threads: results do not depend on it. */
    int64_t chunk = fa_max64(1, sequences * panels.count * p->splits / (TASKS_A_THREAD * (int64_t)num_threads));
    int64_t most = t->panel_rows >= 64 ? CHUNK_USEFUL : CHUNK_MAX;
    chunk = fa_max64(1, fa_min64(fa_min64(chunk, most), panels.count));
    while (chunk > 1 && fa_fwd_scratch_of(a, t, chunk).bytes > FA_THREAD_BYTES_MAX)
        chunk--;
    p->chunk_panels = chunk;
    p->tasks = sequences * fa_ceil_div(panels.count, chunk) * p->splits;
    p->thread_bytes = fa_fwd_scratch_of(a, t, chunk).bytes;
}

/* Do the heads of a key lie closer together than the keys of a head? */
static bool heads_side_by_side(const fa_tensor *t)
{
    return llabs(t->stride[1]) < llabs(t->stride[2]);
}

/* A task takes several kv heads where that reads memory in its own order. Neither that nor the number of threads decides
 * how the keys are split, so that results depend on neither. */
static void plan_rows(const fa_args *a, const fa_target *t, int num_threads, fa_plan *p)
{
    enum { TASKS_A_THREAD = 2, BYTES_MAX = 128 << 10 };
    int64_t batch = a->q.size[0], heads = a->k.size[1], least = heads > 1 ? 2 * KEYS_LEAST : KEYS_LEAST;
    p->split_keys = fa_split_keys(a, batch, least, t->key_block, &p->splits);
    int64_t chunk = heads_side_by_side(&a->k) && heads_side_by_side(&a->v) ? fa_max64(1, heads) : 1;
    while (chunk > 1 && (batch * p->splits * fa_ceil_div(heads, chunk) < TASKS_A_THREAD * (int64_t)num_threads ||
                         fa_rows_scratch_of(a, t, chunk).bytes > BYTES_MAX))
        chunk = (chunk + 1) / 2;
    p->panels = heads;
    p->chunk_panels = chunk;
    p->tasks = batch * fa_ceil_div(heads, chunk) * p->splits;
    p->thread_bytes = fa_rows_scratch_of(a, t, chunk).bytes;
}

void fa_plan_forward_on(const fa_args *a, const fa_target *t, int num_threads, fa_plan *p)
{
    *p = (fa_plan){.kernel = t->name, .kind = t->kind, .block_rows = t->panel_rows, .block_keys = t->key_block,
                   .chunk_panels = 1, .splits = 1, .split_keys = a->k.size[2]};
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2];
    fa_plan_work(a, false, p);
    switch (t->kind) {
    case FA_KERNEL_SCALAR:
        p->panels = fa_ceil_div(a->q.size[2], FA_SCALAR_BLOCK);
        p->tasks = a->q.size[0] * a->q.size[1] * p->panels;
        p->thread_bytes = 16384;
        break;
    case FA_KERNEL_ROWS:
        plan_rows(a, t, num_threads, p);
        break;
    case FA_KERNEL_PANEL:
        plan_panels(a, t, num_threads, p);
        break;
    case FA_KERNEL_CUDA: break; /* planned in csrc/cuda */
    }
    if (p->splits > 1)
        p->shared_bytes = (size_t)(p->splits * rows * fa_partial_floats(a->v.size[3])) * 4;
    fa_plan_finish(p, num_threads);
    p->why = t->kind == FA_KERNEL_SCALAR ? why_scalar
             : t->kind == FA_KERNEL_ROWS ? "few query rows: K and V are streamed once"
                                         : "queries in the lanes, K and V shared by the panels of a chunk";
    p->why_splits = p->splits > 1 ? "too few rows to fill a machine: the keys are split" : "the keys stay whole";
}

void fa_plan_backward_on(const fa_args *a, const fa_target *t, int num_threads, fa_plan *p)
{
    *p = (fa_plan){.kernel = t->name, .kind = t->kind, .block_rows = t->panel_rows, .block_keys = t->key_block,
                   .chunk_panels = 1, .splits = 1, .split_keys = a->k.size[2]};
    int64_t sequences = a->q.size[0] * a->k.size[1];
    fa_plan_work(a, true, p);
    if (t->kind == FA_KERNEL_SCALAR) {
        p->panels = 1;
        p->tasks = sequences;
        p->thread_bytes = 16384;
    } else {
        fa_panels panels = fa_panels_of(a, t->panel_rows);
        p->panels = panels.count;
        p->tasks = sequences * fa_ceil_div(a->k.size[2], t->key_block);
        p->thread_bytes = fa_bwd_scratch_of(a, t).bytes;
        p->shared_bytes = fa_bwd_shared_of(a, t).bytes;
    }
    fa_plan_finish(p, num_threads);
    p->why = t->kind == FA_KERNEL_SCALAR
                 ? why_scalar
                 : "keys outermost; the parts of dQ are added in the order of the keys";
    p->why_splits = "one task a block of keys";
}

static const char *kind_name(fa_kernel_kind k)
{
    return k == FA_KERNEL_SCALAR ? "scalar" : k == FA_KERNEL_ROWS ? "rows" : k == FA_KERNEL_CUDA ? "cuda" : "panel";
}

/* the lines between why and the work */
static int print_cut(const fa_plan *p, char *text, size_t n)
{
    const char *format = p->kind == FA_KERNEL_CUDA
                             ? "tiles      %lld rows x %lld keys; %lld panels a head, %lld to a block\n"
                               "splits     %lld of %lld keys: %s\n"
                               "grid       %lld blocks of %d threads\n"
                               "memory     %zu bytes of workspace: %zu shared by all; %zu of shared memory a block\n"
                               "stages     %d of what is streamed\n"
                             : "tiles      %lld rows x %lld keys; %lld panels a kv head, %lld to a chunk\n"
                               "splits     %lld of %lld keys: %s\n"
                               "tasks      %lld on %d threads\n"
                               "workspace  %zu bytes: %zu shared, %zu a thread\n";
    return snprintf(text, n, format, (long long)p->block_rows, (long long)p->block_keys, (long long)p->panels,
                    (long long)p->chunk_panels, (long long)p->splits, (long long)p->split_keys, p->why_splits,
                    (long long)p->tasks, p->threads, p->workspace, p->shared_bytes, p->thread_bytes, p->stages);
}

int fa_plan_print(const fa_plan *p, const fa_args *a, char *text, size_t n)
{
    char cut[800];
    print_cut(p, cut, sizeof cut);
    return snprintf(text, n,
                    "shape      B %lld, HQ %lld over HK %lld, SQ %lld, SK %lld, D %lld, DV %lld, %s\n"
                    "kernel     %s (%s)\n"
                    "why        %s\n"
                    "%s"
                    "work       %.4g GFLOP, %.4g MB read and written once; intensity %.3g FLOP a byte\n",
                    (long long)a->q.size[0], (long long)a->q.size[1], (long long)a->k.size[1], (long long)a->q.size[2],
                    (long long)a->k.size[2], (long long)a->q.size[3], (long long)a->v.size[3],
                    fa_dtype_name(a->q.dtype), p->kernel, kind_name(p->kind), p->why, cut, p->flops * 1e-9,
                    p->bytes * 1e-6, p->bytes > 0 ? p->flops / p->bytes : 0);
}
