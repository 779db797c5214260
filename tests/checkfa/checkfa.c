#define _GNU_SOURCE /* sigaction */
#include "checkfa.h"

#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ck_options ck_opt = {.seed = 1, .only = -1};

/* ---- the report -------------------------------------------------------------------------------------------------- */

typedef struct row {
    char name[64];
    int64_t passed, failed;
    double worst;
} row;

enum { ROWS = 128, SHOWN = 5 /* failures printed of one kernel */ };
static row rows[ROWS];
static int row_count;
static char now[1024];

static row *row_of(const char *kernel)
{
    for (int i = 0; i < row_count; i++)
        if (!strcmp(rows[i].name, kernel))
            return &rows[i];
    if (row_count == ROWS) {
        fprintf(stderr, "checkfa: more than %d kernels\n", ROWS);
        exit(2);
    }
    snprintf(rows[row_count].name, sizeof rows[0].name, "%s", kernel);
    return &rows[row_count++];
}

void ck_result(const char *kernel, bool ok, double worst, const char *format, ...)
{
    row *r = row_of(kernel);
    if (worst > r->worst)
        r->worst = worst;
    if (ok) {
        r->passed++;
        return;
    }
    if (r->failed++ < SHOWN || ck_opt.only >= 0) {
        va_list args;
        va_start(args, format);
        printf("FAIL %s: ", kernel);
        vprintf(format, args);
        printf("\n");
        va_end(args);
        fflush(stdout);
    }
}

bool ck_kernel_wanted(const char *kernel)
{
    return !ck_opt.filter || strstr(kernel, ck_opt.filter);
}

void ck_now(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(now, sizeof now, format, args);
    va_end(args);
}

/* Only calls that are allowed in a signal handler. */
static void on_crash(int signal)
{
    const char *what = signal == SIGSEGV || signal == SIGBUS ? "FAIL touched memory it must not: " : "FAIL crashed: ";
    if (write(STDOUT_FILENO, what, strlen(what)) < 0 || write(STDOUT_FILENO, now, strlen(now)) < 0 ||
        write(STDOUT_FILENO, "\n", 1) < 0)
        _exit(3);
    _exit(1);
}

static void catch_crashes(void)
{
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* they print more than this does */
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {.sa_handler = on_crash};
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        sigaction(signals[i], &action, NULL);
#else
    (void)on_crash;
#endif
}

/* A kernel that this build lists and no case reached would pass unseen. */
static void check_coverage(void)
{
    fa_kernel_info list[256];
    const char *isas[8];
    ck_use_isa(isas[ck_isas(isas) - 1]);
    int n = fa_kernels(list, 256);
    for (int i = 0; i < n && i < 256; i++) {
        if (!list[i].usable)
            continue;
        const row *r = row_of(list[i].name);
        const int64_t checks = r->passed + r->failed;
        ck_result("coverage", checks > 0, 0, "no case reached %s", list[i].name);
    }
}

static int print_report(void)
{
    int64_t passed = 0, failed = 0;
    printf("%-32s %8s %8s   %s\n", "kernel", "passed", "failed", "worst error, in tolerances");
    for (int i = 0; i < row_count; i++) {
        printf("%-32s %8" PRId64 " %8" PRId64 "   %.2f\n", rows[i].name, rows[i].passed, rows[i].failed, rows[i].worst);
        passed += rows[i].passed;
        failed += rows[i].failed;
    }
    printf("%" PRId64 " passed, %" PRId64 " failed\n", passed, failed);
    return failed || !passed;
}

/* ---- options ----------------------------------------------------------------------------------------------------- */

static void usage(int status)
{
    fprintf(status ? stderr : stdout,
            "checkfa [options]: every kernel against the scalar reference; exit 0 if all passed\n"
            "  --isa NAME      only this instruction set: scalar, avx2, avx512, avx512bf16\n"
            "  --filter TEXT   only kernels whose name contains TEXT\n"
            "  --seed N        of all random cases (default 1)\n"
            "  --case N        repeat one case of this seed, as a failure names it\n"
            "  --quick         fewer cases, for slow builds\n"
            "  --fuzz N        only N rounds of wild arguments (default run: 20000)\n"
            "  --bench         speed of every kernel on one worker instead\n");
    exit(status);
}

static int64_t number(const char *text)
{
    char *end;
    long long n = text ? strtoll(text, &end, 10) : -1;
    if (n < 0 || *end) {
        fprintf(stderr, "checkfa: '%s' is no number of 0 or more\n", text ? text : "");
        usage(2);
    }
    return n;
}

static void check_isa_name(const char *name)
{
    const char *isas[8];
    const int n = ck_isas(isas);
    for (int i = 0; i < n; i++)
        if (name && !strcmp(name, isas[i]))
            return;
    fprintf(stderr, "checkfa: instruction set '%s'; this machine has", name ? name : "");
    for (int i = 0; i < n; i++)
        fprintf(stderr, " %s", isas[i]);
    fprintf(stderr, "\n");
    exit(2);
}

static void parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        i++;
        if (!strcmp(option, "--isa"))
            check_isa_name(ck_opt.isa = value);
        else if (!strcmp(option, "--filter") && value)
            ck_opt.filter = value;
        else if (!strcmp(option, "--seed"))
            ck_opt.seed = (uint64_t)number(value);
        else if (!strcmp(option, "--case"))
            ck_opt.only = number(value);
        else if (!strcmp(option, "--fuzz"))
            ck_opt.fuzz = number(value);
        else {
            i--;
            if (!strcmp(option, "--quick"))
                ck_opt.quick = true;
            else if (!strcmp(option, "--bench"))
                ck_opt.bench = true;
            else
                usage(strcmp(option, "--help") != 0 ? 2 : 0);
        }
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    catch_crashes();
    if (ck_opt.bench) {
        ck_bench();
        return 0;
    }
    const bool all = !ck_opt.isa && !ck_opt.filter && ck_opt.only < 0;
    if (ck_opt.fuzz == 0) {
        if (ck_opt.only < 0) {
            ck_check_dtypes();
            ck_check_refusals();
            ck_check_plans();
            ck_check_caches();
        }
        ck_check_forward();
        ck_check_backward();
        ck_check_sequences();
        if (all)
            check_coverage();
    }
    if (ck_opt.fuzz || all)
        ck_fuzz(ck_opt.fuzz ? ck_opt.fuzz : ck_opt.quick ? 3000 : 20000);
    return print_report();
}
