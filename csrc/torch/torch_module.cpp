// flashattn_ext._C: what is no tensor op. Kernels, CPU flags, how the library was built, and the plan of a call.
// It shares the C core with the op library, which must be loaded first (flashattn_ext/_lib.py does).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fa.h"
#include "fa_build_info.h"

namespace py = pybind11;

namespace {

// ---- what this machine and this build can do ------------------------------------------------------------------------

py::list kernels()
{
    const int cpu = fa_kernels(nullptr, 0), cuda = fa_cuda_kernels(nullptr, 0);
    std::vector<fa_kernel_info> list(static_cast<size_t>(cpu + cuda));
    fa_kernels(list.data(), cpu);
    fa_cuda_kernels(list.data() + cpu, cuda);
    py::list result;
    for (const fa_kernel_info &k : list) {
        py::dict entry;
        entry["name"] = k.name;
        entry["op"] = k.op;
        entry["target"] = k.target;
        entry["dtype"] = fa_dtype_name(k.dtype);
        entry["usable"] = k.usable;
        result.append(entry);
    }
    return result;
}

py::list flag_names(unsigned flags)
{
    const std::pair<unsigned, const char *> names[] = {{FA_CPU_AVX2, "avx2"},
                                                       {FA_CPU_AVX512, "avx512"},
                                                       {FA_CPU_AVX512BF16, "avx512bf16"},
                                                       {FA_CPU_AMX, "amx"},
                                                       {FA_CPU_NEON, "neon"}};
    py::list result;
    for (const auto &[flag, name] : names)
        if (flags & flag)
            result.append(name);
    return result;
}

py::dict cpu_flags()
{
    py::dict result;
    result["detected"] = flag_names(fa_cpu_detected());
    result["enabled"] = flag_names(fa_cpu_enabled());
    return result;
}

void check_variable(const char *name, std::initializer_list<const char *> allowed, const char *words)
{
    const char *value = std::getenv(name);
    if (!value)
        return;
    for (const char *word : allowed)
        if (std::string(value) == word)
            return;
    throw py::value_error("the environment variable " + std::string(name) + " is '" + value + "': it must be " + words +
                          ", or not set");
}

void refresh_cpu()
{
    check_variable("FLASHATTN_EXT_ISA", {"scalar", "avx2", "avx512", "avx512bf16"},
                   "scalar, avx2, avx512 or avx512bf16");
    check_variable("FLASHATTN_EXT_CUDA_ARCH", {"plain", "sm80", "sm90"}, "plain, sm80 or sm90");
    fa_cpu_refresh();
}

py::dict build_info()
{
    py::list isas;
    std::istringstream words(FA_BUILD_ISAS);
    for (std::string isa; words >> isa;)
        isas.append(isa);
    py::dict info;
    info["version"] = FA_BUILD_VERSION;
    info["torch"] = TORCH_VERSION;
    info["torch_abi"] = "2.10"; // TORCH_TARGET_VERSION of the op library
    info["c_compiler"] = FA_BUILD_C_COMPILER;
    info["cxx_compiler"] = __VERSION__;
    info["build_type"] = FA_BUILD_TYPE;
    info["c_flags"] = FA_BUILD_C_FLAGS;
    info["kernel_flags"] = FA_BUILD_KERNEL_FLAGS;
    info["isas"] = isas;
    info["cuda"] = static_cast<bool>(FA_CUDA);
    return info;
}

// ---- ceilings -------------------------------------------------------------------------------------------------------

// The most that `threads` threads did in a second, of some attempts; work() returns how much one call did.
template <class Work> double best_rate(int threads, const Work &work)
{
    constexpr int ATTEMPTS = 8;
    double best = 0;
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        std::vector<double> done(static_cast<size_t>(threads));
        std::vector<std::thread> others;
        const auto start = std::chrono::steady_clock::now();
        for (int t = 1; t < threads; t++)
            others.emplace_back([&, t] { done[static_cast<size_t>(t)] = work(t); });
        done[0] = work(0);
        for (std::thread &other : others)
            other.join();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        double sum = 0;
        for (double d : done)
            sum += d;
        best = std::max(best, sum / seconds.count());
    }
    return best;
}

py::dict ceilings(std::optional<int> asked)
{
    constexpr int64_t STEPS = 1 << 22, FLOATS = 32 << 20; // 128 MiB a thread: more than it has of any cache
    const int threads = asked ? *asked : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    if (threads < 1 || threads > 1024)
        throw py::value_error("threads is " + std::to_string(threads) + ": it must be between 1 and 1024");
    double fma, dot, read;
    {
        const py::gil_scoped_release others_may_run;
        const std::vector<std::vector<float>> data(static_cast<size_t>(threads), std::vector<float>(FLOATS, 1.0f));
        fma = best_rate(threads, [](int) { return fa_probe_fma(STEPS); });
        dot = best_rate(threads, [](int) { return fa_probe_dot_bf16(STEPS); });
        read = best_rate(threads, [&](int t) { return fa_probe_read(data[static_cast<size_t>(t)].data(), FLOATS); });
    }
    py::dict result;
    result["threads"] = threads;
    result["fma_gflops"] = fma * 1e-9;
    result["dot_bf16_gflops"] = dot * 1e-9;
    result["read_gbs"] = read * 1e-9;
    return result;
}

// ---- plans ----------------------------------------------------------------------------------------------------------

// The planner reads sizes, strides and dtypes, never data; but a tensor without an address would be absent.
alignas(256) char somewhere[256]; // aligned as the memory of a GPU is

fa_dtype dtype_named(const std::string &name)
{
    for (int t = FA_F32; t <= FA_I64; t++)
        if (name == fa_dtype_name(static_cast<fa_dtype>(t)))
            return static_cast<fa_dtype>(t);
    throw py::value_error("dtype is '" + name + "': it must be float32, bfloat16, float16, float64 or (a mask's) bool");
}

fa_tensor dense(int64_t s0, int64_t s1, int64_t s2, int64_t s3, fa_dtype dtype)
{
    // Unsigned, so that a product that overflows wraps; fa_validate refuses such sizes.
    const uint64_t u1 = s1, u2 = s2, u3 = s3;
    return {somewhere,
            {s0, s1, s2, s3},
            {static_cast<int64_t>(u1 * u2 * u3), static_cast<int64_t>(u2 * u3), s3, 1},
            dtype};
}

const char *kind_name(fa_kernel_kind kind)
{
    switch (kind) {
    case FA_KERNEL_SCALAR: return "scalar";
    case FA_KERNEL_PANEL: return "panel";
    case FA_KERNEL_ROWS: return "rows";
    case FA_KERNEL_CUDA: return "cuda";
    }
    return "unknown";
}

// The name of a kernel without its arguments.
std::string short_name(const char *mangled)
{
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> full(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                           std::free);
    const std::string name = full ? full.get() : mangled;
    const size_t start = name.rfind("void ", 0) == 0 ? 5 : 0;
    return name.substr(start, name.find_first_of("<(", start) - start);
}

py::list launches_of(const fa_plan &p, const fa_args &a)
{
    py::list result;
    if (!a.device_memory || a.device >= fa_cuda_devices())
        return result;
    std::array<fa_cuda_launch, 8> found;
    fa_error err;
    const int n = fa_cuda_launches(&a, &p, found.data(), static_cast<int>(found.size()), &err);
    if (n < 0)
        throw std::runtime_error(err.text);
    for (int i = 0; i < std::min(n, static_cast<int>(found.size())); i++) {
        const fa_cuda_launch &l = found[static_cast<size_t>(i)];
        py::dict d;
        d["name"] = short_name(l.name);
        d["blocks"] = l.blocks;
        d["threads"] = l.threads;
        d["shared_bytes"] = l.shared_bytes;
        d["registers"] = l.registers;
        d["local_bytes"] = l.local_bytes;
        d["resident_blocks"] = l.resident_blocks;
        result.append(d);
    }
    return result;
}

py::dict dict_of(const fa_plan &p, const fa_args &a)
{
    std::string report(static_cast<size_t>(fa_plan_print(&p, &a, nullptr, 0)) + 1, '\0');
    report.resize(static_cast<size_t>(fa_plan_print(&p, &a, report.data(), report.size())));
    py::dict d;
    d["kernel"] = p.kernel;
    d["kind"] = kind_name(p.kind);
    d["block_rows"] = p.block_rows;
    d["block_keys"] = p.block_keys;
    d["panels"] = p.panels;
    d["chunk_panels"] = p.chunk_panels;
    d["splits"] = p.splits;
    d["split_keys"] = p.split_keys;
    d["tasks"] = p.tasks;
    d["threads"] = p.threads;
    d["stages"] = p.stages;
    d["thread_bytes"] = p.thread_bytes;
    d["shared_bytes"] = p.shared_bytes;
    d["workspace"] = p.workspace;
    d["flops"] = p.flops;
    d["bytes"] = p.bytes;
    d["why"] = std::string(p.why) + "; " + p.why_splits;
    d["report"] = report;
    d["launches"] = launches_of(p, a);
    return d;
}

void check(fa_status status, const fa_error &err)
{
    if (status == FA_ERR_VALUE)
        throw py::value_error(err.text);
    if (status != FA_OK)
        throw std::runtime_error(err.text);
}

py::dict plan(const std::string &op, const std::string &dtype, int64_t B, int64_t HQ, int64_t HK, int64_t SQ,
              int64_t SK, int64_t D, int64_t DV, int64_t window_left, int64_t window_right, bool bottom_right,
              double softcap, double dropout_p, const std::optional<std::string> &mask_dtype,
              const std::optional<std::array<int64_t, 4>> &mask_shape, bool has_sinks, bool has_alibi, bool allow_tf32,
              int64_t needs, int threads, int device)
{
    if (op != "forward" && op != "backward")
        throw py::value_error("op is '" + op + "': it must be forward or backward");
    if (threads < 1)
        throw py::value_error("threads is " + std::to_string(threads) + ": it must be at least 1");
    const fa_dtype t = dtype_named(dtype), lse = t == FA_F64 ? FA_F64 : FA_F32;
    fa_args a = {};
    a.device_memory = device >= 0;
    a.device = device;
    a.q = dense(B, HQ, SQ, D, t);
    a.k = dense(B, HK, SK, D, t);
    a.v = dense(B, HK, SK, DV, t);
    if (mask_dtype) {
        const auto s = mask_shape.value_or(std::array<int64_t, 4>{B, HQ, SQ, SK});
        a.mask = dense(s[0], s[1], s[2], s[3], dtype_named(*mask_dtype));
    }
    if (has_sinks)
        a.sinks = dense(1, HQ, 1, 1, FA_F32);
    if (has_alibi)
        a.alibi = dense(1, HQ, 1, 1, FA_F32);
    a.scale = 1;
    a.softcap = softcap;
    a.window_left = window_left;
    a.window_right = window_right;
    a.bottom_right = bottom_right;
    a.dropout_p = dropout_p;
    a.allow_tf32 = allow_tf32;
    a.out = dense(B, HQ, SQ, DV, t);
    a.lse = dense(B, HQ, SQ, 1, lse);
    fa_error err;
    fa_plan p;
    if (op == "forward") {
        check(fa_validate_forward(&a, &err), err);
        if (a.device_memory)
            fa_cuda_plan_forward(&a, &p);
        else
            fa_plan_forward(&a, threads, &p);
        return dict_of(p, a);
    }
    a.dout = a.out;
    if (needs & 1)
        a.dq = a.q;
    if (needs & (2 | 4)) {
        a.dk = a.k;
        a.dv = a.v;
    }
    if (needs & 8)
        a.dmask = a.mask;
    if (needs & 16)
        a.dsinks = dense(1, HQ, 1, 1, lse);
    check(fa_validate_backward(&a, &err), err);
    if (a.device_memory)
        fa_cuda_plan_backward(&a, &p);
    else
        fa_plan_backward(&a, threads, &p);
    return dict_of(p, a);
}

} // namespace

PYBIND11_MODULE(_C, m)
{
    using namespace py::literals;
    m.def("kernels", &kernels, "Every kernel of this build: name, op, target, dtype, and whether it can run here.");
    m.def("cpu_flags", &cpu_flags, "Instruction sets: detected, and enabled (FLASHATTN_EXT_ISA masks them).");
    m.def("refresh_cpu", &refresh_cpu, "Reads FLASHATTN_EXT_ISA anew; ValueError if it holds anything unknown.");
    m.def("build_info", &build_info, "Version, compilers, flags, the torch built against, instruction sets, CUDA.");
    m.def("ceilings", &ceilings,
          "What `threads` threads can do here (None: one for each of the machine's): fp32 multiply-adds and bf16 dot "
          "products in GFLOP/s (0: no such instruction), reading memory in GB/s. Takes a second; 128 MiB a thread.",
          "threads"_a = py::none());
    m.def("plan", &plan,
          "The plan of a call on dense tensors: the fields of fa_plan (csrc/fa.h; sizes in bytes, flops and bytes of "
          "one call) and its report. mask_shape None = (B, HQ, SQ, SK); needs: bits of the op `backward`; "
          "device: of the GPU, or -1 for the CPU. "
          "RuntimeError or ValueError as the call itself would.",
          "op"_a, "dtype"_a, "B"_a, "HQ"_a, "HK"_a, "SQ"_a, "SK"_a, "D"_a, "DV"_a, py::kw_only(), "window_left"_a = -1,
          "window_right"_a = -1, "bottom_right"_a = false, "softcap"_a = 0.0, "dropout_p"_a = 0.0,
          "mask_dtype"_a = py::none(), "mask_shape"_a = py::none(), "has_sinks"_a = false, "has_alibi"_a = false,
          "allow_tf32"_a = false, "needs"_a = 7, "threads"_a, "device"_a = -1);
}
