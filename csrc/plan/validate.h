/* The words of refusals and the checks of one tensor, shared by the files that validate. */
#ifndef FA_VALIDATE_H
#define FA_VALIDATE_H

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "../fa.h"

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        fa_status status_ = (call);                                                                                    \
        if (status_ != FA_OK)                                                                                          \
            return status_;                                                                                            \
    } while (0)

__attribute__((format(printf, 3, 4))) static inline fa_status refuse(fa_error *err, fa_status status,
                                                                     const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
    }
    return status;
}

typedef struct shape_text {
    char text[96];
} shape_text;

static inline shape_text shape(const int64_t size[4])
{
    shape_text s;
    snprintf(s.text, sizeof s.text, "(%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 ")", size[0], size[1], size[2],
             size[3]);
    return s;
}

static inline bool is_empty(const fa_tensor *t)
{
    return t->size[0] == 0 || t->size[1] == 0 || t->size[2] == 0 || t->size[3] == 0;
}

/* An absent tensor is all zero. A tensor without elements may come without data, but has a shape to check. */
static inline bool is_given(const fa_tensor *t)
{
    return t->data || t->size[0] || t->size[1] || t->size[2] || t->size[3];
}

static inline bool is_float(fa_dtype t)
{
    return t == FA_F32 || t == FA_BF16 || t == FA_F16 || t == FA_F64;
}

static inline fa_dtype lse_dtype(const fa_args *a)
{
    return a->q.dtype == FA_F64 ? FA_F64 : FA_F32;
}

/* ---- one tensor -------------------------------------------------------------------------------------------------- */

/* The offsets of all elements, in bytes, must fit int64. */
static inline bool offsets_fit(const fa_tensor *t)
{
    int64_t low = 0, high = 0, bytes = (int64_t)fa_dtype_size(t->dtype), ignored;
    for (int d = 0; d < 4; d++) {
        int64_t extent;
        if (t->size[d] < 2)
            continue;
        if (__builtin_mul_overflow(t->size[d] - 1, t->stride[d], &extent))
            return false;
        int64_t *end = extent < 0 ? &low : &high;
        if (__builtin_add_overflow(*end, extent, end))
            return false;
    }
    return !__builtin_mul_overflow(low, bytes, &ignored) && !__builtin_mul_overflow(high, bytes, &ignored);
}

/* Sizes of 0 count as 1: products of some of the sizes are formed on the way to a plan. The factor 8 leaves room for
 * any dtype, and for partial results in a wider one. */
static inline bool count_fits(const int64_t size[4])
{
    int64_t count = 8;
    for (int d = 0; d < 4; d++)
        if (__builtin_mul_overflow(count, size[d] > 0 ? size[d] : 1, &count))
            return false;
    return true;
}

static inline fa_status check_tensor(const char *name, const fa_tensor *t, fa_error *err)
{
    for (int d = 0; d < 4; d++)
        if (t->size[d] < 0)
            return refuse(err, FA_ERR_SHAPE, "%s has shape %s: sizes must not be negative", name, shape(t->size).text);
    if (!count_fits(t->size))
        return refuse(err, FA_ERR_SHAPE, "%s has shape %s: its number of bytes must fit a signed 64-bit integer", name,
                      shape(t->size).text);
    if (is_empty(t))
        return FA_OK;
    if (!offsets_fit(t))
        return refuse(err, FA_ERR_SHAPE, "%s has strides %s: offsets must fit a signed 64-bit integer", name,
                      shape(t->stride).text);
    if (!t->data)
        return refuse(err, FA_ERR_SHAPE, "%s has shape %s and no data: only a tensor without elements may have none",
                      name, shape(t->size).text);
    size_t bytes = fa_dtype_size(t->dtype);
    if (bytes && (uintptr_t)t->data % bytes)
        return refuse(err, FA_ERR_SHAPE, "%s starts at address %p: its dtype %s needs a multiple of %zu", name, t->data,
                      fa_dtype_name(t->dtype), bytes);
    return FA_OK;
}

/* May two elements share memory? Sorted by stride, each dimension must step over all the smaller ones: layouts that do
 * not nest like this are refused too, no allocator makes them. */
static inline bool may_overlap(const fa_tensor *t)
{
    int64_t size[4], stride[4];
    int n = 0;
    if (is_empty(t))
        return false;
    for (int d = 0; d < 4; d++) {
        if (t->size[d] == 1)
            continue;
        int64_t step = t->stride[d] < 0 ? -t->stride[d] : t->stride[d];
        int at = n++;
        for (; at > 0 && stride[at - 1] > step; at--) {
            stride[at] = stride[at - 1];
            size[at] = size[at - 1];
        }
        stride[at] = step;
        size[at] = t->size[d];
    }
    int64_t reach = 0; /* the largest offset within the smaller dimensions */
    for (int d = 0; d < n; d++) {
        if (stride[d] <= reach)
            return true;
        reach += (size[d] - 1) * stride[d];
    }
    return false;
}

static inline fa_status check_form(const char *name, const fa_tensor *t, const int64_t size[4], fa_dtype dtype,
                                   fa_error *err)
{
    if (t->dtype != dtype)
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it must be %s", name, fa_dtype_name(t->dtype),
                      fa_dtype_name(dtype));
    for (int d = 0; d < 4; d++)
        if (t->size[d] != size[d])
            return refuse(err, FA_ERR_SHAPE, "%s has shape %s: it must be %s", name, shape(t->size).text,
                          shape(size).text);
    return check_tensor(name, t, err);
}

static inline fa_status check_result(const char *name, const fa_tensor *t, const int64_t size[4], fa_dtype dtype,
                                     fa_error *err)
{
    TRY(check_form(name, t, size, dtype, err));
    if (may_overlap(t))
        return refuse(err, FA_ERR_SHAPE, "%s has shape %s and strides %s: elements of a result must not share memory",
                      name, shape(t->size).text, shape(t->stride).text);
    return FA_OK;
}

static inline fa_status check_lengths(const char *name, const fa_tensor *t, int64_t B, fa_error *err)
{
    if (!is_given(t))
        return FA_OK;
    if (t->dtype != FA_I32 && t->dtype != FA_I64)
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it must be int32 or int64", name, fa_dtype_name(t->dtype));
    if (t->size[0] != B || t->size[1] != 1 || t->size[2] != 1 || t->size[3] != 1)
        return refuse(err, FA_ERR_SHAPE,
                      "%s has shape %s: it must hold one length per sequence, (%" PRId64 ", 1, 1, 1)",
                      name, shape(t->size).text, B);
    return check_tensor(name, t, err);
}

/* validate_sequences.c: what only a call by sequence has; then the lengths, offsets and pages themselves. */
fa_status fa_check_sequences(const fa_args *a, bool backward, fa_error *err);
fa_status fa_check_sequence_values(const fa_args *a, fa_error *err);

#endif
