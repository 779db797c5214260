"""One run of the demo's batches: answer several prompts at once, by transformers' continuous batching, with one
attention implementation. `demo.py` starts two of these.

Prints one JSON object a line: {"event": "step", ...} as it goes, and {"event": "result", ...} at the end.

    python examples/batch.py --attention ours --batches batches.json
"""

import argparse
import json
import time

import smollm
from generate import report
from memory import PeakMemory

IMPLEMENTATIONS = ("sdpa", "ours")
PAGE = 128      # tokens of a page of the cache
WARM_UP = 64    # tokens of a first, untimed prompt: it touches every weight and starts the threads


def settings(prompts: list[list[int]], new: int) -> dict:
    """How the batch is run, the same for each implementation: all prompts are read in one pass, and the cache holds
    what they need."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    blocks = sum(-(-(len(prompt) + new) // PAGE) for prompt in prompts)
    return {
        "generation_config": GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=blocks, max_batch_tokens=sum(map(len, prompts)), auto_switch_to_flash=False,
            max_memory_percent=1.0),
    }


class Passes:
    """Counts a model's forward passes."""

    def __init__(self, model) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._add)

    def _add(self, model, args) -> None:
        self.count += 1


def answer(model, prompts: list[list[int]], new: int, device: str) -> dict:
    """The tokens written for each prompt, the seconds that took, and the memory."""
    import torch

    peak = PeakMemory()
    if device == "cpu":
        peak.start()
    else:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    start = time.perf_counter()
    outputs = list(model.generate_batch(prompts, **settings(prompts, new)).values())
    seconds = time.perf_counter() - start
    extra = peak.extra() if device == "cpu" else torch.cuda.max_memory_allocated() - base
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
    return {"tokens": [list(output.generated_tokens) for output in outputs], "seconds": seconds, "extra_bytes": extra}


def run(args) -> dict:
    import torch

    with open(args.batches, encoding="utf-8") as file:
        batches = json.load(file)
    report("step", done=0, kind="load")
    model = smollm.load_model(smollm.ensure_cached(), "sdpa", args.dtype, args.device)
    counter = None
    if args.attention == "ours":
        from flashattn_ext.integrations import transformers as integration

        integration.enable_continuous_batching(model)
        counter = integration.calls
    passes = Passes(model)
    found = {}
    with torch.inference_mode():
        answer(model, [prompts[0][:WARM_UP] for prompts in batches.values()], 2, args.device)
        for done, (name, prompts) in enumerate(batches.items()):
            report("step", done=done, kind=name)
            passes.count, calls = 0, counter() if counter else 0
            found[name] = answer(model, prompts, args.new, args.device)
            found[name]["forward_passes"] = passes.count
            found[name]["calls"] = counter() - calls if counter else None
    return {"attention": args.attention, "layers": model.config.num_hidden_layers, "batches": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer several prompts at once with one attention implementation.")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--batches", required=True, help="JSON file: for each name, the prompts as token ids")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--new", type=int, default=24)
    report("result", **run(parser.parse_args()))


if __name__ == "__main__":
    main()
