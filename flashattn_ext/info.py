"""python -m flashattn_ext.info: what this build can do on this machine."""

import platform

import torch

from . import _C, __version__, build_info, kernels


def report():
    """The text that `python -m flashattn_ext.info` prints."""
    flags = _C.cpu_flags()
    lines = [f"flashattn_ext {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
             f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"]
    lines += ["", "Build"]
    lines += [f"  {name:<14}{_words(value)}" for name, value in build_info().items()]
    lines += ["", "CPU"]
    lines += [f"  {'detected':<14}{_words(flags['detected'])}", f"  {'enabled':<14}{_words(flags['enabled'])}"]
    lines += ["  FLASHATTN_EXT_ISA = scalar | avx2 | avx512 | avx512bf16 sets the highest to use"]
    if build_info()["cuda"]:
        lines += ["  FLASHATTN_EXT_CUDA_ARCH = plain | sm80 | sm90 likewise for GPUs"]
    lines += ["", "Kernels" + " " * 29 + "op       dtype     runs here"]
    lines += [f"  {k['name']:<34}{k['op']:<9}{k['dtype']:<10}{'yes' if k['usable'] else 'no'}" for k in kernels()]
    return "\n".join(lines)


def _words(value):
    if isinstance(value, (list, tuple)):
        return " ".join(value) or "none"
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


if __name__ == "__main__":
    print(report())
