"""The benchmark of a GPU: what it selects, its reference and its adapters on CPU tensors, and a tiny run on a GPU."""

import json
import types

import pytest
import torch
from conftest import devices

from flashattn_ext.bench import __main__ as command
from flashattn_ext.bench import cases, cases_cuda, check, peers, peers_cuda, report, run, run_cuda

SMALL = {"varlen": "B4H2S64D16", "decode": "B3HQ4HK2SQ1SK40D16", "paged": "B3HQ4HK2SQ1SK40D16",
         "quant": "B3HQ4HK2SQ1SK40D16", "multi": "B3HQ4HK2SQ1SK40D16", "gqa": "B2HQ4HK2S40D16", "dv": "B2H2S40D24DV16",
         "dropout": "B2H2S256D16", "dropout_bwd": "B2H2S256D16", "option": "B4H4S40D16"}


def small_cases(op, dtype="bf16"):
    return cases_cuda.select([op], [cases.Shape.parse(SMALL.get(op, "B3H2S40D16"))], [dtype])


def drawn(case, seed=0):
    return cases.draw(case, torch.Generator().manual_seed(seed))


def test_default_cases_have_the_stated_sizes():
    chosen = cases_cuda.select()
    assert {case.op for case in chosen} == set(cases_cuda.OPS)
    assert len({case.name for case in chosen}) == len(chosen)
    for case in chosen:
        s = case.shape
        if case.op in ("fwd", "bwd", "mask", "mask_bwd", "option", "dropout"):
            assert s.B * s.SQ == (8192 if case.dtype == "f32" else 16384) and s.HQ * s.D == 2048
    forward = [case for case in chosen if case.op == "fwd" and case.dtype == "bf16"]
    assert {(c.shape.D, c.shape.SQ, c.causal) for c in forward} == {
        (d, s, causal) for d in (64, 128, 256) for s in (512, 4096, 16384) for causal in (False, True)}
    packed = next(case for case in chosen if case.op == "varlen")
    assert len(packed.lengths) == 32 and max(packed.lengths) == 4096 and min(packed.lengths) == 64
    assert {case.op for case in cases_cuda.select(quick=True)} == set(cases_cuda.QUICK_OPS)
    assert len(cases_cuda.select(quick=True)) < len(chosen) < len(cases_cuda.select(extended=True))


def test_selection_by_op_shape_and_dtype():
    shape = cases.Shape.parse("B1H2S64D32")
    chosen = cases_cuda.select(["bwd", "option"], [shape], ["f16"])
    assert {case.op for case in chosen} == {"bwd", "option"}
    assert all(case.shape == shape and case.dtype == "f16" for case in chosen)
    assert [case.option for case in chosen if case.option] == list(cases_cuda.OPTIONS)
    window = next(case for case in chosen if case.option == "window")
    assert window.causal and window.window == 16


def test_multiply_adds_count_what_is_seen():
    shape = cases.Shape.parse("B4H2S64D32")
    full, causal = cases_cuda.select(["bwd"], [shape], ["bf16"])
    assert full.flops == 10 * 4 * 2 * 64 * 64 * 32 and causal.flops == full.flops * 65 / 128
    for case in cases_cuda.select(["option", "mask"], [shape], ["bf16"]):
        seen = torch.ones(4, 1, 64, 64, dtype=torch.bool)
        if case.mask == "ragged":
            seen = seen & drawn(case).mask
        if case.option == "lengths":
            seen = seen & (torch.arange(64) < drawn(case).options["kv_seqlens"][:, None, None, None])
        if case.option == "window":
            seen = seen.tril().triu(-case.window)
        assert case.scores == 2 * int(seen.sum()), case.name


@pytest.mark.parametrize("op", cases_cuda.OPS)
def test_results_are_checked_in_every_case(op):
    """Ours, on the CPU, against float64; a wrong result is seen."""
    for case in small_cases(op):
        inputs = drawn(case)
        reference = check.Reference(case, inputs)
        peer = peers.Ours()
        assert peer.missing() is None
        results = peer.collect(peer.open(case, 1)(inputs)(), case)
        assert len(results) == (1 + len(inputs.leaves) if case.backward else 1)
        assert reference.error(results) <= 1, case.name
        for i in range(1 if case.dropout else len(results)):
            wrong = [x + 0.5 * x.detach().abs().max() if i == j else x for j, x in enumerate(results)]
            assert reference.error(wrong) > 1, f"{case.name}: result {i}"


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("op", ["fwd", "bwd"])
def test_rows_of_small_values_are_checked_too(op, length):
    """Late rows of causal attention are means of many values, small beside the first: that they are missing is seen."""
    case = cases_cuda.select([op], [cases.Shape.parse(f"B1H2S{length}D64")], ["bf16"])[1]
    assert case.causal
    inputs = drawn(case)
    reference = check.Reference(case, inputs)
    peer = peers.Ours()
    assert peer.missing() is None
    results = peer.collect(peer.open(case, 1)(inputs)(), case)
    assert reference.error(results) <= 1
    for i, result in enumerate(results):
        holed = result.detach().clone()
        holed[:, :, -length // 4:] = 0
        assert reference.error([*results[:i], holed, *results[i + 1:]]) > check.PEER_SLACK, f"result {i}"


def test_backends_are_asked_only_what_they_can_do():
    by_name = {peer.name: peer for peer in peers_cuda.all_peers()}
    said = {}
    for case in cases_cuda.select():
        for name in ("cudnn", "fa2", "efficient"):
            if by_name[name].concerns(case) and not by_name[name].refuses(case):
                said.setdefault(name, set()).add(case.op)
    assert "mask" in said["cudnn"] and "mask" not in said["fa2"] and "gqa" not in said["efficient"]
    assert all("host" not in ops and "varlen" not in ops and "option" not in ops for ops in said.values())
    host, = small_cases("host")
    assert by_name["sdpa"].concerns(host) and not by_name["sdpa"].concerns(small_cases("fwd")[0])


@pytest.mark.parametrize("op", ["option", "mask", "fwd", "gqa", "bwd"])
def test_flex_means_the_same(op):
    """Its functions for masks and scores, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    from flashattn_ext.bench import peer_flex

    peer = peer_flex.FlexCuda()
    for case in small_cases(op, "f32"):
        inputs = drawn(case)
        peer.compiled = peer_flex._with_sinks if case.option == "sinks" else flex_attention
        for tensor in (inputs.query, inputs.key, inputs.value):
            tensor.requires_grad_(False)  # its backward is not for the CPU
        inputs.gradient = None
        assert check.Reference(case, inputs).error([peer.call(inputs)()]) <= 1, case.name


def test_packed_peers_get_what_they_want():
    """torch's varlen_attn and fa3-fwd stand in by this package's functions of the same signatures."""
    from flashattn_ext import reference, varlen_attn

    def flash(q, k, v, causal, softcap, window_size=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = reference.attention(q, k, v, is_causal=causal, softcap=softcap, window=window_size, enable_gqa=True)
        return out.to(q.dtype).transpose(1, 2)

    def packed(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
        return varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size=(-1, 0 if causal else -1))

    def cached(q, k, v, cache_seqlens, causal):
        return reference.decode_attention(q, k, v, cache_seqlens, causal=causal).to(q.dtype)

    torch_varlen, fa3 = peers_cuda.TorchVarlen(), peers_cuda.FlashAttention3()
    torch_varlen.function, torch_varlen.knows = varlen_attn, {"window_size": None, "enable_gqa": None}
    fa3.module = types.SimpleNamespace(flash_attn_func=flash, flash_attn_varlen_func=packed,
                                       flash_attn_with_kvcache=cached)
    fa3.flags = {"FLASHATTENTION_DISABLE_LOCAL": False, "FLASHATTENTION_DISABLE_FP16": True}
    counted = 0
    for op in ("varlen", "option", "fwd", "gqa", "dv", "decode", "multi", "paged", "quant", "host", "mask"):
        for case in small_cases(op):
            for peer in (torch_varlen, fa3):
                if not peer.concerns(case) or peer.refuses(case):
                    continue
                counted += 1
                inputs = drawn(case)
                results = peer.collect(peer.open(case, 1)(inputs)(), case)
                assert check.Reference(case, inputs).error(results) <= 1, f"{peer.name}: {case.name}"
    assert counted == 2 * 2 + 2 + 3 + 2 + 1 + 1 + 1 + 1 + 1


def test_peers_that_are_missing_say_so(monkeypatch):
    monkeypatch.setattr(peers_cuda, "FA3_CONFIG", "no_module_of_this_name")
    assert peers_cuda.FlashAttention3().missing() == "fa3-fwd is not installed"
    monkeypatch.setattr(peers_cuda.OursCuda, "missing", lambda self: None)
    chosen, left_out = command.choose_peers(None, "cuda")
    assert chosen[0].name == "ours" and "FA3 is not timed: fa3-fwd is not installed" in left_out
    plain, option = small_cases("fwd")[0], small_cases("option")[0]
    assert chosen[-1].name == "flex" and chosen[-1].concerns(option) and not chosen[-1].concerns(plain)
    asked, _ = command.choose_peers(["ours", "flex"], "cuda")
    assert asked[1].concerns(plain)


def test_another_diagonal_is_refused():
    fa3, varlen = peers_cuda.FlashAttention3(), peers_cuda.TorchVarlen()
    fa3.flags, varlen.knows = {}, ("window_size", "enable_gqa")
    full, causal = cases_cuda.select(["fwd"], [cases.Shape.parse("B1H2SQ16SK64D16")], ["bf16"])
    window = next(case for case in cases_cuda.select(["option"], [full.shape], ["bf16"]) if case.option == "window")
    assert fa3.refuses(causal) == fa3.refuses(window) == varlen.refuses(window) == peers_cuda.OTHER_DIAGONAL
    assert fa3.refuses(full) is fa3.refuses(small_cases("fwd")[1]) is varlen.refuses(small_cases("varlen")[1]) is None


@pytest.fixture
def as_if_a_gpu(monkeypatch):
    """What run_cuda asks of a device before it times anything, of the CPU."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_case_that_all_refuse_has_no_times(as_if_a_gpu):
    by_name = {peer.name: peer for peer in peers_cuda.all_peers()}
    case = small_cases("fwd", "f32")[0]
    result = run_cuda.measure_case(case, [by_name["cudnn"], by_name["fa2"]], 3, 1.0)
    assert {sampled.skipped for sampled in result.peers.values()} == {"no float32"}
    assert not any(sampled.times for sampled in result.peers.values())
    assert command.failures([result], by_name["cudnn"]) == []


class NoMemory(peers.Eager):
    def call(self, inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_who_ran_out_of_memory_is_said(as_if_a_gpu, monkeypatch):
    case, small = small_cases("fwd", "f32")[0], NoMemory()
    result = run_cuda.measure_case(case, [small, peers.TorchSDPA()], 3, 1.0)
    assert result.peers["eager"].skipped == "the device's memory is too small for eager"
    failed, = command.failures([result], small)
    assert case.name in failed and "too small for eager" in failed

    monkeypatch.setattr(run_cuda, "_time_device", lambda *_: None)
    result = run_cuda.measure_case(case, [peers.TorchSDPA(), small], 3, 1.0)
    assert result.peers["eager"].skipped == "OutOfMemoryError: CUDA out of memory" and not result.peers["sdpa"].skipped


def test_a_device_that_waits_for_the_host_is_reported(as_if_a_gpu, monkeypatch):
    case, sdpa = small_cases("fwd", "f32")[0], peers.TorchSDPA()
    for busy_from, waited in ((run_cuda.LONGEST_SLEEP, False), (2 * run_cuda.LONGEST_SLEEP, True)):
        monkeypatch.setattr(run_cuda, "_round", lambda turns, sleep: (sleep >= busy_from, [1e-3] * len(turns)))
        result = run_cuda.measure_case(case, [sdpa], 3, 1.0)
        assert len(result.peers["sdpa"].times) == 3 and result.waited == waited
        said = [line for line in report.notes([result], {"sdpa": sdpa}, "cuda") if "waited" in line]
        assert len(said) == waited and all(case.name in line for line in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert command.main(["--device", "cuda", "--quick"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_rates_and_columns_of_a_table():
    """Without a GPU, from times that are given; as wide as 120 columns even where every peer was timed."""
    from flashattn_ext.bench import ceilings_cuda

    case = cases_cuda.select(["fwd"], [cases.Shape.parse("B4H16S4096D128")], ["bf16"])[0]
    result = run.Result(case, {"ours": run.Sampled([1e-3] * 3), "cudnn": run.Sampled([1.1e-3] * 3),
                               "fa2": run.Sampled(skipped="no such thing")}, "ours")
    all_peers = peers_cuda.all_peers()
    shown, machine = {peer.name: peer for peer in all_peers}, ceilings_cuda.Ceilings(8e5, 3e3)
    text = report.markdown([result], machine, shown)
    assert "x cuDNN" in text and "x FA2" not in text and "| 550 TFLOP/s | 69% | 1.10 | 1.10 | cuDNN |" in text
    assert any("FA2 left out: no such thing" in line for line in report.notes([result], shown, "cuda"))

    shown["fa3"].flags, shown["varlen"].knows = {"FLASHATTENTION_DISABLE_LOCAL": True}, ("window_size", "enable_gqa")
    results = [run.Result(c, {peer.name: run.Sampled([1.234e-3] * 3) for peer in all_peers
                              if peer.concerns(c) and not peer.refuses(c)}, "ours")
               for c in cases_cuda.select(extended=True)]
    lines = report.plain(results, machine, shown).splitlines()
    assert max(map(len, lines)) <= 120, max(lines, key=len)
    assert len(lines) > len(results) and sum(line.startswith("case ") for line in lines) > 3


# Why torch's backends and packed sequences may be left out; what torch says is of a mask or a gradient that one lacks.
KNOWN_REASONS = {"no float32", "no masks", "no gradient of a bias", "as many key as query heads only", "DV must be D",
                 "no windows in this torch", "as many key as query heads only, in this torch",
                 "RuntimeError: No available kernel. Aborting execution."}


def reasons(rows):
    return {peer["skipped"] for row in rows for peer in row["peers"].values() if peer["skipped"]}


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU and a build with CUDA")
def test_a_tiny_run_on_a_gpu(tmp_path, capsys):
    figures = tmp_path / "bench.json"
    options = ["--device", "cuda", "--peers", "ours,sdpa,own,cudnn,fa2,efficient,varlen", "--rounds", "3",
               "--shapes", "B2H2S256D64", "--dtypes", "bf16", "--json", str(figures), "--ops",
               "fwd,bwd,mask,mask_bwd,option,dropout,varlen,host,host_grad"]
    assert command.main(options) == 0
    found = json.loads(figures.read_text())
    assert found["machine"]["device"]["name"] and all(row["peers"]["ours"]["seconds"] for row in found["cases"])
    assert any(row["ratios"].get("fa2") for row in found["cases"])
    assert reasons(found["cases"]) <= KNOWN_REASONS
    decode = ["--device", "cuda", "--ops", "decode,paged,quant,multi", "--shapes", "B2HQ4HK2SQ1SK512D64", "--dtypes",
              "bf16", "--peers", "ours,own,cudnn"]
    assert command.main(decode) == 0
    assert "x own" in capsys.readouterr().out


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU and a build with CUDA")
def test_peers_are_compared_without_ours_on_a_gpu(tmp_path):
    """Of float32 there is nothing to compare them in."""
    figures = tmp_path / "bench.json"
    options = ["--device", "cuda", "--peers", "cudnn,fa2", "--dtypes", "f32,bf16", "--ops", "fwd", "--rounds", "3",
               "--shapes", "B2H2S256D64", "--json", str(figures)]
    assert command.main(options) == 0
    rows = json.loads(figures.read_text())["cases"]
    assert reasons(rows) == {"no float32"}
    assert all(bool(row["peers"]["cudnn"]["seconds"]) == (row["dtype"] == "bf16") for row in rows)
