/* Random numbers and random cases. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "checkfa.h"

const int64_t ck_edges[] = {1, 2, 5, 6, 7, 15, 16, 17, 31, 63, 64, 65, 95, 96, 97, 100, 127, 128, 129, 191, 193, 300};
const int ck_edge_count = sizeof ck_edges / sizeof ck_edges[0];

static const int64_t head_dims[] = {1, 3, 8, 16, 31, 40, 64, 80, 96, 128, 192, 256, 512};
enum { HEAD_DIMS = sizeof head_dims / sizeof head_dims[0] };

ck_rng ck_seeded(uint64_t seed, uint64_t stream)
{
    ck_rng r = {seed * 0x9E3779B97F4A7C15u + stream};
    ck_next(&r);
    return r;
}

/* splitmix64 (Steele, Lea and Flood, 2014) */
uint64_t ck_next(ck_rng *r)
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

int64_t ck_below(ck_rng *r, int64_t n)
{
    return (int64_t)(ck_next(r) % (uint64_t)n);
}

bool ck_chance(ck_rng *r, int percent)
{
    return ck_below(r, 100) < percent;
}

double ck_uniform(ck_rng *r)
{
    return (double)(ck_next(r) >> 11) * 0x1p-53;
}

double ck_normal(ck_rng *r)
{
    double u = 1 - ck_uniform(r), v = ck_uniform(r);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

ck_case ck_plain(fa_dtype dtype, int64_t B, int64_t HQ, int64_t HK, int64_t SQ, int64_t SK, int64_t D, int64_t DV)
{
    return (ck_case){.dtype = dtype, .B = B, .HQ = HQ, .HK = HK, .SQ = SQ, .SK = SK, .D = D, .DV = DV,
                     .scale = 1 / sqrt((double)D), .left = -1, .right = -1, .magnitude = 1, .seed = 1,
                     .wanted = CK_WANT_ALL};
}

double ck_cost(const ck_case *c)
{
    return (double)(c->B * c->HQ) * (double)(c->SQ * c->SK) * (double)(c->D + c->DV);
}

static int64_t largest_dim_within(double budget)
{
    int at = HEAD_DIMS - 1;
    while (at > 0 && (double)head_dims[at] > budget)
        at--;
    return head_dims[at];
}

static void pick_sizes(ck_rng *r, ck_case *c, double budget)
{
    static const int64_t groups[] = {1, 1, 3, 4, 8};
    c->B = 1 + ck_below(r, 2);
    c->HK = 1 + ck_below(r, 2);
    c->HQ = c->HK * groups[ck_below(r, 5)];
    c->D = head_dims[ck_below(r, HEAD_DIMS)];
    c->DV = ck_chance(r, 50) ? c->D : head_dims[ck_below(r, HEAD_DIMS)];
    if (ck_cost(c) > budget)
        c->B = 1;
    if (ck_cost(c) > budget)
        c->HQ /= c->HK, c->HK = 1;
    if (ck_cost(c) > budget && c->HQ > 3)
        c->HQ = 3;
    if (ck_cost(c) > budget && ck_chance(r, 50))
        c->HQ = 1;
    if (ck_cost(c) > budget) {
        double both = budget / ((double)(c->B * c->HQ) * (double)(c->SQ * c->SK));
        int64_t most = largest_dim_within(both / 2);
        c->D = c->D < most ? c->D : most;
        c->DV = c->DV < most ? c->DV : most;
    }
}

static void pick_visibility(ck_rng *r, ck_case *c)
{
    if (ck_chance(r, 40)) {
        c->mask = (ck_mask_kind)(1 + ck_below(r, CK_MASKS - 1));
        c->mask_full = (unsigned)ck_below(r, 16);
        c->mask_expanded = ck_chance(r, 50);
        c->mask_floor = ck_chance(r, 20);
    }
    if (ck_chance(r, 35))
        c->right = 0;
    else if (ck_chance(r, 15))
        c->right = ck_below(r, c->SK + 2);
    if (ck_chance(r, 20))
        c->left = ck_below(r, c->SK + 2);
    c->bottom_right = ck_chance(r, 30);
    c->q_lengths = ck_chance(r, 20);
    c->k_lengths = ck_chance(r, 20);
}

ck_case ck_random(ck_rng *r, fa_dtype dtype, int64_t SQ, int64_t SK, double budget)
{
    ck_case c = ck_plain(dtype, 1, 1, 1, SQ, SK, 1, 1);
    pick_sizes(r, &c, budget);
    pick_visibility(r, &c);
    c.layout = ck_chance(r, 30) ? CK_DENSE : (ck_layout)ck_below(r, CK_LAYOUTS);
    c.sinks = ck_chance(r, 20);
    c.alibi = ck_chance(r, 15);
    c.per_batch = ck_chance(r, 50);
    c.scale = ck_chance(r, 80) ? 1 / sqrt((double)c.D) : ck_chance(r, 30) ? 0 : -0.3;
    c.softcap = ck_chance(r, 15) ? 1 + 20 * ck_uniform(r) : 0;
    c.dropout_p = !ck_chance(r, 15) ? 0 : ck_chance(r, 20) ? 1 : 0.9 * ck_uniform(r);
    c.magnitude = ck_chance(r, 75) ? 1 : ck_chance(r, 70) ? 30 : 0.01;
    c.nan_hidden = ck_chance(r, 30);
    c.dlse = ck_chance(r, 50);
    c.wanted = ck_chance(r, 60) ? CK_WANT_ALL : 1 + (unsigned)ck_below(r, CK_WANT_ALL);
    c.seed = ck_next(r);
    return c;
}

static const char *const layout_names[] = {"dense",       "bshd",         "padded",    "step2",
                                           "rows-inside", "shared-heads", "shared-all"};

const char *ck_describe(const ck_case *c)
{
    static const char *const masks[] = {"none", "bool", "f32", "same"};
    static char text[512];
    int n = snprintf(text, sizeof text, "%s B%" PRId64 " H%" PRId64 "/%" PRId64 " SQ%" PRId64 " SK%" PRId64 " D%" PRId64
                     " DV%" PRId64 " %s", fa_dtype_name(c->dtype), c->B, c->HQ, c->HK, c->SQ, c->SK, c->D, c->DV,
                     layout_names[c->layout]);
#define MORE(when, ...)                                                                                                \
    if (when)                                                                                                          \
        n += snprintf(text + n, sizeof text - (size_t)n, " " __VA_ARGS__)
    MORE(c->mask, "mask=%s,full=%c%c%c%c%s%s", masks[c->mask], c->mask_full & 1 ? 'B' : '-',
         c->mask_full & 2 ? 'H' : '-', c->mask_full & 4 ? 'Q' : '-', c->mask_full & 8 ? 'K' : '-',
         c->mask_expanded ? ",expanded" : "", c->mask_floor ? ",floor" : "");
    MORE(c->left >= 0 || c->right >= 0, "window=%" PRId64 ",%" PRId64, c->left, c->right);
    MORE(c->bottom_right, "bottom-right");
    MORE(c->q_lengths, "q-lengths");
    MORE(c->k_lengths, "k-lengths");
    MORE(c->sinks, "sinks");
    MORE(c->alibi, "alibi");
    MORE((c->sinks || c->alibi) && c->per_batch, "per-batch");
    MORE(fabs(c->scale * sqrt((double)c->D) - 1) > 1e-9, "scale=%g", c->scale);
    MORE(c->softcap > 0, "softcap=%g", c->softcap);
    MORE(c->dropout_p > 0, "dropout=%g", c->dropout_p);
    MORE(c->magnitude != 1, "magnitude=%g", c->magnitude);
    MORE(c->nan_hidden, "nan-hidden");
    MORE(c->nan_seen, "nan-seen");
    MORE(c->dlse, "dlse");
    MORE(c->wanted != CK_WANT_ALL, "wanted=%u", c->wanted);
#undef MORE
    return text;
}
