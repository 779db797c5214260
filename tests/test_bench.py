"""The benchmark's command line on a tiny selection."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch


def leaves(data):
    if isinstance(data, (dict, list)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from leaves(value)
    else:
        yield data


@pytest.mark.slow
def test_quick_run_writes_a_table_json_markdown_and_a_plot(tmp_path):
    files = {"json": tmp_path / "bench.json", "markdown": tmp_path / "bench.md", "plot": tmp_path / "bench.png"}
    command = [sys.executable, "-m", "flashattn_ext.bench", "--quick", "--ops", "fwd,decode,paged,varlen", "--shapes",
               "B1H2S64D16", "--dtypes", "f32", "--rounds", "3", "--seconds", "1"]
    if importlib.util.find_spec("matplotlib") is None:
        files.pop("plot")
    for kind, path in files.items():
        command += [f"--{kind}", str(path)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), MPLBACKEND="Agg")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for word in ("fwd", "f32", "B1H2S64D16", "x own"):
        assert word in done.stdout, f"no {word!r} in the table:\n{done.stdout}"
    figures = list(leaves(json.loads(files["json"].read_text())))
    assert any(isinstance(x, str) and "B1H2S64D16" in x for x in figures), "the JSON does not name the case"
    assert any(isinstance(x, float) and x > 0 for x in figures), "the JSON holds no time"
    assert "|" in files["markdown"].read_text()
    if "plot" in files:
        assert files["plot"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("arguments, words", [
    (["--ops", "nothing"], ["nothing", "fwd", "decode"]),
    (["--dtypes", "f8"], ["f8", "bf16"]),
    (["--shapes", "X3"], ["X3", "B1H8S512D64"]),
    (["--peers", "nobody"], ["nobody", "sdpa"]),
    (["--rounds", "0"], ["0"]),
    (["--threads", "0"], ["0"]),
    (["--op", "fwd"], ["unrecognized"]),
    (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
    (["--device", "cuda", "--ops", "tiny"], ["--ops", "tiny", "mask_bwd", "host_grad"]),
    (["--device", "cuda", "--peers", "eager"], ["--peers", "eager", "cudnn", "fa3"]),
    (["--device", "cuda", "--threads", "2"], ["--threads", "cpu"]),
], ids=lambda a: " ".join(a[-2:]))
def test_bad_arguments_name_the_allowed_ones(arguments, words, capsys):
    from flashattn_ext.bench.__main__ import parse_options

    with pytest.raises(SystemExit) as stop:
        parse_options(arguments)
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(word in message for word in [arguments[0], *words]), message


@pytest.mark.parametrize("op, shape", [
    ("decode", "B3HQ4HK2SQ1SK40D16"), ("paged", "B3HQ4HK2SQ1SK40D16"), ("quant", "B3HQ4HK2SQ1SK40D16"),
    ("multi", "B3HQ4HK2SQ1SK40D16"), ("varlen", "B4HQ4HK2S40D16"), ("decode_tiny", "B1H2SQ1SK8D16"),
    ("varlen", "B1H2S9D16"),
])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_calls_of_serving_are_right_and_a_wrong_one_is_seen(op, shape, dtype):
    """Ours and the other way of ours, in every variant of a case, against float64."""
    from flashattn_ext.bench import cases, check, peers

    for case in cases.select([op], [cases.Shape.parse(shape)], [dtype]):
        inputs = cases.draw(case, torch.Generator().manual_seed(1))
        reference = check.Reference(case, inputs)
        for peer in (peers.Ours(), peers.Own()):
            if not peer.concerns(case):
                continue
            assert peer.missing() is None
            results = peer.collect(peer.open(case, 2)(inputs)(), case)
            assert reference.error(results) <= 1, f"{peer.name}: {case.name}"
            assert reference.error([results[0] + 0.2]) > 1, f"{peer.name}: {case.name}"


def test_packed_sequences_are_ragged():
    from flashattn_ext.bench import cases

    case, = cases.select(["varlen"], [cases.Shape.parse("B8H8S2048D64")], ["f32"])
    assert case.lengths[0] == 2048 and case.lengths[-1] == 128 and case.lengths == sorted(case.lengths, reverse=True)
    assert case.flops < 8 * 2 * 2 * 8 * 2048 * 2048 * 64
