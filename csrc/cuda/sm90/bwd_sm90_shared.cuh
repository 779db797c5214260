/* What the roles of the Hopper backward kernel share: sizes, shared memory, barriers, the steps of a thread block. */
#ifndef FA_BWD_SM90_SHARED_CUH
#define FA_BWD_SM90_SHARED_CUH

#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_store.cuh"
#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "bwd_sm90_walk.cuh"

/* T: element; head dimensions D and DV, multiples of 64; blocks of BM queries and BN keys. OPTIONS: of masks, softcap,
 * ALiBi, lengths and dropout (bwd_sm90_mod.cuh) those that every call of the instance has, or FA_MOD_ANY.
 * BN = 128: two warpgroups of 64 keys, each with all of S, P, dP, dS, dV and dK of its keys.
 * BN = 64: one warpgroup has S, P and dV, the other dP, dS and dK; P goes from one to the other. */
template <typename T_, int D_, int DV_, int BM_, int BN_, int OPTIONS_> struct fa_bwd_sm90_config {
    using T = T_;
    static constexpr int D = D_, DV = DV_, BM = BM_, BN = BN_;
    static constexpr int OPTIONS = OPTIONS_;
    static constexpr bool MOD = OPTIONS != 0, BITS = OPTIONS & FA_MOD_BITS, TILES = OPTIONS & FA_MOD_TILES;
    static constexpr bool STORES_DS = OPTIONS == FA_MOD_TILED; /* where it is the mask's gradient (bwd_sm90_ds.cuh) */
    static constexpr bool SPLIT = BN == 64;
    static constexpr bool KEYS_FROM_SHARED = D > 64;
    static constexpr int STAGES = 2;               /* blocks of Q and of dO in flight */
    static constexpr int PARTS = BM / 64 * D / 64; /* of 64 x 64 in a block of dQ */
    static constexpr int THREADS = 4 * FA_WARPGROUP;
    /* bytes for a tile of a float mask: less than fp32 takes where BM = 128, none where D = 256; or for the weights of
     * dS where they differ and there is no such tile (bwd_sm90_pair.cuh) */
    static constexpr int WEIGHT_BYTES = OPTIONS & FA_MOD_TWO_WEIGHTS && !SPLIT ? 2 * BM * 128 : 0;
    static constexpr int BIAS_BYTES = !TILES ? WEIGHT_BYTES : !SPLIT ? 32768 : D <= 192 ? 16384 : 0;
    static constexpr int PRODUCER_REGISTERS = STORES_DS ? 32 : 24, CONSUMER_REGISTERS = 208;
    static constexpr int DQ_REGISTERS = STORES_DS ? 64 : 72;
};

/* Does the call have one of these? */
template <class C> __device__ __forceinline__ bool fa_has(const fa_bwd_mod &mod, int options)
{
    return C::OPTIONS == FA_MOD_ANY ? mod.options & options : C::OPTIONS & options;
}

enum { FA_WARPGROUP_PRODUCER, FA_WARPGROUP_FIRST, FA_WARPGROUP_SECOND, FA_WARPGROUP_DQ };
enum { FA_WARP_LOAD, FA_WARP_TURN, FA_WARP_SIGNAL, FA_WARP_DS }; /* of the producer warpgroup */

enum { FA_BAR_ALONE = 1 }; /* named barriers FA_BAR_ALONE + 1 .. 3: of one warpgroup alone */

/* The warpgroup's own; it has written to shared memory, and its next product reads that. */
__device__ __forceinline__ void fa_publish(void)
{
    fa_fence_shared_async();
    fa_bar_sync(FA_BAR_ALONE + threadIdx.x / FA_WARPGROUP, FA_WARPGROUP);
}

/* A full barrier says that something may be read, an empty one that it may be overwritten. Of two stages each where
 * a _1 follows. */
enum fa_bwd_bar {
    FA_BAR_K_FULL,
    FA_BAR_V_FULL,
    FA_BAR_Q_FULL, FA_BAR_Q_FULL_1,   /* Q and lse of a stage */
    FA_BAR_DO_FULL, FA_BAR_DO_FULL_1, /* dO and delta */
    FA_BAR_EMPTY, FA_BAR_EMPTY_1,     /* all four */
    FA_BAR_DS_FULL, FA_BAR_DS_FULL_1,
    FA_BAR_DS_EMPTY, FA_BAR_DS_EMPTY_1,
    FA_BAR_P_FULL, FA_BAR_P_FULL_1, /* SPLIT only */
    FA_BAR_P_EMPTY, FA_BAR_P_EMPTY_1,
    FA_BAR_BIAS_FULL, /* one stage, MOD only */
    FA_BAR_BIAS_EMPTY,
    FA_BAR_TURN, /* it is this thread block's turn to add to dQ */
    FA_BAR_ADDED, FA_BAR_ADDED_1, /* it has added, in an even or an odd step */
    FA_BAR_SIGNALLED, FA_BAR_SIGNALLED_1, /* and other thread blocks can see that */
    FA_BARS
};

struct fa_dq_target {
    float *sum; /* block of dq_sum */
    int first;  /* nothing was added to it yet */
};

/* What a mod instance knows of the query head in each stage. */
template <class C, bool MOD> struct fa_bwd_mod_shared {};

template <class C> struct fa_bwd_mod_shared<C, true> {
    alignas(16) uint64_t bits[2][C::BM / 64][C::BITS ? C::BN : 2]; /* [stage][64 queries][key] of a bool mask */
    const void *mask[2]; /* element (0, 0) of a float mask */
    int head[2];
    float slope[2]; /* ALiBi, in units of log2 */
};

/* Tiles lie in panels of 64 columns: rows of 128 bytes, swizzled. ds: rows are keys, columns queries. */
template <class C> struct fa_bwd_sm90_shared {
    alignas(1024) typename C::T k[C::BN * C::D];
    alignas(1024) typename C::T v[C::BN * C::DV];
    alignas(1024) typename C::T q[C::STAGES][C::BM * C::D];
    alignas(1024) typename C::T dout[C::STAGES][C::BM * C::DV];
    alignas(1024) typename C::T ds[2][C::BM * C::BN];
    /* a tile of a float mask, rows of 128 bytes: its rows are queries, its columns keys */
    alignas(C::BIAS_BYTES ? 1024 : 16) unsigned char bias[C::BIAS_BYTES ? C::BIAS_BYTES : 16];
    alignas(C::STORES_DS ? 1024 : 16) unsigned char staged[C::STORES_DS ? C::BM * C::BN * 2 : 16]; /* bwd_sm90_ds.cuh */
    /* P, SPLIT only: [stage][i][thread] holds registers 4 i .. 4 i + 3 */
    alignas(16) uint4 p[C::SPLIT ? 2 : 1][C::SPLIT ? C::BM / 16 : 1][C::SPLIT ? FA_WARPGROUP : 1];
    alignas(16) float lse[C::STAGES][C::BM];
    alignas(16) float delta[C::STAGES][C::BM];
    int query[C::STAGES];    /* first query of the block in this stage */
    uint32_t wild[C::STAGES]; /* as params.wild has it */
    fa_dq_target dq;         /* where the next dQ goes */
    uint64_t bar[FA_BARS];
    fa_bwd_mod_shared<C, C::MOD> mod;
};

/* What a thread block works on. */
struct fa_bwd_unit {
    int b, hk;           /* batch or sequence, key head */
    int q_block;         /* number of the sequence's first block of queries */
    int k_first, k_rows; /* rows of dK and dV */
    fa_bwd_band band;
    fa_walk walk;
    int steps; /* query blocks, all heads of the group */
};

/* Thread blocks in the order in which they start: sets of `heads_together` heads; in a set, the first `ring` key blocks
 * of each head, the next of each, ... */
template <class C> __device__ __forceinline__ fa_bwd_unit fa_bwd_unit_of(const fa_bwd_sm90_params &p)
{
    int heads = p.B * p.HK, set = blockIdx.x / (p.heads_together * p.k_blocks), first = set * p.heads_together;
    int at = blockIdx.x - first * p.k_blocks, members = min(p.heads_together, heads - first);
    int ring0 = at / (members * p.ring) * p.ring, size = min(p.ring, p.k_blocks - ring0);
    at -= members * ring0;
    int head = first + at / size;
    fa_bwd_unit u;
    int n = ring0 + at % size;
    if (C::STORES_DS && p.mod.mask_batch == 0) { /* what shares a tile of the mask is at work together */
        u.hk = head / p.B;
        u.b = head - u.hk * p.B;
    } else {
        u.b = head / p.HK;
        u.hk = head - u.b * p.HK;
    }
    u.q_block = u.b * p.HQ * p.q_blocks;
    u.k_first = 0;
    u.k_rows = p.SK;
    if (fa_has<C>(p.mod, FA_MOD_PACKED)) {
        fa_bwd_slot s = fa_slot_of(p.mod, p.mod.first_k, p.SK, C::BN, n);
        n = s.block;
        u.b = s.b;
        u.q_block = fa_first_slot(p.mod.first_q, s.b, C::BM);
        u.k_first = s.first;
        u.k_rows = s.rows;
    }
    u.band = fa_has<C>(p.mod, FA_MOD_LENGTHS) ? fa_band_of(p, u.b) : fa_whole_band(p);
    u.walk = fa_walk_of(u.band, n, ring0, size, C::BM, C::BN);
    u.steps = p.group * fa_walk_steps(u.walk);
    return u;
}

/* The query blocks of a unit one by one: for each head of the group, the walk. */
struct fa_bwd_step {
    int t;        /* 0 .. unit.steps - 1 */
    int head, m;  /* query head, query block */
    int start;
};

__device__ __forceinline__ fa_bwd_step fa_first_step(const fa_bwd_sm90_params &p, const fa_bwd_unit &u)
{
    fa_bwd_step s = {0, u.hk * p.group, 0, 0};
    s.m = s.start = fa_walk_start(p, u.walk);
    return s;
}

__device__ __forceinline__ void fa_next_step(const fa_bwd_sm90_params &p, const fa_bwd_unit &u, fa_bwd_step &s)
{
    s.t++;
    s.m = fa_walk_next(p, u.walk, s.m);
    if (s.m == s.start)
        s.head++;
}

/* Block m of a head among all blocks of queries. */
__device__ __forceinline__ int64_t fa_query_block(const fa_bwd_sm90_params &p, const fa_bwd_unit &u,
                                                  const fa_bwd_step &s)
{
    return u.q_block + (int64_t)s.head * p.q_blocks + s.m;
}

/* Step t uses stage t % 2 of what has two stages, for the (t / 2)-th time. */
__device__ __forceinline__ int fa_stage_of(int t)
{
    return t & 1;
}

__device__ __forceinline__ uint32_t fa_parity_of(int t)
{
    return t >> 1 & 1;
}

__device__ __forceinline__ void fa_warp_arrive(uint64_t *bar)
{
    __syncwarp();
    fa_mbar_arrive_warp(bar);
}

#endif
