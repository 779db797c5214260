#include "../fa.h"

const char *fa_status_name(fa_status s)
{
    switch (s) {
    case FA_OK: return "ok";
    case FA_ERR_SHAPE: return "shape";
    case FA_ERR_VALUE: return "value";
    case FA_ERR_UNSUPPORTED: return "unsupported";
    case FA_ERR_WORKSPACE: return "workspace";
    }
    return "unknown";
}
