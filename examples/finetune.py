"""Fine-tunes SmolLM2-135M-Instruct for a few steps, with eager attention and with flashattn_ext: the same loss curve.

Each run starts from the same weights and reads the same tokens: 12 steps of AdamW on 256 tokens each, four pieces of
Python's manual read three times.
Rounding differs between the two, so the losses do in their last digits; the gradients before the first update, where
both still hold the same weights, are compared as well.

    python examples/finetune.py [--steps 12] [--tokens 256] [--plot finetune.png] [--json FILE]

Exit status: 0 only if the losses and the first gradients are equal within rounding and every attention call of ours
went through flashattn_ext; 1 if not; 2 for a wrong option or a missing package. Needs no network.
"""

import argparse
import json
import sys
import time

import smollm
from smollm import CONTEXT

RUNS = {"eager": "eager", "flashattn_ext": "fused_ext"}
LEARNING_RATE = 1e-4
PIECES = 4  # read again and again, so that the curve falls
# Eager and torch's SDPA, both exact but for rounding, differ by 1e-6 in the losses and 3e-6 in the gradients of such a
# run. The bounds are some ten times that.
LOSS_BOUND = 2e-5      # largest difference of a step's loss, in nats
GRADIENT_BOUND = 3e-5  # norm of the difference of all first gradients over their norm


def training_tokens(tokenizer, steps: int, tokens: int):
    """(steps, tokens) int64: the first pieces of Python's manual, in turn."""
    import torch
    from pydoc_data.topics import topics

    text = "".join(text for _, text in sorted(topics.items()))
    ids = tokenizer(text[: 16 * PIECES * tokens])["input_ids"]
    pieces = torch.tensor(ids[: PIECES * tokens]).view(PIECES, tokens)
    return pieces[torch.arange(steps) % PIECES]


def train(folder, implementation: str, batches, on_step) -> dict:
    """One run -> {"losses": [...], "gradients": every first gradient as one vector, "layers", "seconds"}."""
    import torch

    torch.manual_seed(0)
    model = smollm.load_model(folder, implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, gradients = [], None
    start = time.perf_counter()
    for batch in batches:
        ids = batch[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if gradients is None:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        on_step()
    return {"losses": losses, "gradients": gradients, "layers": model.config.num_hidden_layers,
            "seconds": time.perf_counter() - start}


def plot(losses: dict, path: str) -> None:
    """Both curves over one another, and below them their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1),
                                            layout="constrained")
    steps = range(1, len(losses["eager"]) + 1)
    top.plot(steps, losses["eager"], color="0.6", linewidth=6, label="eager")
    top.plot(steps, losses["flashattn_ext"], color="C3", linewidth=1.5, marker="o", markersize=4, label="flashattn_ext")
    top.set_ylabel("loss (nats a token)")
    top.set_title(f"{smollm.NAME}: fine-tuning, float32")
    top.legend()
    difference = [ours - eager for ours, eager in zip(losses["flashattn_ext"], losses["eager"])]
    bottom.axhline(0, color="0.6", linewidth=1)
    bottom.plot(steps, difference, color="C3", marker="o", markersize=4)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_ylabel("ours - eager")
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def train_all(args, console) -> tuple[dict, int]:
    """Both runs, with a progress bar -> (results by name, calls counted by the integration)."""
    from flashattn_ext.integrations import transformers as integration
    from rich.progress import Progress

    integration.register()
    folder = smollm.ensure_cached()
    batches = training_tokens(smollm.load_tokenizer(folder), args.steps, args.tokens)
    results = {}
    with Progress(console=console, transient=True) as progress:
        for name, implementation in RUNS.items():
            task = progress.add_task(f"{name:14}", total=args.steps)
            before = integration.calls()
            results[name] = train(folder, implementation, batches, lambda task=task: progress.advance(task))
    return results, integration.calls() - before


def judge(results: dict, calls: int, steps: int) -> tuple[float, float, list[str]]:
    """(largest loss difference, relative gradient difference, reasons to fail)."""
    eager, ours = results["eager"], results["flashattn_ext"]
    loss = max(abs(a - b) for a, b in zip(eager["losses"], ours["losses"]))
    gradient = float((ours["gradients"] - eager["gradients"]).norm() / eager["gradients"].norm())
    reasons = []
    if not loss <= LOSS_BOUND:
        reasons.append(f"the losses differ by {loss:.1e}, more than {LOSS_BOUND:.0e}")
    if not gradient <= GRADIENT_BOUND:
        reasons.append(f"the first gradients differ by {gradient:.1e} of their norm, more than {GRADIENT_BOUND:.0e}")
    if calls != ours["layers"] * steps:
        reasons.append(f"flashattn_ext was called {calls} times instead of {ours['layers'] * steps} "
                       f"({ours['layers']} layers x {steps} steps)")
    return loss, gradient, reasons


def parse_options(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A fine-tuning run with eager attention and with flashattn_ext.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a step (default 256)")
    parser.add_argument("--plot", metavar="PNG", default="finetune.png", help="default finetune.png")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 2 <= args.tokens <= CONTEXT:
        parser.error(f"--steps {args.steps} --tokens {args.tokens}: at least 1 step, of 2 to {CONTEXT} tokens")
    return args


def main(argv=None) -> int:
    args = parse_options(argv)
    try:
        import matplotlib  # noqa: F401  (missing it is told before the minute of work, not after)
        from rich.console import Console
        from rich.table import Table

        console = Console()
        results, calls = train_all(args, console)
    except (ImportError, smollm.ModelMissing, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    loss, gradient, reasons = judge(results, calls, args.steps)
    losses = {name: result["losses"] for name, result in results.items()}
    table = Table(title=f"losses, {args.steps} steps of {args.tokens} tokens")
    for heading in ("step", *RUNS, "difference"):
        table.add_column(heading, justify="right")
    for step, (a, b) in enumerate(zip(losses["eager"], losses["flashattn_ext"]), start=1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}")
    console.print(table)
    plot(losses, args.plot)
    seconds = ", ".join(f"{name} {result['seconds']:.1f} s" for name, result in results.items())
    console.print(f"Took {seconds}; curves in {args.plot}", markup=False)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"losses": losses, "loss_difference": loss, "gradient_difference": gradient, "calls": calls,
                       "ok": not reasons, "failures": reasons}, file, indent=2)
    for reason in reasons:
        console.print(f"FAILED: {reason}", markup=False, style="bold red")
    if not reasons:
        console.print(f"OK: the losses differ by at most {loss:.1e}, the first gradients by {gradient:.1e} of their "
                      f"norm; flashattn_ext was called {calls} times.", markup=False, style="bold green")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
