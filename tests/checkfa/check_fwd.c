/* The cases of forward: lengths at tile edges with random options, then each kind of extreme on its own. */
#include <math.h>

#include "checkfa.h"

static const fa_dtype dtypes[] = {FA_F32, FA_BF16, FA_F16, FA_F64};
enum { DTYPES = 4 };

static void compare_numbered(const ck_case *c)
{
    ck_rng r;
    if (ck_next_case(&r)) {
        ck_case seeded = *c;
        seeded.seed = ck_next(&r);
        ck_compare(&seeded, false);
    }
}

/* Every pair of edges; float64 has no vector kernel and does with fewer. */
static void edges(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < ck_edge_count * ck_edge_count; n++) {
            ck_rng r;
            bool wanted = ck_next_case(&r);
            const int every = (dtypes[t] == FA_F64 ? 6 : 1) * (ck_opt.quick ? 8 : 1);
            if (!wanted || n % every != t % every)
                continue;
            ck_case c = ck_random(&r, dtypes[t], ck_edges[n / ck_edge_count], ck_edges[n % ck_edge_count], 3e6);
            ck_compare(&c, false);
        }
}

/* Every head dimension once, so that each tail of a vector is met. */
static void head_dims(void)
{
    for (int t = 0; t < DTYPES - 1; t++)
        for (int64_t D = 1 + t; D <= FA_MAX_HEAD_DIM; D += ck_opt.quick ? 11 : 3) {
            ck_case c = ck_plain(dtypes[t], 1, 2, 1, 9, 14, D, FA_MAX_HEAD_DIM + 1 - D);
            c.layout = (ck_layout)(D % CK_LAYOUTS);
            compare_numbered(&c);
        }
}

static void masks(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int kind = CK_BOOL_MASK; kind < CK_MASKS; kind++)
            for (unsigned full = 0; full < 16; full += ck_opt.quick ? 5 : 1) {
                ck_case c = ck_plain(dtypes[t], 2, 4, 2, 33, 101, 24, 16);
                c.mask = (ck_mask_kind)kind;
                c.mask_full = full;
                c.mask_expanded = full % 3 == 1;
                c.mask_floor = full % 2 == 1;
                c.right = full % 4 == 2 ? 0 : -1;
                c.layout = (ck_layout)((full + (unsigned)kind) % CK_LAYOUTS);
                compare_numbered(&c);
            }
}

/* The tokens of generation: few rows, so long a K and V that the keys are split. */
static void few_rows(void)
{
    static const int64_t rows[] = {1, 1, 2, 3, 4, 7, 8, 9}, keys[] = {257, 1000, 4096, 5003, 16384};
    static const int64_t groups[] = {1, 3, 4, 8};
    int n = 0;
    for (int t = 0; t < DTYPES - 1; t++)
        for (int i = 0; i < 8; i++)
            for (int k = 0; k < 5; k++, n++) {
                ck_rng r;
                if (!ck_next_case(&r) || (ck_opt.quick && n % 5))
                    continue;
                ck_case c = ck_random(&r, dtypes[t], rows[i], keys[k], 8e6);
                c.HK = 1 + n % 2;
                c.HQ = c.HK * groups[n % 4];
                c.mask = n % 3 ? CK_NO_MASK : c.mask;
                c.dropout_p = n % 5 ? 0 : c.dropout_p;
                c.bottom_right = n % 4 != 0;
                c.layout = (ck_layout)(n % 3 ? n % CK_LAYOUTS : CK_DENSE);
                ck_compare(&c, false);
            }
}

static void empty_sizes(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < 4; n++) {
            ck_case c = ck_plain(dtypes[t], n != 0, 2 * (n != 1), 2, 9 * (n != 2), 9 * (n != 3), 8, 8);
            compare_numbered(&c);
            c.mask = CK_SAME_MASK;
            c.mask_full = 12;
            c.q_lengths = c.k_lengths = true;
            compare_numbered(&c);
        }
}

/* NaN and infinity where nobody looks, and in a key only some rows see: the others must stay clean. */
static void poisoned(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < (ck_opt.quick ? 12 : 60); n++) {
            ck_rng r;
            if (!ck_next_case(&r))
                continue;
            ck_case c = ck_random(&r, dtypes[t], ck_edges[ck_below(&r, ck_edge_count)],
                                  ck_edges[ck_below(&r, ck_edge_count)], 1e6);
            c.nan_hidden = true;
            c.nan_seen = n % 2;
            c.dropout_p = n % 2 ? 0 : c.dropout_p; /* is a dropped NaN a NaN? No answer is promised */
            c.mask = n % 4 < 2 ? CK_BOOL_MASK : CK_NO_MASK;
            c.mask_full = n % 3 ? 12 : 8 + (unsigned)n % 8;
            c.right = n % 3 ? 0 : -1;
            c.q_lengths = c.k_lengths = n % 5 > 2;
            c.layout = (ck_layout)(n % CK_SHARED_HEADS);
            ck_compare(&c, false);
        }
}

static void large_scores(void)
{
    static const double magnitudes[] = {1e2, 1e3, 1e4};
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < 12; n++) {
            ck_case c = ck_plain(dtypes[t], 1, 4, 2, 70, 130, 64, 64);
            c.magnitude = magnitudes[n % 3];
            c.right = n % 2 ? 0 : -1;
            c.softcap = n % 4 == 3 ? 30 : 0;
            c.sinks = n % 4 == 1;
            compare_numbered(&c);
        }
}

void ck_check_forward(void)
{
    edges();
    head_dims();
    masks();
    few_rows();
    empty_sizes();
    poisoned();
    large_scores();
}
