/* Rows of a tensor into a tile of shared memory: 16 bytes at a time and asynchronously where they lie so, else element
 * by element in any dtype and stride. What lies outside becomes 0. */
#ifndef FA_TILE_LOAD_CUH
#define FA_TILE_LOAD_CUH

#include "../ptx/ptx_sm80.cuh"
#include "tile_seq.cuh"

/* the element type of a tensor, and back */
template <typename T> struct fa_type;
template <> struct fa_type<float> {
    static constexpr fa_dtype dtype = FA_F32;
};
template <> struct fa_type<__nv_bfloat16> {
    static constexpr fa_dtype dtype = FA_BF16;
};
template <> struct fa_type<__half> {
    static constexpr fa_dtype dtype = FA_F16;
};
template <> struct fa_type<double> {
    static constexpr fa_dtype dtype = FA_F64;
};

template <typename T> __device__ __forceinline__ T fa_from(float x);
template <> __device__ __forceinline__ float fa_from<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ double fa_from<double>(float x)
{
    return x;
}
template <> __device__ __forceinline__ __nv_bfloat16 fa_from<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half fa_from<__half>(float x)
{
    return __float2half_rn(x);
}
__device__ __forceinline__ float fa_to_f32(float x)
{
    return x;
}
__device__ __forceinline__ float fa_to_f32(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}
__device__ __forceinline__ float fa_to_f32(__half x)
{
    return __half2float(x);
}

/* Can rows of t be read 16 bytes at a time? d: elements of a row that are read, from a multiple of 16 bytes on. */
static inline bool fa_rows_are_vectors(const fa_tensor *t)
{
    const int64_t size = (int64_t)fa_dtype_size(t->dtype);
    bool fits = (uintptr_t)t->data % 16 == 0 && (t->stride[3] == 1 || t->size[3] == 1) && t->size[3] * size % 16 == 0;
    for (int i = 0; i < 3; i++)
        fits = fits && (t->size[i] == 1 || t->stride[i] * size % 16 == 0);
    return fits;
}

/* Row r of a tile is row first + r of the sequence where `limit` is above it. */
struct fa_load_rows {
    const fa_args *a;
    const fa_seq *s;
    const fa_tensor *t;
    const fa_tensor *scale; /* of quantised keys, else absent */
    int64_t head;
    bool keys;              /* t is k or v, else q or like q */
    bool vectors;
    const float *skip;      /* rows where it is +inf count as outside; NULL: none */

    __device__ __forceinline__ int64_t at(int64_t i) const
    {
        return keys ? fa_k_at(a, s, t, head, i) : fa_q_at(s, t, head, i);
    }

    __device__ __forceinline__ bool skips(int64_t i) const
    {
        return skip && skip[i] == INFINITY;
    }
};

/* Tiles of keys may lie in an order in which a lane of a product has rows / 4 keys in a row (a multiple of 4): columns
 * 8n + 2t and + 1 are its keys 2n and 2n + 1 behind t * rows / 4. Row r of such a tile is this key. */
__host__ __device__ constexpr int fa_key_at(int r, int rows)
{
    return r % 8 / 2 * (rows / 4) + r / 8 * 2 + r % 2;
}

/* fa_load_tile element by element, rows in the order of fa_key_at where by_lane */
template <typename T>
__device__ __forceinline__ void fa_copy_elements(T *sTile, int ld, int tile_rows, int threads, const fa_load_rows &rows,
                                                 int64_t first, int64_t limit, int c0, int width, bool by_lane)
{
    constexpr int LANES = 8;
    const fa_tensor *t = rows.t;
    const int d = (int)t->size[3];
    for (int r = threadIdx.x / LANES; r < tile_rows; r += threads / LANES) {
        const int64_t row = first + (by_lane ? fa_key_at(r, tile_rows) : r);
        int64_t at = row < limit && !rows.skips(row) ? rows.at(row) : -1;
        float scale = at >= 0 && rows.scale ? fa_scale_at(rows.a, rows.s, rows.scale, rows.head, row) : 1;
        for (int c = threadIdx.x % LANES; c < width; c += LANES) {
            T x = fa_from<T>(0);
            if (at >= 0 && c0 + c < d) {
                int64_t element = at + (c0 + c) * t->stride[3];
                if (t->dtype == fa_type<T>::dtype)
                    x = ((const T *)t->data)[element];
                else
                    x = fa_from<T>((float)fa_load(t->data, t->dtype, element) * scale);
            }
            sTile[r * ld + c] = x;
        }
    }
}

/* The same, not inlined, so that the common way keeps its registers. */
template <typename T>
__device__ __noinline__ void fa_load_elements(T *sTile, int ld, int tile_rows, int threads, fa_load_rows rows,
                                              int64_t first, int64_t limit, int c0, int width, bool by_lane)
{
    fa_copy_elements(sTile, ld, tile_rows, threads, rows, first, limit, c0, width, by_lane);
}

/* sTile[r][c] <- columns c0 + c of the rows, c < width (a multiple of 16 bytes), r < ROWS. Elements past the end of a
 * row and rows outside become 0. Vectors arrive with the next group of asynchronous copies. */
template <typename T, int ROWS, int THREADS>
__device__ __forceinline__ void fa_load_tile(T *sTile, int ld, const fa_load_rows &rows, int64_t first, int64_t limit,
                                             int c0, int width)
{
    constexpr int VEC = 16 / (int)sizeof(T), LANES = 8;
    if (!rows.vectors) {
        fa_load_elements(sTile, ld, ROWS, THREADS, rows, first, limit, c0, width, false);
        return;
    }
    const fa_tensor *t = rows.t;
    const int d = (int)t->size[3];
    for (int r = threadIdx.x / LANES; r < ROWS; r += THREADS / LANES) {
        int64_t at = first + r < limit && !rows.skips(first + r) ? rows.at(first + r) : -1;
        const T *row = (const T *)t->data + (at < 0 ? 0 : at);
        for (int c = threadIdx.x % LANES * VEC; c < width; c += LANES * VEC) {
            bool inside = at >= 0 && c0 + c < d;
            ptx_cp_async(sTile + r * ld + c, inside ? row + c0 + c : row, inside ? 16 : 0);
        }
    }
}

/* fa_load_tile where code that is short counts more than speed; rows in the order of fa_key_at where by_lane. It calls
 * nothing that the common way calls: that would cost registers there. */
template <typename T>
__device__ __noinline__ void fa_load_slowly(T *sTile, int ld, int tile_rows, int threads, fa_load_rows rows,
                                            int64_t first, int64_t limit, int c0, int width, bool by_lane)
{
    constexpr int VEC = 16 / (int)sizeof(T), LANES = 8;
    if (!rows.vectors) {
        fa_copy_elements(sTile, ld, tile_rows, threads, rows, first, limit, c0, width, by_lane);
        return;
    }
#pragma unroll 1
    for (int r = threadIdx.x / LANES; r < tile_rows; r += threads / LANES) {
        const int64_t row = first + (by_lane ? fa_key_at(r, tile_rows) : r);
        const int64_t at = row < limit && !rows.skips(row) ? rows.at(row) : -1;
        const T *from = (const T *)rows.t->data + (at < 0 ? 0 : at);
#pragma unroll 1
        for (int c = threadIdx.x % LANES * VEC; c < width; c += LANES * VEC) {
            const bool inside = at >= 0 && c0 + c < rows.t->size[3];
            ptx_cp_async(sTile + r * ld + c, inside ? from + c0 + c : from, inside ? 16 : 0);
        }
    }
}

/* ---- tile after tile --------------------------------------------------------------------------------------------- */

/* Vectors of rows, WIDTH columns of them, into tiles of ROWS in the order of fa_key_at. What is the same for
 * all tiles is worked out once: a copy costs one multiply-add. */
template <typename T, int ROWS, int THREADS, int WIDTH> struct fa_row_tiles {
    static constexpr int SIZE = sizeof(T), LDB = WIDTH * SIZE + 16, CHUNKS = WIDTH * SIZE / 16;
    static constexpr int LANES = CHUNKS < 16 ? CHUNKS : 16; /* of a row */
    static constexpr int PASS = THREADS / LANES, KEYS = ROWS / 4;
    static_assert(PASS % 2 == 0 && ROWS % PASS == 0 && KEYS % 4 == 0, "rows of a pass differ by whole bits");

    const fa_args *a;
    const fa_tensor *t;
    const char *lane;    /* this lane's part of row 0, or of row 0 of page 0 */
    int64_t table;       /* place of the sequence in block_table */
    int stride;          /* bytes to the next row */
    int bytes;           /* from this lane's first column to the end of a row */

    /* at: element of row 0 of the sequence, or of page 0 */
    __device__ __forceinline__ fa_row_tiles(const fa_args *args, const fa_tensor *tensor, int64_t at, int64_t n, int c0)
        : a(args), t(tensor)
    {
        const int column = c0 + threadIdx.x % LANES * (16 / SIZE);
        lane = (const char *)t->data + (at + column) * SIZE;
        table = a->page_size ? n * a->block_table.stride[0] : 0;
        stride = (int)(t->stride[2] * SIZE);
        bytes = ((int)t->size[3] - column) * SIZE;
    }

    /* this lane's part of row j; NULL where it has no page. Found once for the keys that a lane of a product has. */
    template <bool PAGES> __device__ __forceinline__ const char *row(int j) const
    {
        if (!PAGES)
            return lane + (int64_t)j * stride;
        const unsigned size = (unsigned)a->page_size, page_of = (unsigned)j / size;
        const int64_t page = fa_index(&a->block_table, table + page_of * a->block_table.stride[1]);
        const bool known = page >= 0 && page < t->size[0];
        return known ? lane + page * t->stride[0] * SIZE + (int64_t)(j - page_of * size) * stride : NULL;
    }

    template <bool WHOLE, bool PAGES>
    __device__ __forceinline__ void copy(uint32_t tile, int first, int limit) const
    {
        const int r = threadIdx.x / LANES, key = first + fa_key_at(r, ROWS);
        const uint32_t to = tile + r * LDB + threadIdx.x % LANES * 16;
        const char *group = NULL;
#pragma unroll
        for (int i = 0; i < ROWS / PASS; i++) {
            const int ahead = fa_key_at(i * PASS, ROWS), part = ahead / KEYS * KEYS;
            if (i == 0 || part != fa_key_at((i - 1) * PASS, ROWS) / KEYS * KEYS)
                group = WHOLE || key + part < limit ? row<PAGES>(key + part) : NULL;
            const bool exists = WHOLE || (group && key + ahead < limit);
            const char *from = exists ? group + (ahead - part) * stride : lane;
#pragma unroll
            for (int c = 0; c < CHUNKS; c += LANES)
                ptx_cp_async(to + i * PASS * LDB + c * 16, from + c * 16, exists && c * 16 < bytes ? 16 : 0);
        }
    }

    /* the tile <- rows first .. below limit; the rest becomes 0. They arrive with the next group of copies. PAGES: they
     * may lie in pages. */
    template <bool PAGES> __device__ __forceinline__ void load(uint32_t tile, int first, int limit) const
    {
        if (PAGES && a->page_size)
            copy<false, true>(tile, first, limit);
        else if (first + ROWS <= limit)
            copy<true, false>(tile, first, limit);
        else
            copy<false, false>(tile, first, limit);
    }
};

/* Can fa_row_tiles of `rows` rows read t? The keys of a lane must lie in one page. */
static inline bool fa_tiles_are_vectors(const fa_args *a, const fa_tensor *t, int rows)
{
    const int64_t bytes = t->stride[2] * (int64_t)fa_dtype_size(t->dtype);
    return fa_rows_are_vectors(t) && bytes >= 0 && bytes <= INT32_MAX / 256 && a->page_size % (rows / 4) == 0;
}

/* ---- rows that hold NaN or infinity ------------------------------------------------------------------------------ */

/* A hidden key has weight 0, and 0 times NaN or infinity is NaN. So rows that hold one enter the product as 0. For fp32
 * the largest numbers count too: their parts in tf32 could overflow. */
template <typename T> __device__ __forceinline__ bool fa_is_wild(T x)
{
    return !(fabsf(fa_to_f32(x)) < 0x1p127f);
}
template <> __device__ __forceinline__ bool fa_is_wild(__half x)
{
    return !(fabsf(__half2float(x)) <= 65504.0f);
}
template <> __device__ __forceinline__ bool fa_is_wild(__nv_bfloat16 x)
{
    return !(fabsf(__bfloat162float(x)) < INFINITY);
}

/* Bit r of sWild[r / 32] <- row r of the tile holds one; returns whether any does. For the whole block; the tile must
 * be complete and visible to it. */
template <typename T, int ROWS, int THREADS>
__device__ static bool fa_find_wild(const T *sTile, int ld, int width, uint32_t *sWild)
{
    constexpr int LANES = 8;
    bool found = false;
    if (threadIdx.x < (ROWS + 31) / 32)
        sWild[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 1
    for (int r = threadIdx.x / LANES; r < ROWS; r += THREADS / LANES) {
        bool wild = false;
#pragma unroll 4
        for (int c = threadIdx.x % LANES; c < width; c += LANES)
            wild |= fa_is_wild(sTile[r * ld + c]);
        if (wild)
            atomicOr(&sWild[r / 32], 1u << (r % 32));
        found |= wild;
    }
    return __syncthreads_or(found);
}

/* the rows marked in sWild <- 0; the block must meet before they are read */
template <typename T, int ROWS, int THREADS>
__device__ static void fa_clear_wild(T *sTile, int ld, int width, const uint32_t *sWild)
{
    constexpr int LANES = 8;
#pragma unroll 1
    for (int r = threadIdx.x / LANES; r < ROWS; r += THREADS / LANES)
        if (sWild[r / 32] >> (r % 32) & 1)
#pragma unroll 1
            for (int c = threadIdx.x % LANES; c < width; c += LANES)
                sTile[r * ld + c] = fa_from<T>(0);
}

#endif
