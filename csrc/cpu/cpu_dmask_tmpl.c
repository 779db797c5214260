/* Gradient of a float mask: dS, summed over the dimensions along which the mask is broadcast. Compiled once for each
 * instruction set.
 *
 * A pass of its own: one task owns one tile of the mask's gradient and visits every tile of scores that the mask entry
 * took part in, in a fixed order, so that no sum crosses tasks and no S x S array exists besides the result. It costs
 * two matrix products more than a backward that would add to the gradient as it goes, and needs no atomics.
 */
#include "cpu_bwd_tile.h"
#include "cpu_ops.h"

/* How one dimension of the mask meets the same dimension of the scores. */
static fa_range covered(const fa_tensor *mask, int dim, int64_t tile, int64_t tile_size, int64_t full)
{
    if (mask->size[dim] == 1)
        return (fa_range){0, full};
    return (fa_range){tile * tile_size, fa_min64((tile + 1) * tile_size, full)};
}

FA_INLINE void add_tile(float *sum, const float *g, int nk, int nv)
{
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++)
            v_store(sum + k * BM + v * VL, v_add(v_load(sum + k * BM + v * VL), v_load(g + k * BM + v * VL)));
}

/* sum[key][lane] over one query head: every panel and key block inside q and keys */
FA_INLINE void add_head(const bwd *w, int64_t h, fa_range q, fa_range keys, float *sum, fa_dtype dtype, bool pairs)
{
    fa_lanes *l = (fa_lanes *)(void *)(w->scratch + w->at.info);
    for (int64_t panel = q.lo / BM; panel * BM < q.hi; panel++) {
        lanes_init(l, w->a, &w->panels, &w->span, w->b, h, panel);
        if (!l->any)
            continue;
        panel_load(w, l, dtype, pairs);
        fa_range seen = fa_keys_of_queries(&w->span, l->first, l->last);
        for (int64_t block = keys.lo / BN; block * BN < keys.hi; block++) {
            if (fa_max64(seen.lo, block * BN) >= fa_min64(seen.hi, (block + 1) * BN))
                continue;
            key_block kb = block_begin(w, block, dtype, pairs);
            if (tile_grads(w, l, &kb, false, is_edge(w, l, &kb), pairs))
                add_tile(sum, at(w, w->at.grads), kb.nk, l->nv);
        }
    }
}

/* Sums the tile over keys or lanes where the mask has one, and writes it. */
FA_INLINE void store_tile(const fa_args *a, float *sum, int64_t mb, int64_t mh, fa_range q, fa_range keys)
{
    const fa_tensor *m = &a->dmask;
    bool one_query = m->size[2] == 1, one_key = m->size[3] == 1;
    for (int k = 1; one_key && k < BN; k++)
        for (int i = 0; i < BM; i++)
            sum[i] += sum[k * BM + i];
    int64_t nk = one_key ? 1 : keys.hi - keys.lo, nq = one_query ? 1 : q.hi - q.lo;
    for (int64_t k = 0; one_query && k < nk; k++)
        for (int i = 1; i < BM; i++)
            sum[k * BM] += sum[k * BM + i];
    for (int64_t i = 0; i < nq; i++) {
        char *row = (char *)(uintptr_t)mask_row(m, mb, mh, one_query ? 0 : q.lo + i);
        for (int64_t k = 0; k < nk; k++)
            fa_store(row, m->dtype, ((one_key ? 0 : keys.lo) + k) * m->stride[3], sum[k * BM + i]);
    }
}

FA_INLINE void dmask_task(const fa_args *a, int64_t task, char *scratch, char *shared, fa_dtype dtype, bool pairs)
{
    const int64_t *size = a->mask.size;
    int64_t sq = a->q.size[2], sk = a->k.size[2], hq = a->q.size[1];
    int64_t k_tiles = size[3] == 1 ? 1 : fa_ceil_div(sk, BN), q_tiles = size[2] == 1 ? 1 : fa_ceil_div(sq, BM);
    int64_t k_tile = task % k_tiles, rest = task / k_tiles, q_tile = rest % q_tiles;
    int64_t mh = rest / q_tiles % size[1], mb = rest / q_tiles / size[1];
    fa_range q = covered(&a->mask, 2, q_tile, BM, sq), keys = covered(&a->mask, 3, k_tile, BN, sk);
    fa_range heads = covered(&a->mask, 1, mh, 1, hq), batch = covered(&a->mask, 0, mb, 1, a->q.size[0]);
    fa_panels panels = {.group = 1, .sq = sq, .rows = BM, .count = fa_ceil_div(sq, BM)};
    fa_target target = {.lanes = VL, .panel_rows = BM, .key_block = BN, .pair_units = pairs};
    float *sum = (float *)(void *)(scratch + fa_bwd_scratch_of(a, &target).sum);
    memset(sum, 0, sizeof(float) * BN * BM);
    for (int64_t b = batch.lo; b < batch.hi; b++)
        for (int64_t h = heads.lo; h < heads.hi; h++) {
            bwd w = bwd_begin(a, scratch, shared, b, h / (hq / a->k.size[1]), panels, pairs);
            w.grads = true;
            add_head(&w, h, q, keys, sum, dtype, pairs);
        }
    store_tile(a, sum, mb, mh, q, keys);
}

#define DMASK(name, dtype, pairs)                                                                                      \
    void FA_KERNEL(dmask, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared);        \
    void FA_KERNEL(dmask, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared)         \
    {                                                                                                                  \
        (void)p;                                                                                                       \
        dmask_task(a, task, scratch, shared, dtype, pairs);                                                            \
    }

DMASK(f32, FA_F32, false)
DMASK(bf16, FA_BF16, BF16_PAIRS)
DMASK(f16, FA_F16, false)
