/* Panels of query rows, and where everything lies in a worker's scratch. */
#include "plan.h"

fa_panels fa_panels_of(const fa_args *a, int64_t panel_rows)
{
    fa_panels p = {.group = fa_group(a), .sq = a->q.size[2], .rows = panel_rows};
    p.packed = p.sq < panel_rows;
    p.count = p.packed ? fa_ceil_div(p.group * p.sq, panel_rows) : p.group * fa_ceil_div(p.sq, panel_rows);
    return p;
}

int64_t fa_panel_size(const fa_panels *p, int64_t panel)
{
    int64_t first = (p->packed ? panel : panel / p->group) * p->rows;
    return fa_min64(p->rows, (p->packed ? p->group * p->sq : p->sq) - first);
}

void fa_panel_row(const fa_panels *p, int64_t panel, int64_t row, int64_t *head, int64_t *query)
{
    if (p->packed) {
        int64_t at = panel * p->rows + row;
        *head = at / p->sq;
        *query = at % p->sq;
    } else {
        *head = panel % p->group;
        *query = panel / p->group * p->rows + row;
    }
}

fa_range fa_panel_queries(const fa_panels *p, int64_t panel)
{
    if (p->packed)
        return (fa_range){0, p->sq};
    int64_t first = panel / p->group * p->rows;
    return (fa_range){first, fa_min64(first + p->rows, p->sq)};
}

/* Reserves bytes, rounded up to a cache line, and returns where they begin. */
static size_t take(size_t *top, int64_t bytes)
{
    size_t at = *top;
    *top += (size_t)fa_round_up(bytes, 64);
    return at;
}

fa_fwd_scratch fa_fwd_scratch_of(const fa_args *a, const fa_target *t, int64_t chunk_panels)
{
    int64_t d = a->q.size[3], bm = t->panel_rows, bn = t->key_block;
    int64_t units = t->pair_units ? (d + 1) / 2 : d, dv_pad = fa_padded(a->v.size[3], t->lanes);
    fa_fwd_scratch s = {0};
    s.info = take(&s.panel_bytes, FA_LANES_BYTES);
    s.q_t = take(&s.panel_bytes, units * bm * 4);
    s.out = take(&s.panel_bytes, bm * dv_pad * 4);
    s.max = take(&s.panel_bytes, bm * 4);
    s.sum = take(&s.panel_bytes, bm * 4);
    s.panel = take(&s.bytes, (int64_t)s.panel_bytes * chunk_panels);
    s.scores = take(&s.bytes, bn * bm * 4);
    s.pairs = take(&s.bytes, t->pair_units ? bn * bm * 2 : 0);
    s.bias = take(&s.bytes, a->mask.data ? bn * bm * 4 : 0);
    s.rescale = take(&s.bytes, bm * 4);
    s.k = take(&s.bytes, bn * fa_padded(units, t->lanes) * 4);
    s.v = take(&s.bytes, (t->pair_units ? bn / 2 : bn) * dv_pad * 4);
    bool quantised = a->k_scale.data, staged = quantised || a->page_size;
    int64_t size = (int64_t)fa_dtype_size(a->q.dtype);
    s.k_stage = take(&s.bytes, staged ? bn * d * size : 0);
    s.v_stage = take(&s.bytes, staged ? bn * a->v.size[3] * size : 0);
    s.k_scale = take(&s.bytes, quantised ? bn * 4 : 0);
    s.v_scale = take(&s.bytes, quantised ? bn * 4 : 0);
    return s;
}

fa_rows_scratch fa_rows_scratch_of(const fa_args *a, const fa_target *t)
{
    int64_t rows = FA_ROWS_MAX;
    int pair = 2 * t->lanes; /* bf16 comes in pairs of vectors */
    int64_t d_pad = fa_padded(a->q.size[3], pair), dv_pad = fa_padded(a->v.size[3], pair);
    fa_rows_scratch s = {0};
    s.q = take(&s.bytes, rows * d_pad * 4);
    s.scores = take(&s.bytes, rows * t->key_block * 4);
    s.out = take(&s.bytes, rows * dv_pad * 4);
    s.max = take(&s.bytes, rows * 4);
    s.sum = take(&s.bytes, rows * 4);
    return s;
}

fa_bwd_scratch fa_bwd_scratch_of(const fa_args *a, const fa_target *t)
{
    int64_t d = a->q.size[3], dv = a->v.size[3], bm = t->panel_rows, bn = t->key_block, tile = bn * bm * 4;
    int64_t d_pad = fa_padded(d, t->lanes), dv_pad = fa_padded(dv, t->lanes), pack = t->pair_units ? 2 : 1;
    fa_bwd_scratch s = {0};
    s.info = take(&s.bytes, FA_LANES_BYTES);
    s.q_t = take(&s.bytes, fa_ceil_div(d, pack) * bm * 4);
    s.q_n = take(&s.bytes, bm / pack * d_pad * 4);
    s.do_t = take(&s.bytes, fa_ceil_div(dv, pack) * bm * 4);
    s.do_n = take(&s.bytes, bm / pack * dv_pad * 4);
    s.lse2 = take(&s.bytes, bm * 4);
    s.delta = take(&s.bytes, bm * 4);
    s.scores = take(&s.bytes, tile);
    s.grads = take(&s.bytes, tile);
    s.bias = take(&s.bytes, a->mask.data ? tile : 0);
    s.capped = take(&s.bytes, a->softcap > 0 ? tile : 0);
    s.s_pairs = take(&s.bytes, t->pair_units ? tile / 2 : 0);
    s.g_pairs = take(&s.bytes, t->pair_units ? tile / 2 : 0);
    s.k = take(&s.bytes, bn * fa_padded(fa_ceil_div(d, pack), t->lanes) * 4);
    s.v = take(&s.bytes, bn * fa_padded(fa_ceil_div(dv, pack), t->lanes) * 4);
    s.k_n = take(&s.bytes, bn / pack * d_pad * 4);
    s.dk = take(&s.bytes, bn * d_pad * 4);
    s.dv = take(&s.bytes, bn * dv_pad * 4);
    s.dq = take(&s.bytes, d % t->lanes ? bm * d_pad * 4 : 0);
    s.sum = take(&s.bytes, a->dmask.data ? tile : 0);
    return s;
}

fa_bwd_shared fa_bwd_shared_of(const fa_args *a, const fa_target *t)
{
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2], d = a->q.size[3];
    fa_panels panels = fa_panels_of(a, t->panel_rows);
    bool whole_vectors = a->dq.dtype == FA_F32 && a->dq.stride[3] == 1 && d % t->lanes == 0;
    fa_bwd_shared s = {.dq_direct = !panels.packed && whole_vectors};
    s.lse2 = take(&s.bytes, rows * 4);
    s.delta = take(&s.bytes, rows * 4);
    s.turn = take(&s.bytes, a->q.size[0] * a->k.size[1] * panels.count * 4);
    s.dq = take(&s.bytes, a->dq.data && !s.dq_direct ? rows * d * 4 : 0);
    return s;
}
