/* Into how many parts the keys of a call are cut (FlashDecoding's idea: Dao, Haziza, Massa, Sizov, 2023). */
#include "plan.h"

enum {
    UNITS_WANTED = 32,     /* enough for 16 cores to stay busy to the end */
    KEYS_LEAST = 512,      /* shorter parts cost more in merging than they win */
    PARTIAL_MAX = 1 << 20, /* bytes for all partial results */
};

int64_t fa_split_keys(const fa_args *a, int64_t units, int64_t key_block, int64_t *splits)
{
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2], sk = a->k.size[2];
    int64_t most = PARTIAL_MAX / fa_max64(1, rows * fa_partial_floats(a->v.size[3]) * 4);
    int64_t want = fa_min64(fa_min64(fa_ceil_div(UNITS_WANTED, fa_max64(1, units)), sk / KEYS_LEAST), most);
    if (a->splits_wanted > 0)
        want = fa_min64(a->splits_wanted, sk);
    int64_t keys = fa_round_up(fa_max64(1, fa_ceil_div(sk, fa_max64(1, want))), key_block);
    *splits = fa_max64(1, fa_ceil_div(sk, keys));
    return keys;
}
