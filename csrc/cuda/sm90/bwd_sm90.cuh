/* Backward attention on Hopper: a thread block keeps one block of keys and meets the query blocks that see it.
 *
 *   P  = exp2(scale log2e S - lse)     S  = Q K^T       dV += P^T dO
 *   dS = P o (dP - delta)              dP = dO V^T      dK += dS^T Q      dQ += dS K
 *
 * with delta = rowsum(dO o O) - dlse; dQ and dK are multiplied by scale at the end (Dao et al., "FlashAttention", 2022).
 * S and dP are computed transposed, keys in the rows, so that P^T and dS^T are A operands in registers; only dS^T also
 * goes to shared memory, for dQ. Roles follow Shah et al., "FlashAttention-3", 2024, but for dQ, which has a warpgroup
 * of its own: it adds its sums in fp32 straight from registers, when a flag in device memory says that it is this key
 * block's turn. The order is a function of the shapes alone, so the bits are always the same (bwd_sm90_params.h).
 */
#ifndef FA_BWD_SM90_CUH
#define FA_BWD_SM90_CUH

#include "../ptx/global.cuh"
#include "../ptx/math.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_store.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "../tile/store_rows.cuh"
#include "bwd_sm90_walk.cuh"

/* T: element; head dimensions D and DV, multiples of 64; blocks of BM queries and BN keys.
 * BN = 128: two warpgroups of 64 keys, each with all of S, P, dP, dS, dV and dK of its keys.
 * BN = 64: one warpgroup has S, P and dV, the other dP, dS and dK; P goes from one to the other. */
template <typename T_, int D_, int DV_, int BM_, int BN_> struct fa_bwd_sm90_config {
    using T = T_;
    static constexpr int D = D_, DV = DV_, BM = BM_, BN = BN_;
    static constexpr bool SPLIT = BN == 64;
    static constexpr bool KEYS_FROM_SHARED = D > 64;
    static constexpr int STAGES = 2;              /* blocks of Q and of dO in flight */
    static constexpr int PARTS = BM / 64 * D / 64; /* of 64 x 64 in a block of dQ */
    static constexpr int THREADS = 4 * FA_WARPGROUP;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 208, DQ_REGISTERS = 72;
};

enum { FA_WARPGROUP_PRODUCER, FA_WARPGROUP_FIRST, FA_WARPGROUP_SECOND, FA_WARPGROUP_DQ };
enum { FA_WARP_LOAD, FA_WARP_TURN, FA_WARP_SIGNAL }; /* of the producer warpgroup */

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
    FA_BAR_TURN, /* it is this thread block's turn to add to dQ */
    FA_BAR_ADDED, FA_BAR_ADDED_1, /* it has added, in an even or an odd step */
    FA_BARS
};

struct fa_dq_target {
    float *sum; /* block of dq_sum */
    int first;  /* nothing was added to it yet */
};

/* Tiles lie in panels of 64 columns: rows of 128 bytes, swizzled. ds: rows are keys, columns queries. */
template <class C> struct fa_bwd_sm90_shared {
    alignas(1024) typename C::T k[C::BN * C::D];
    alignas(1024) typename C::T v[C::BN * C::DV];
    alignas(1024) typename C::T q[C::STAGES][C::BM * C::D];
    alignas(1024) typename C::T dout[C::STAGES][C::BM * C::DV];
    alignas(1024) typename C::T ds[2][C::BM * C::BN];
    alignas(16) uint4 p[C::SPLIT ? 2 : 1][C::SPLIT ? C::BM / 16 : 1][FA_WARPGROUP]; /* [..][i][thread]: registers 4 i .. */
    alignas(16) float lse[C::STAGES][C::BM];
    alignas(16) float delta[C::STAGES][C::BM];
    int query[C::STAGES];    /* first query of the block in this stage */
    fa_dq_target dq;         /* where the next dQ goes */
    int signalled;           /* steps whose dQ other thread blocks can see */
    uint64_t bar[FA_BARS];
};

/* What a thread block works on. */
struct fa_bwd_unit {
    int b, hk; /* batch, key head */
    fa_walk walk;
    int steps; /* query blocks, all heads of the group */
};

/* Thread blocks in the order in which they start: sets of `heads_together` heads; in a set, the first `ring` key blocks of
 * each head, the next of each, ... */
template <class C> __device__ __forceinline__ fa_bwd_unit fa_bwd_unit_of(const fa_bwd_sm90_params &p)
{
    int heads = p.B * p.HK, set = blockIdx.x / (p.heads_together * p.k_blocks), first = set * p.heads_together;
    int at = blockIdx.x - first * p.k_blocks, members = min(p.heads_together, heads - first);
    int ring0 = at / (members * p.ring) * p.ring, size = min(p.ring, p.k_blocks - ring0);
    at -= members * ring0;
    int head = first + at / size;
    fa_bwd_unit u;
    u.b = head / p.HK;
    u.hk = head - u.b * p.HK;
    u.walk = fa_walk_of(p, ring0 + at % size, ring0, size, C::BM, C::BN);
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
__device__ __forceinline__ int64_t fa_query_block(const fa_bwd_sm90_params &p, const fa_bwd_unit &u, const fa_bwd_step &s)
{
    return ((int64_t)u.b * p.HQ + s.head) * p.q_blocks + s.m;
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

/* One of every warp arrives for its warp. */
__device__ __forceinline__ void fa_warp_arrive(uint64_t *bar)
{
    __syncwarp();
    if (threadIdx.x % FA_WARP == 0)
        fa_mbar_arrive(bar);
}

/* ---- producer: one thread starts every copy ------------------------------------------------------------------------ */

template <int ROWS, int COLUMNS, typename T>
__device__ __forceinline__ void fa_load_tile(T *to, const CUtensorMap *map, uint64_t *bar, int row, int head, int batch)
{
#pragma unroll
    for (int panel = 0; panel < COLUMNS / 64; panel++)
        fa_tma_load_4d(to + panel * (64 * ROWS), map, bar, 64 * panel, row, head, batch);
}

template <class C>
__device__ __forceinline__ void fa_load_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    int row = u.walk.n * C::BN;
    fa_mbar_expect(&s.bar[FA_BAR_K_FULL], sizeof(s.k));
    fa_load_tile<C::BN, C::D>(s.k, &p.k_map, &s.bar[FA_BAR_K_FULL], row, u.hk * p.k_steps[0], u.b * p.k_steps[1]);
    fa_mbar_expect(&s.bar[FA_BAR_V_FULL], sizeof(s.v));
    fa_load_tile<C::BN, C::DV>(s.v, &p.v_map, &s.bar[FA_BAR_V_FULL], row, u.hk * p.v_steps[0], u.b * p.v_steps[1]);
}

template <class C>
__device__ __forceinline__ void fa_load_queries(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                                const fa_bwd_unit &u, const fa_bwd_step &at)
{
    int stage = fa_stage_of(at.t);
    int64_t row = fa_query_block(p, u, at) * C::BM;
    uint64_t *q_full = &s.bar[FA_BAR_Q_FULL + stage], *do_full = &s.bar[FA_BAR_DO_FULL + stage];
    fa_mbar_wait(&s.bar[FA_BAR_EMPTY + stage], fa_parity_of(at.t) ^ 1);
    s.query[stage] = at.m * C::BM;
    fa_mbar_expect(q_full, sizeof(s.q[0]) + sizeof(s.lse[0]));
    fa_load_tile<C::BM, C::D>(s.q[stage], &p.q_map, q_full, at.m * C::BM, at.head * p.q_steps[0], u.b * p.q_steps[1]);
    fa_bulk_load(s.lse[stage], p.row_lse + row, sizeof(s.lse[0]), q_full);
    fa_mbar_expect(do_full, sizeof(s.dout[0]) + sizeof(s.delta[0]));
    fa_load_tile<C::BM, C::DV>(s.dout[stage], &p.dout_map, do_full, at.m * C::BM, at.head * p.dout_steps[0],
                               u.b * p.dout_steps[1]);
    fa_bulk_load(s.delta[stage], p.row_delta + row, sizeof(s.delta[0]), do_full);
}

template <class C>
__device__ __forceinline__ void fa_produce(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    fa_load_keys<C>(p, s, u);
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at))
        fa_load_queries<C>(p, s, u, at);
}

/* ---- turns: does this key block come next in the sum of a block of dQ? ------------------------------------------------ */

__device__ __forceinline__ void fa_await_turn(const uint32_t *flag, uint32_t turn)
{
#ifdef FA_WAIT_LIMIT
    for (uint32_t tries = 0; fa_load_acquire(flag) != turn; tries++)
        if (tries > FA_WAIT_LIMIT)
            __trap();
#else
    while (fa_load_acquire(flag) != turn)
        ;
#endif
}

/* Asks for each step whether it is this key block's turn, ahead of the step where it can. At most two steps may be added
 * and not yet signalled: ADDED has two phases for each of two barriers. */
template <class C>
__device__ __forceinline__ void fa_await_turns(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        int64_t block = fa_query_block(p, u, at);
        uint32_t turn = fa_turn_of(p, u.walk, at.m);
#ifndef DIAG_NOTURN
        if (turn > 0)
            fa_await_turn(p.turn + block, turn);
#endif
        if (at.t > 0)
            fa_mbar_wait(&s.bar[FA_BAR_ADDED + fa_stage_of(at.t - 1)], fa_parity_of(at.t - 1));
        while (*(volatile int *)&s.signalled < at.t - 1)
            ;
        s.dq.sum = p.dq_sum + block * (C::BM * C::D);
        s.dq.first = turn == 0;
        fa_mbar_arrive(&s.bar[FA_BAR_TURN]);
    }
}

/* Tells the next key block, once all of dQ has arrived in the second-level cache: that takes as long as a few products. */
template <class C>
__device__ __forceinline__ void fa_signal_turns(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        uint32_t *flag = p.turn + fa_query_block(p, u, at), turn = fa_turn_of(p, u.walk, at.m);
        fa_mbar_wait(&s.bar[FA_BAR_ADDED + fa_stage_of(at.t)], fa_parity_of(at.t));
        fa_store_release(flag, turn + 1);
        *(volatile int *)&s.signalled = at.t + 1;
    }
}

/* ---- dQ = dS K ------------------------------------------------------------------------------------------------------ */

/* 64 x 64 of dQ: 64 queries from `ds` on, 64 columns from `k` on. */
template <class C> __device__ __forceinline__ void fa_issue_dq(float (&dq)[32], uint64_t ds, uint64_t k)
{
#pragma unroll
    for (int i = 0; i < C::BN / 16; i++)
        fa_wgmma<typename C::T, 64>::template ss<1, 1>(dq, ds + i * (16 * 128 / 16), k + i * (16 * 128 / 16), i > 0);
}

/* `to`: this thread's place in the block of dq_sum. The first in a sum stores, so nothing has to be cleared. */
__device__ __forceinline__ void fa_add_dq(float *to, const float (&dq)[32], bool first)
{
    if (first) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            fa_store_f32x4(to + i * (FA_WARPGROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            fa_red_add_f32x4(to + i * (FA_WARPGROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
}

template <class C> __device__ __forceinline__ void fa_sum_dq(fa_bwd_sm90_shared<C> &s, int steps)
{
    constexpr int panel = C::BN * 128 / 16;
    uint64_t ds_desc = fa_wgmma_descriptor(s.ds[0], 0), k_desc = fa_wgmma_descriptor(s.k, C::BN * 128);
    float dq[32];
    fa_mbar_wait(&s.bar[FA_BAR_K_FULL], 0);
    for (int t = 0; t < steps; t++) {
        int stage = fa_stage_of(t);
        fa_mbar_wait(&s.bar[FA_BAR_DS_FULL + stage], fa_parity_of(t));
#pragma unroll
        for (int part = 0; part < C::PARTS; part++) {
            int block = part / (C::D / 64), column = part % (C::D / 64);
            fa_wgmma_fence();
            fa_issue_dq<C>(dq, ds_desc + stage * (C::BM * C::BN * 2 / 16) + block * panel, k_desc + column * panel);
            fa_wgmma_commit();
            fa_wgmma_wait<0>();
            fa_wgmma_hold(dq);
            if (part == C::PARTS - 1)
                fa_warp_arrive(&s.bar[FA_BAR_DS_EMPTY + stage]);
            if (part == 0)
                fa_mbar_wait(&s.bar[FA_BAR_TURN], t & 1);
#ifdef DIAG_NORED
            if (dq[0] == 1.2345f)
#endif
            fa_add_dq(s.dq.sum + (part * 8 * FA_WARPGROUP + threadIdx.x % FA_WARPGROUP) * 4, dq, s.dq.first);
        }
        fa_warp_arrive(&s.bar[FA_BAR_ADDED + stage]);
    }
}

/* ---- products and elementwise steps of the consumers ------------------------------------------------------------------- */

/* S^T or dP^T (64 keys, BM): A = K or V, B = Q or dO, both contiguous along COLUMNS, the summed dimension. */
template <class C, int COLUMNS>
__device__ __forceinline__ void fa_issue_scores(float (&s)[C::BM / 2], uint64_t keys, uint64_t queries)
{
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
        int panel = i / 4, within = i % 4 * 2; /* 16 columns are 32 bytes */
        fa_wgmma<typename C::T, C::BM>::template ss<0, 0>(s, keys + panel * (C::BN * 128 / 16) + within,
                                                          queries + panel * (C::BM * 128 / 16) + within, i > 0);
    }
}

/* Sum (64, COLUMNS) in registers. In parts of at most 192 columns: an instruction can name no more registers than a thread
 * has when the kernel starts. */
template <int COLUMNS> struct fa_gradient {
    static constexpr int N = COLUMNS > 192 ? COLUMNS / 2 : COLUMNS;
    float part[COLUMNS / N][N / 2];

    __device__ __forceinline__ void clear(void)
    {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++)
            part[i / (N / 2)][i % (N / 2)] = 0.f;
    }

    __device__ __forceinline__ void hold(void)
    {
#pragma unroll
        for (int i = 0; i < COLUMNS / N; i++)
            fa_wgmma_hold(part[i]);
    }
};

/* dV (64 keys, COLUMNS) += P^T dO, or dK += dS^T Q: A in registers, B contiguous along N. */
template <class C, int COLUMNS>
__device__ __forceinline__ void fa_issue_gradient(fa_gradient<COLUMNS> &d, const uint32_t (&w)[C::BM / 4], uint64_t queries)
{
    constexpr int N = fa_gradient<COLUMNS>::N;
#pragma unroll
    for (int part = 0; part < COLUMNS / N; part++) {
#pragma unroll
        for (int i = 0; i < C::BM / 16; i++)
            fa_wgmma<typename C::T, N>::template rs<1>(
                d.part[part], &w[4 * i], queries + part * N / 64 * (C::BM * 128 / 16) + i * (16 * 128 / 16), 1);
    }
}

/* Rows (keys) of the accumulator that this thread holds: key, key + 8; columns (queries): query + 8 c + 0, 1. */
struct fa_place {
    int key, query;
};

__device__ __forceinline__ fa_place fa_place_of(int key0, int query0)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    fa_place at = {key0 + 16 * warp + lane / 4, query0 + 2 * (lane % 4)};
    return at;
}

/* Is each of 64 keys from key0 on seen by each of BM queries from query0 on? */
template <class C> __device__ __forceinline__ bool fa_all_seen(const fa_bwd_sm90_params &p, int key0, int query0)
{
    return key0 + 64 <= p.SK && key0 >= query0 + C::BM - 1 + p.lo_shift && key0 + 63 < query0 + p.hi_shift;
}

/* Scores that are hidden become -inf (after the multiplication by scale, which may be negative). */
template <class C>
__device__ __forceinline__ void fa_hide(const fa_bwd_sm90_params &p, float (&s)[C::BM / 2], fa_place at)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int key = at.key + 8 * r;
        int lo = key < p.SK ? key - p.hi_shift + 1 - at.query : INT32_MAX, hi = key - p.lo_shift - at.query;
#pragma unroll
        for (int c = 0; c < C::BM / 8; c++) {
#pragma unroll
            for (int x = 0; x < 2; x++) {
                float &score = s[4 * c + 2 * r + x];
                score = 8 * c + x >= lo && 8 * c + x <= hi ? score : -CUDART_INF_F;
            }
        }
    }
}

/* s becomes scale log2e s - lse; row: lse of the block's queries. */
template <class C>
__device__ __forceinline__ void fa_scale_scores(float (&s)[C::BM / 2], const float *row, float scale_log2)
{
    const float2 *lse = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 l = lse[4 * c];
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[4 * c + i] = fmaf(s[4 * c + i], scale_log2, i % 2 ? -l.y : -l.x);
    }
}

template <class C> __device__ __forceinline__ void fa_exponentials(float (&s)[C::BM / 2])
{
#pragma unroll
    for (int i = 0; i < C::BM / 2; i++)
        s[i] = fa_exp2(s[i]);
}

template <int R> __device__ __forceinline__ void fa_settle_w(const uint32_t (&x)[R])
{
    uint32_t all = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < R; i++)
        all &= x[i];
    asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %0, 0xffffffff;\n\t@p nanosleep.u32 1;\n\t}" ::"r"(all) : "memory");
}

template <class C> __device__ __forceinline__ void fa_round(uint32_t (&w)[C::BM / 4], const float (&s)[C::BM / 2])
{
#pragma unroll
    for (int i = 0; i < C::BM / 4; i++)
        w[i] = fa_pack<typename C::T>(s[2 * i], s[2 * i + 1]);
}

/* Has all of x decide a branch that is never taken (no arithmetic gives a NaN of all ones): the assembler then cannot move
 * the work behind the wait that follows, where it would no longer run beside the products in flight. */
template <int R> __device__ __forceinline__ void fa_settle(const float (&x)[R])
{
    uint32_t all = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < R; i++)
        all &= __float_as_uint(x[i]);
    asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %0, 0xffffffff;\n\t@p nanosleep.u32 1;\n\t}" ::"r"(all) : "memory");
}

template <typename T> __device__ __forceinline__ float2 fa_unpack(uint32_t w);

template <> __device__ __forceinline__ float2 fa_unpack<fa_bf16_t>(uint32_t w)
{
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

template <> __device__ __forceinline__ float2 fa_unpack<fa_f16_t>(uint32_t w)
{
    fa_f16_t lo = {(uint16_t)(w & 0xffff)}, hi = {(uint16_t)(w >> 16)};
    return make_float2(fa_widen(lo), fa_widen(hi));
}

/* dp becomes dS = P o (dP - delta); w: P, rounded; row: delta of the block's queries. */
template <class C>
__device__ __forceinline__ void fa_score_gradient(float (&dp)[C::BM / 2], const uint32_t (&w)[C::BM / 4], const float *row)
{
    const float2 *delta = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 d = delta[4 * c];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 weight = fa_unpack<typename C::T>(w[2 * c + r]);
            dp[4 * c + 2 * r] = weight.x * (dp[4 * c + 2 * r] - d.x);
            dp[4 * c + 2 * r + 1] = weight.y * (dp[4 * c + 2 * r + 1] - d.y);
        }
    }
}

/* dS^T to shared memory: rows `row` .. + 63 (keys) of panels of 64 queries. */
template <class C>
__device__ __forceinline__ void fa_store_ds(typename C::T *to, const uint32_t (&ds)[C::BM / 4], int row)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    uint32_t base = fa_shared_address(to) + (row + 16 * warp + lane % 16) * 128, swizzle = lane % 8;
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint32_t chunk = 2 * i % 8 + lane / 16; /* 16 bytes: 8 queries */
        fa_stmatrix_x4(base + i / 4 * (C::BN * 128) + ((chunk ^ swizzle) << 4), ds[4 * i], ds[4 * i + 1], ds[4 * i + 2],
                       ds[4 * i + 3]);
    }
}

template <class C, int COLUMNS>
__device__ __forceinline__ void fa_store_gradient(const fa_bwd_sm90_view &v, const fa_bwd_unit &u, fa_gradient<COLUMNS> &d,
                                                  float factor, int key0, int SK, int columns)
{
    if (!v.data)
        return;
    fa_rows_out f = {{factor, factor}, {0.f, 0.f}};
    typename C::T *to = (typename C::T *)v.data + u.b * v.batch + u.hk * v.head;
    constexpr int N = fa_gradient<COLUMNS>::N;
#pragma unroll
    for (int part = 0; part < COLUMNS / N; part++)
        fa_store_rows<typename C::T, N>(to + part * N, v.row, d.part[part], f, key0, SK, columns - part * N);
}

/* ---- consumers, BN = 128: a warpgroup has 64 keys -------------------------------------------------------------------- */

template <class C> struct fa_bwd_keys {
    int row; /* of the block of keys: 0 or 64 */
    uint64_t k, v, q, dout, q_n, dout_n; /* descriptors; _n: contiguous along N */
};

template <class C> __device__ __forceinline__ fa_bwd_keys<C> fa_keys_of(fa_bwd_sm90_shared<C> &s, int row)
{
    fa_bwd_keys<C> c;
    c.row = row;
    c.k = fa_wgmma_descriptor(s.k, 0) + row * (128 / 16);
    c.v = fa_wgmma_descriptor(s.v, 0) + row * (128 / 16);
    c.q = fa_wgmma_descriptor(s.q[0], 0);
    c.dout = fa_wgmma_descriptor(s.dout[0], 0);
    c.q_n = fa_wgmma_descriptor(s.q[0], C::BM * 128);
    c.dout_n = fa_wgmma_descriptor(s.dout[0], C::BM * 128);
    return c;
}

template <class C> __device__ __forceinline__ uint64_t fa_q_stage(int stage)
{
    return stage * (C::BM * C::D * 2 / 16);
}

template <class C> __device__ __forceinline__ uint64_t fa_do_stage(int stage)
{
    return stage * (C::BM * C::DV * 2 / 16);
}

/* S of step t, once its queries are there. */
template <class C>
__device__ __forceinline__ void fa_start_scores(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, float (&s)[C::BM / 2], int t)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_Q_FULL + stage], fa_parity_of(t));
    fa_wgmma_fence();
    fa_issue_scores<C, C::D>(s, c.k, c.q + fa_q_stage<C>(stage));
    fa_wgmma_commit();
}

/* s becomes P of step t. */
template <class C>
__device__ __forceinline__ void fa_weights(const fa_bwd_sm90_params &p, const fa_bwd_sm90_shared<C> &sh, int t, int key0,
                                           float (&s)[C::BM / 2])
{
    int stage = fa_stage_of(t), query0 = sh.query[stage];
    fa_wgmma_hold(s);
    fa_scale_scores<C>(s, sh.lse[stage], p.scale_log2);
#ifdef UNI
    if (!__shfl_sync(~0u, fa_all_seen<C>(p, key0, query0), 0))
#else
    if (!fa_all_seen<C>(p, key0, query0))
#endif
        fa_hide<C>(p, s, fa_place_of(key0, query0));
    fa_exponentials<C>(s);
}

/* dP of step t, once its values are there. */
template <class C>
__device__ __forceinline__ void fa_start_value_scores(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, float (&dp)[C::BM / 2],
                                                      int t)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + stage], fa_parity_of(t));
    fa_wgmma_fence();
    fa_issue_scores<C, C::DV>(dp, c.v, c.dout + fa_do_stage<C>(stage));
    fa_wgmma_commit();
}

/* dV from P of step t. */
template <class C>
__device__ __forceinline__ void fa_start_values(const fa_bwd_keys<C> &c, int t, uint32_t (&w)[C::BM / 4],
                                                fa_gradient<C::DV> &dv)
{
    fa_wgmma_hold(w);
    dv.hold();
    fa_wgmma_fence();
    fa_issue_gradient<C, C::DV>(dv, w, c.dout_n + fa_do_stage<C>(fa_stage_of(t)));
    fa_wgmma_commit();
}

/* dK from dS of step t. */
template <class C>
__device__ __forceinline__ void fa_start_keys(const fa_bwd_keys<C> &c, int t, uint32_t (&ds)[C::BM / 4],
                                              fa_gradient<C::D> &dk)
{
    fa_wgmma_hold(ds);
    dk.hold();
    fa_wgmma_fence();
    fa_issue_gradient<C, C::D>(dk, ds, c.q_n + fa_q_stage<C>(fa_stage_of(t)));
    fa_wgmma_commit();
}

/* Waits for what is in flight with accumulator d, then rounds x to w, whose registers were an operand of it. */
template <class C, int COLUMNS>
__device__ __forceinline__ void fa_finish_and_round(fa_gradient<COLUMNS> &d, uint32_t (&w)[C::BM / 4], const float (&x)[C::BM / 2])
{
#ifndef NOSET
    fa_settle(x);
#endif
    fa_wgmma_wait<0>();
    d.hold();
    fa_wgmma_hold(w);
    fa_round<C>(w, x);
}

template <class C>
__device__ __forceinline__ void fa_hand_over_ds(fa_bwd_sm90_shared<C> &sh, int t, const uint32_t (&ds)[C::BM / 4], int row)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_DS_EMPTY + stage], fa_parity_of(t) ^ 1);
    fa_store_ds<C>(sh.ds[stage], ds, row);
    fa_fence_shared_async();
    fa_warp_arrive(&sh.bar[FA_BAR_DS_FULL + stage]);
}

/* From P of step t to dS, in w. */
template <class C>
__device__ __forceinline__ void fa_keys_gradient(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, int t, float (&dp)[C::BM / 2],
                                                 uint32_t (&w)[C::BM / 4], fa_gradient<C::DV> &dv)
{
    fa_start_value_scores<C>(sh, c, dp, t);
    fa_start_values<C>(c, t, w, dv);
    fa_wgmma_wait<0>();
    fa_wgmma_hold(dp);
    dv.hold();
    fa_score_gradient<C>(dp, w, sh.delta[fa_stage_of(t)]);
    fa_round<C>(w, dp);
}

/* All steps. s holds S, P, dP and dS in turn, w holds P and then dS, rounded. Time runs downwards; the other warpgroup
 * does the same at times of its own, and dQ runs beside both:
 *
 *   tensor cores       this warpgroup
 *   dP t               wait for dP t
 *   dV t               dS = P o (dP - delta); wait for dV t; round dS
 *   S t+1              dS to shared memory for dQ; wait for S t+1
 *   dK t               P = exp2(S); wait for dK t; hand back the stage of t; round P
 */
/* dK from dS of step t in shared memory. */
template <class C>
__device__ __forceinline__ void fa_start_keys_ss(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, int t, fa_gradient<C::D> &dk)
{
    uint64_t ds = fa_wgmma_descriptor(sh.ds[0], 0) + c.row * (128 / 16) + fa_stage_of(t) * (C::BM * C::BN * 2 / 16);
    uint64_t q = c.q_n + fa_q_stage<C>(fa_stage_of(t));
    fa_bar_sync(1 + c.row / 64, FA_WARPGROUP);
    dk.hold();
    fa_wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++)
        fa_wgmma<typename C::T, C::D>::template ss<0, 1>(dk.part[0], ds + i / 4 * (C::BN * 128 / 16) + i % 4 * 2, q + i * (16 * 128 / 16), 1);
    fa_wgmma_commit();
}

template <class C>
__device__ __forceinline__ void fa_keys_steps(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c,
                                              int key0, int steps, fa_gradient<C::D> &dk, fa_gradient<C::DV> &dv)
{
    uint32_t w[C::BM / 4];
    float s[C::BM / 2];
    int t = 0;
    fa_start_scores<C>(sh, c, s, 0);
    fa_wgmma_wait<0>();
    fa_weights<C>(p, sh, 0, key0, s);
    fa_round<C>(w, s);
    for (; t < steps - 1; t++) {
        fa_keys_gradient<C>(sh, c, t, s, w, dv);
        fa_start_scores<C>(sh, c, s, t + 1);
        if constexpr (C::KEYS_FROM_SHARED) {
            fa_hand_over_ds<C>(sh, t, w, c.row);
            fa_start_keys_ss<C>(sh, c, t, dk);
            fa_wgmma_wait<1>();
            fa_weights<C>(p, sh, t + 1, key0, s);
            fa_round<C>(w, s);
            fa_settle_w(w);
            fa_wgmma_wait<0>();
            dk.hold();
            fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        } else {
            fa_start_keys<C>(c, t, w, dk);
            fa_hand_over_ds<C>(sh, t, w, c.row);
            fa_wgmma_wait<0>();
            dk.hold();
            fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
            fa_weights<C>(p, sh, t + 1, key0, s);
            fa_round<C>(w, s);
        }
    }
    fa_keys_gradient<C>(sh, c, t, s, w, dv);
    fa_start_keys<C>(c, t, w, dk);
    fa_hand_over_ds<C>(sh, t, w, c.row);
    fa_wgmma_wait<0>();
    dk.hold();
}

template <class C>
__device__ __forceinline__ void fa_consume_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh, const fa_bwd_unit &u,
                                                int row)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, row);
    int key0 = u.walk.n * C::BN + row;
    fa_gradient<C::D> dk;
    fa_gradient<C::DV> dv;
    dk.clear();
    dv.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_K_FULL], 0);
        fa_mbar_wait(&sh.bar[FA_BAR_V_FULL], 0);
        fa_keys_steps<C>(p, sh, c, key0, u.steps, dk, dv);
    }
    fa_store_gradient<C, C::DV>(p.dv, u, dv, 1.f, key0, p.SK, p.DV);
    fa_store_gradient<C, C::D>(p.dk, u, dk, p.scale, key0, p.SK, p.D);
}

/* ---- consumers, BN = 64: one warpgroup for P and dV, one for dS and dK --------------------------------------------- */

/* P from one warpgroup to the other; a thread reads what the thread of the same place wrote. */
template <class C>
__device__ __forceinline__ void fa_give_weights(fa_bwd_sm90_shared<C> &sh, int t, const uint32_t (&w)[C::BM / 4])
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_P_EMPTY + stage], fa_parity_of(t) ^ 1);
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++)
        sh.p[stage][i][threadIdx.x % FA_WARPGROUP] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    fa_warp_arrive(&sh.bar[FA_BAR_P_FULL + stage]);
}

template <class C>
__device__ __forceinline__ void fa_take_weights(fa_bwd_sm90_shared<C> &sh, int t, uint32_t (&w)[C::BM / 4])
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_P_FULL + stage], fa_parity_of(t));
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint4 x = sh.p[stage][i][threadIdx.x % FA_WARPGROUP];
        w[4 * i] = x.x;
        w[4 * i + 1] = x.y;
        w[4 * i + 2] = x.z;
        w[4 * i + 3] = x.w;
    }
}

/* P and dV. Time runs downwards:
 *
 *   tensor cores       this warpgroup
 *   S t+1              wait for S t+1
 *   dV t               P = exp2(S); wait for dV t; hand back the stage of t; round P, give it to the other warpgroup
 */
template <class C>
__device__ __forceinline__ void fa_values_steps(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c,
                                                int key0, int steps, fa_gradient<C::DV> &dv)
{
    uint32_t w[C::BM / 4];
    float s[C::BM / 2];
    int t = 0;
    fa_start_scores<C>(sh, c, s, 0);
    fa_wgmma_wait<0>();
    fa_weights<C>(p, sh, 0, key0, s);
    fa_round<C>(w, s);
    fa_give_weights<C>(sh, 0, w);
    for (; t < steps - 1; t++) {
        fa_start_scores<C>(sh, c, s, t + 1);
        fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + fa_stage_of(t)], fa_parity_of(t));
        fa_start_values<C>(c, t, w, dv);
#ifdef SPLIT_OVERLAP
        fa_wgmma_wait<1>();
        fa_weights<C>(p, sh, t + 1, key0, s);
        fa_finish_and_round<C>(dv, w, s);
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
#else
        fa_wgmma_wait<0>();
        dv.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        fa_weights<C>(p, sh, t + 1, key0, s);
        fa_round<C>(w, s);
#endif
        fa_give_weights<C>(sh, t + 1, w);
    }
    fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + fa_stage_of(t)], fa_parity_of(t));
    fa_start_values<C>(c, t, w, dv);
    fa_wgmma_wait<0>();
    dv.hold();
}

/* dP of step t becomes dS. */
template <class C>
__device__ __forceinline__ void fa_split_gradient(fa_bwd_sm90_shared<C> &sh, int t, float (&dp)[C::BM / 2])
{
    uint32_t weights[C::BM / 4];
    fa_take_weights<C>(sh, t, weights);
    fa_wgmma_hold(dp);
    fa_score_gradient<C>(dp, weights, sh.delta[fa_stage_of(t)]);
    fa_warp_arrive(&sh.bar[FA_BAR_P_EMPTY + fa_stage_of(t)]);
}

/* dS and dK. Time runs downwards:
 *
 *   tensor cores       this warpgroup
 *   dP t+1             dS t to shared memory for dQ; wait for dP t+1
 *   dK t               dS = P o (dP - delta); wait for dK t; hand back the stage of t; round dS
 */
template <class C>
__device__ __forceinline__ void fa_gradient_steps(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, int steps,
                                                  fa_gradient<C::D> &dk)
{
    uint32_t w[C::BM / 4];
    float dp[C::BM / 2];
    int t = 0;
    fa_start_value_scores<C>(sh, c, dp, 0);
    fa_wgmma_wait<0>();
    fa_split_gradient<C>(sh, 0, dp);
    fa_round<C>(w, dp);
    for (; t < steps - 1; t++) {
        fa_start_value_scores<C>(sh, c, dp, t + 1);
        fa_start_keys<C>(c, t, w, dk);
        fa_hand_over_ds<C>(sh, t, w, 0);
#ifdef SPLIT_OVERLAP
        fa_wgmma_wait<1>();
        fa_split_gradient<C>(sh, t + 1, dp);
        fa_finish_and_round<C>(dk, w, dp);
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
#else
        fa_wgmma_wait<0>();
        dk.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        fa_split_gradient<C>(sh, t + 1, dp);
        fa_round<C>(w, dp);
#endif
    }
    fa_start_keys<C>(c, t, w, dk);
    fa_hand_over_ds<C>(sh, t, w, 0);
    fa_wgmma_wait<0>();
    dk.hold();
}

template <class C>
__device__ __forceinline__ void fa_consume_for_values(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                      const fa_bwd_unit &u)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, 0);
    int key0 = u.walk.n * C::BN;
    fa_gradient<C::DV> dv;
    dv.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_K_FULL], 0);
        fa_values_steps<C>(p, sh, c, key0, u.steps, dv);
    }
    fa_store_gradient<C, C::DV>(p.dv, u, dv, 1.f, key0, p.SK, p.DV);
}

template <class C>
__device__ __forceinline__ void fa_consume_for_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                    const fa_bwd_unit &u)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, 0);
    fa_gradient<C::D> dk;
    dk.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_V_FULL], 0);
        fa_gradient_steps<C>(sh, c, u.steps, dk);
    }
    fa_store_gradient<C, C::D>(p.dk, u, dk, p.scale, u.walk.n * C::BN, p.SK, p.D);
}

/* ---- kernel ---------------------------------------------------------------------------------------------------------- */

template <class C> __device__ __forceinline__ void fa_init_barriers(fa_bwd_sm90_shared<C> &s)
{
    constexpr int one = FA_WARPGROUP / FA_WARP, both = 2 * one; /* one arrival for each warp */
    fa_mbar_init(&s.bar[FA_BAR_K_FULL], 1);
    fa_mbar_init(&s.bar[FA_BAR_V_FULL], 1);
    fa_mbar_init(&s.bar[FA_BAR_TURN], 1);
    s.signalled = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        fa_mbar_init(&s.bar[FA_BAR_Q_FULL + i], 1);
        fa_mbar_init(&s.bar[FA_BAR_DO_FULL + i], 1);
        fa_mbar_init(&s.bar[FA_BAR_EMPTY + i], both);
        fa_mbar_init(&s.bar[FA_BAR_DS_FULL + i], C::SPLIT ? one : both);
        fa_mbar_init(&s.bar[FA_BAR_DS_EMPTY + i], one);
        fa_mbar_init(&s.bar[FA_BAR_P_FULL + i], one);
        fa_mbar_init(&s.bar[FA_BAR_P_EMPTY + i], one);
        fa_mbar_init(&s.bar[FA_BAR_ADDED + i], one);
    }
    fa_mbar_fence_init();
}

template <class C>
__device__ __forceinline__ void fa_serve(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    int warp = __shfl_sync(0xffffffff, threadIdx.x / FA_WARP, 0);
    if (threadIdx.x % FA_WARP != 0 || u.steps == 0)
        return;
    if (warp == FA_WARP_LOAD)
        fa_produce<C>(p, s, u);
    else if (warp == FA_WARP_TURN)
        fa_await_turns<C>(p, s, u);
    else if (warp == FA_WARP_SIGNAL)
        fa_signal_turns<C>(p, s, u);
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) fa_bwd_sm90_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    fa_bwd_sm90_shared<C> &s = *(fa_bwd_sm90_shared<C> *)raw;
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / FA_WARPGROUP, 0);
    fa_bwd_unit u = fa_bwd_unit_of<C>(p);
    if (threadIdx.x == 0)
        fa_init_barriers(s);
    __syncthreads();
    if (warpgroup == FA_WARPGROUP_PRODUCER) {
        fa_registers_shrink<C::PRODUCER_REGISTERS>();
        fa_serve<C>(p, s, u);
    } else if (warpgroup == FA_WARPGROUP_DQ) {
        fa_registers_shrink<C::DQ_REGISTERS>();
        if (u.steps > 0)
            fa_sum_dq<C>(s, u.steps);
    } else {
        fa_registers_grow<C::CONSUMER_REGISTERS>();
        if constexpr (!C::SPLIT)
            fa_consume_keys<C>(p, s, u, warpgroup == FA_WARPGROUP_FIRST ? 0 : 64);
        else if (warpgroup == FA_WARPGROUP_FIRST)
            fa_consume_for_values<C>(p, s, u);
        else
            fa_consume_for_keys<C>(p, s, u);
    }
}

#endif
