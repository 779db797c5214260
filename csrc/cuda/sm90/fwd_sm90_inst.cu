/* One instance of the Hopper forward kernel; compiled once for each line of fwd_sm90_instances.h, with FA_INSTANCE as
 * its short name (hd64, ..) and FA_ELEMENT bf16 or f16. */
#include "fwd_sm90.cuh"
#include "fwd_sm90.h"
#include "fwd_sm90_instances.h"

#define FA_CAT_(a, b, c, d) a##b##c##d
#define FA_CAT(a, b, c, d) FA_CAT_(a, b, c, d)
#define FA_TEXT_(x) #x
#define FA_TEXT(x) FA_TEXT_(x)
#define FA_NAME FA_CAT(fa_fwd_sm90_, FA_ELEMENT, _, FA_INSTANCE)

template <typename T> constexpr fa_dtype fa_dtype_of(void);
template <> constexpr fa_dtype fa_dtype_of<fa_bf16_t>(void)
{
    return FA_BF16;
}
template <> constexpr fa_dtype fa_dtype_of<fa_f16_t>(void)
{
    return FA_F16;
}

using element = FA_CAT(fa_, FA_ELEMENT, _, t);
using config = FA_CAT(fa_fwd_sm90_config_, FA_INSTANCE, , )<element>;

extern "C" {
extern const fa_sm90_instance FA_NAME;
const fa_sm90_instance FA_NAME = {
    .name = FA_TEXT(FA_NAME),
    .dtype = fa_dtype_of<element>(),
    .D = config::D,
    .DV = config::DV,
    .BM = config::BM,
    .BN = config::BN,
    .stages = config::STAGES,
    .threads = config::THREADS,
    .shared_bytes = (int)sizeof(fa_fwd_sm90_shared<config>),
    .kernel = (const void *)fa_fwd_sm90_kernel<config>,
    .options = config::OPTIONS,
};
}
