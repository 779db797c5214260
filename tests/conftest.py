"""Fixtures and settings of the whole suite."""

import os

# Threads that wait must not spin: on a shared machine that takes the cores from those that work. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

import cases
import poison

THREADS = 2
SEED = int(os.environ.get("FLASHATTN_EXT_TEST_SEED", "0"))
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=bool(os.environ.get("CI")) or not os.environ.get("FLASHATTN_EXT_TEST_RANDOM"),
    max_examples=int(os.environ.get("FLASHATTN_EXT_TEST_EXAMPLES", "100")),
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about five seconds")
    config.addinivalue_line("markers", "big: needs more than 4 GiB of memory; runs with FLASHATTN_EXT_TEST_BIG=1")
    torch.set_num_threads(THREADS)
    poison.fill_malloc()


def pytest_report_header(config):
    return f"flashattn_ext tests: FLASHATTN_EXT_TEST_SEED={SEED}, {THREADS} torch threads, torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if os.environ.get("FLASHATTN_EXT_TEST_BIG"):
        return
    for item in items:
        if item.get_closest_marker("big"):
            item.add_marker(pytest.mark.skip(reason="needs more than 4 GiB; FLASHATTN_EXT_TEST_BIG=1 runs it"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        text = f"torch seed of this test: {SEED}; FLASHATTN_EXT_TEST_SEED={SEED} gives it again"
        report.sections.append(("seeds", text))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same generator state and thread count."""
    torch.manual_seed(SEED)
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


def devices():
    """The devices that this build and this machine can both use."""
    from flashattn_ext import _C

    return ["cpu"] + (["cuda"] if _C.build_info()["cuda"] and torch.cuda.is_available() else [])


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(), indirect=True)


@pytest.fixture
def device(request, monkeypatch):
    """The device of the test, on which all its tensors are made that it does not place itself. On a GPU lengths are
    checked as they are on the CPU. A unittest class, which knows no parameters, runs on the CPU."""
    if getattr(request, "param", "cpu") == "cpu":
        yield "cpu"
        return
    monkeypatch.setenv("FLASHATTN_EXT_CHECK", "1")
    with torch.device(request.param):
        yield request.param


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """Tensors in the parameters of a test were made when it was collected: here they follow it to its device."""
    arguments = getattr(item, "funcargs", {})
    if arguments.get("device", "cpu") != "cpu":
        arguments.update({name: _moved(x, arguments["device"]) for name, x in arguments.items()})


def _moved(x, device):
    if type(x) is dict:
        return {name: _moved(value, device) for name, value in x.items()}
    return cases.moved(x, device) if type(x) is torch.Tensor else x


@pytest.fixture
def isa(request, monkeypatch):
    """Masks the instruction sets above request.param for one test; skips where this machine has not got it."""
    from flashattn_ext import _C

    name = request.param
    if name != "scalar" and name not in _C.cpu_flags()["detected"]:
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setenv("FLASHATTN_EXT_ISA", name)
    _C.refresh_cpu()
    yield name
    monkeypatch.undo()
    _C.refresh_cpu()
