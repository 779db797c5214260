#include "fa_dtype.h"

/* The names are torch's, without the prefix: refusals show them to the user. */
const char *fa_dtype_name(fa_dtype t)
{
    switch (t) {
    case FA_F32: return "float32";
    case FA_BF16: return "bfloat16";
    case FA_F16: return "float16";
    case FA_F64: return "float64";
    case FA_BOOL: return "bool";
    case FA_I32: return "int32";
    case FA_I64: return "int64";
    case FA_I8: return "int8";
    case FA_F8E4M3: return "float8_e4m3fn";
    }
    return "unknown";
}

size_t fa_dtype_size(fa_dtype t)
{
    switch (t) {
    case FA_BOOL:
    case FA_I8:
    case FA_F8E4M3: return 1;
    case FA_BF16:
    case FA_F16: return 2;
    case FA_F32:
    case FA_I32: return 4;
    case FA_F64:
    case FA_I64: return 8;
    }
    return 0;
}
