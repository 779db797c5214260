"""One run of the demo: read a prompt and answer it with one attention implementation. `demo.py` starts three of these.

Prints one JSON object a line: {"event": "step", ...} as it goes, and {"event": "result", ...} at the end. The logits of
each step go to a file of NumPy arrays: (steps, vocabulary) float32.

    python examples/generate.py --attention ours --prompt ids.json --logits logits.npy
"""

import argparse
import json
import os
import statistics
import time

import smollm
from memory import PeakMemory

# What the demo calls an implementation -> the name transformers knows.
IMPLEMENTATIONS = {"eager": "eager", "sdpa": "sdpa", "ours": "fused_ext"}
PREFILLS = 3  # the median of so many is reported; the answer continues the last one
PREFILL_BUDGET = 10.0  # seconds; no further prefill is begun after so long
WARM_UP = 64  # tokens of a first, untimed prefill: it touches every weight and starts the threads


class Runner:
    """A model with its own greedy loop, so that each forward pass is counted and timed."""

    def __init__(self, model, device: str) -> None:
        self.model = model
        self.device = device
        self.passes = 0

    def forward(self, ids, cache):
        """ids (1, S) int64 -> logits of the last position (vocabulary,) float32, and seconds taken."""
        start = time.perf_counter()
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1].float().cpu()  # the copy waits for the device
        self.passes += 1
        return logits, time.perf_counter() - start

    def prefill(self, ids):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        logits, seconds = self.forward(ids, cache)
        return cache, logits, seconds


def report(event: str, **fields) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def load(args):
    """The model and a function that says how often our attention was called (None for the other two)."""
    counter = None
    if args.attention == "ours":
        from flashattn_ext.integrations import transformers as integration

        integration.register()
        counter = integration.calls
    model = smollm.load_model(smollm.ensure_cached(), IMPLEMENTATIONS[args.attention], args.dtype, args.device)
    return model, counter


def answer(runner: Runner, ids, new: int, stop_ids: set[int]) -> dict:
    """Prefill and greedy decoding -> the timings, tokens and logits as a dict."""
    import torch

    prefill_seconds, cpu_seconds, system_seconds = [], [], []
    while len(prefill_seconds) < PREFILLS and sum(prefill_seconds) < PREFILL_BUDGET:
        cache = None  # frees the previous one before the next is built
        before = os.times()
        cache, logits, seconds = runner.prefill(ids)
        after = os.times()
        prefill_seconds.append(seconds)
        system_seconds.append(after.system - before.system)
        cpu_seconds.append(after.user - before.user + system_seconds[-1])
        report("step", done=len(prefill_seconds), kind="prefill")
    tokens, step_logits, step_seconds = [], [logits], []
    while True:
        tokens.append(int(step_logits[-1].argmax()))
        if len(tokens) == new or tokens[-1] in stop_ids:
            break
        logits, seconds = runner.forward(torch.tensor([[tokens[-1]]], device=runner.device), cache)
        step_logits.append(logits)
        step_seconds.append(seconds)
        report("step", done=PREFILLS + len(tokens), kind="decode")
    return {
        "prefill_seconds": statistics.median(prefill_seconds),
        "prefill_seconds_all": prefill_seconds,
        "prefill_cpu_seconds": statistics.median(cpu_seconds),
        "prefill_system_seconds": statistics.median(system_seconds),
        "decode_ms": 1e3 * statistics.median(step_seconds) if step_seconds else None,
        "tokens": tokens,
        "logits": torch.stack(step_logits).numpy(),
    }


def run(args) -> dict:
    import numpy as np
    import torch

    with open(args.prompt, encoding="utf-8") as file:
        ids = torch.tensor([json.load(file)], device=args.device)
    report("step", done=0, kind="load")
    model, counter = load(args)
    runner = Runner(model, args.device)
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop) if isinstance(stop, list) else {stop}
    peak = PeakMemory()
    with torch.inference_mode():
        cache, _, _ = runner.prefill(ids[:, :WARM_UP])
        runner.forward(ids[:, :1], cache)
        del cache
        runner.passes = 0
        calls_before = counter() if counter else 0
        if args.device == "cpu":
            peak.start()
        else:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        found = answer(runner, ids, args.new, stop_ids)
    if args.device == "cpu":
        extra, method = peak.extra(), peak.method
    else:
        extra, method = torch.cuda.max_memory_allocated() - base, "torch.cuda.max_memory_allocated"
    np.save(args.logits, found.pop("logits"))
    config = model.config
    cached = ids.shape[1] + len(found["tokens"]) - 1
    return {
        **found,
        "attention": args.attention,
        "implementation": config._attn_implementation,
        "prompt_tokens": ids.shape[1],
        "layers": config.num_hidden_layers,
        "forward_passes": runner.passes,
        "calls": counter() - calls_before if counter else None,
        "extra_bytes": extra,
        "extra_method": method,
        "kv_cache_bytes": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        * cached * model.dtype.itemsize,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a prompt and answer it with one attention implementation.")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--prompt", required=True, help="JSON file: the list of the prompt's token ids")
    parser.add_argument("--logits", required=True, help="file to write: the logits of each step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--new", type=int, default=24)
    report("result", **run(parser.parse_args()))


if __name__ == "__main__":
    main()
