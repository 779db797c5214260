"""Builds the C core with CMake and Ninja, then the two torch-facing libraries with torch.utils.cpp_extension.

  flashattn_ext/libflashattn_ext.so   the ops, on torch's stable ABI, with the whole C core; free of Python
  flashattn_ext/_C.*.so               pybind11: plans, kernels, CPU flags, build info

CC and CXX choose the compilers. FA_CUDA=0 or 1 decides about CUDA kernels; unset, they are built where torch has CUDA
and nvcc is found. The rest is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
CORE = ROOT / "build" / "core"
OPS, MODULE = "flashattn_ext.libflashattn_ext", "flashattn_ext._C"
TORCH_MIN = (2, 10)
TORCH_TARGET = f"0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}000000000000"
# The commands that build, or announce a build. Others, as sdist and egg_info, work without torch and compilers.
BUILD_COMMANDS = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}


def fail(sentence):
    sys.exit(f"flashattn_ext: {sentence}")


# ---- what a build needs ---------------------------------------------------------------------------------------------


def require_torch():
    try:
        import torch
    except ImportError:
        fail("torch 2.10 or later must be installed first, and pip must build against it: "
             "pip install --no-build-isolation .")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MIN:
        fail(f"torch must be 2.10 or later, found {torch.__version__}: upgrade torch first.")


def require_compilers():
    # Set for CMake, setuptools and torch alike, so that one compiler builds everything.
    for variable, default, language in (("CC", "cc", "C"), ("CXX", "c++", "C++")):
        compiler = os.environ.setdefault(variable, default)
        if not shutil.which(compiler.split()[0]):
            fail(f"no {language} compiler: '{compiler}' was not found; install gcc and g++ (or clang), or set "
                 f"{variable}.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail(f"the headers of Python {sys.version_info.major}.{sys.version_info.minor} are missing "
             "(Python.h): install Python's development package.")


def require_tool(name):
    """Puts `name` on the PATH: from this Python's packages, or where it is already."""
    scripts = sysconfig.get_path("scripts")
    if shutil.which(name, path=scripts):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    elif not shutil.which(name):
        fail(f"{name} was not found: pip install cmake ninja.")


def wants_cuda():
    """Are the CUDA kernels built? They need nvcc, no GPU and no CUDA in torch: the library serves both."""
    choice = os.environ.get("FA_CUDA", "")
    if choice not in ("", "0", "1"):
        fail(f"FA_CUDA is '{choice}': it must be 0 or 1, or not set.")
    if choice == "1" and not shutil.which("nvcc"):
        fail("FA_CUDA is 1, but nvcc was not found: put CUDA's compiler on the PATH, or set FA_CUDA to 0.")
    if choice:
        return choice == "1"
    import torch
    return torch.version.cuda is not None and shutil.which("nvcc") is not None


# ---- the build ------------------------------------------------------------------------------------------------------


def build_core(version):
    try:
        subprocess.run(["cmake", "-S", ROOT / "csrc", "-B", CORE, "-G", "Ninja", f"-DFA_VERSION={version}",
                        f"-DFA_CUDA={'ON' if wants_cuda() else 'OFF'}", "-DCMAKE_BUILD_TYPE=Release",
                        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"], check=True)
        subprocess.run(["cmake", "--build", CORE, "--target", "fa"], check=True)
    except subprocess.CalledProcessError:
        fail("the C core did not build: the compiler's words are above.")


def extensions():
    from torch.utils.cpp_extension import include_paths, library_paths

    common = {
        "include_dirs": [str(ROOT / "csrc"), str(CORE), *include_paths()],
        "extra_compile_args": ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall"],
        "language": "c++",
    }
    exports = ROOT / "csrc" / "torch" / "exports.map"
    ops = Extension(
        OPS, [f"csrc/torch/torch_{part}.cpp" for part in ("ops", "varlen", "cache")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_objects=[str(CORE / "libfa.a")],
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10", "dl"],
        extra_link_args=["-Wl,-soname,libflashattn_ext.so", f"-Wl,--version-script={exports}"],
        **common)
    # Linked against the op library (build_extension says where it lies), which lies beside it once installed.
    module = Extension(MODULE, ["csrc/torch/torch_module.cpp"], libraries=["flashattn_ext"],
                       extra_link_args=["-pthread", "-Wl,-rpath,$ORIGIN"], **common)
    return [ops, module]


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "torch")  # kept, so that the next build is incremental

        def build_extensions(self):
            build_core(self.distribution.get_version())
            super().build_extensions()

        def build_extension(self, ext):
            if ext.name == OPS:  # what CMake found the CUDA kernels to need; empty without them
                ext.extra_link_args += (CORE / "link.txt").read_text(encoding="utf-8").split()
            if ext.name == MODULE:
                ext.extra_link_args.append("-L" + os.path.dirname(self.get_ext_fullpath(OPS)))
            super().build_extension(ext)

        def get_ext_filename(self, ext_name):
            filename = super().get_ext_filename(ext_name)
            if ext_name.split(".")[-1] == OPS.split(".")[-1]:
                filename = os.path.join(os.path.dirname(filename), "libflashattn_ext.so")
            return filename

    return Build


if BUILD_COMMANDS.isdisjoint(sys.argv):
    setup()
else:
    require_torch()
    require_compilers()
    wants_cuda()
    require_tool("cmake")
    require_tool("ninja")
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
