"""The house rules that a reader relies on: includes go downwards only, torch stays in csrc/torch, files stay short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = {".c", ".h", ".cpp", ".cu", ".cuh", ".py"}
# Who may include whom; fa.h is everybody's.
MAY_INCLUDE = {
    "common": {"common"},
    "plan": {"common", "plan"},
    "cpu": {"common", "plan", "cpu"},
    "cuda": {"common", "plan", "cuda"},
    "torch": {"common", "torch"},
}


def tracked(*suffixes):
    folders = ("csrc", "flashattn_ext", "tests", "examples")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*")
                  if p.suffix in suffixes and "build" not in p.parts)


def includes(path):
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(encoding="utf-8"), re.M)


C_FILES = [p for p in tracked(".c", ".h", ".cpp", ".cu", ".cuh") if CSRC in p.parents]
LAYERED = [p for p in C_FILES if p.parent != CSRC]


def test_there_are_sources_in_every_layer():
    layers = {p.relative_to(CSRC).parts[0] for p in LAYERED}
    assert {"common", "plan", "cpu", "torch"} <= layers <= set(MAY_INCLUDE)


@pytest.mark.parametrize("path", LAYERED, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_downwards_only(path):
    layer = path.relative_to(CSRC).parts[0]
    homes = {}
    for source in C_FILES:
        homes.setdefault(source.name, set()).add(source.relative_to(CSRC).parts[0])
    for name in includes(path):
        file = name.rsplit("/", 1)[-1]
        if file == "fa.h" or file not in homes:
            continue
        assert homes[file] & MAY_INCLUDE[layer], f"{layer} includes {name}; allowed: {MAY_INCLUDE[layer]}"


@pytest.mark.parametrize("path", LAYERED, ids=lambda p: str(p.relative_to(CSRC)))
def test_torch_and_python_headers_are_in_csrc_torch_only(path):
    if path.relative_to(CSRC).parts[0] == "torch":
        return
    foreign = [name for name in includes(path) if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name)]
    assert not foreign


def test_the_core_is_c():
    """C++ only where libtorch or pybind11 needs it."""
    assert not [p for p in C_FILES if p.suffix == ".cpp" and "torch" not in p.relative_to(CSRC).parts]


def test_the_core_does_not_allocate_print_or_exit():
    for path in C_FILES:
        if path.relative_to(CSRC).parts[0] in ("common", "plan", "cpu"):
            code = re.sub(r"/\*.*?\*/|//[^\n]*|\"(\\.|[^\"\\])*\"", "", path.read_text(encoding="utf-8"), flags=re.S)
            found = re.findall(r"\b(malloc|calloc|realloc|free|printf|fprintf|puts|exit|abort|assert)\s*\(", code)
            assert not found, f"{path.relative_to(ROOT)} calls {found}"


@pytest.mark.parametrize("path", tracked(*SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 800, f"{lines} lines"


def test_file_names_are_unique():
    names = [p.name for p in C_FILES]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_python_layers():
    """Below the public functions nothing imports them; only integrations and bench import a framework."""
    package = ROOT / "flashattn_ext"
    for path in package.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from)\s+(transformers|rich|matplotlib|numpy|vllm)\b", text, re.M), path.name
