"""A real language model reads a long text and answers a question about it, with three attention implementations.

SmolLM2-135M-Instruct (9 query heads over 3 key/value heads, head dimension 64) reads a prompt of about 2,300 tokens and
writes 24 greedy tokens: once with eager attention, once with torch's scaled_dot_product_attention, once with
flashattn_ext, each in a process of its own. Then it answers several prompts at once, three of very different lengths
and sixteen short ones, by transformers' continuous batching, with the latter two.

    python examples/demo.py [--tokens 2300] [--new 24] [--file TEXT] [--question TEXT] [--dtype float32] [--device cpu]
                            [--no-batches] [--json FILE]

Exit status: 0 only if flashattn_ext gave eager's tokens, in the batches SDPA's, and every attention call went through
it; 1 if not; 2 for a wrong option or a missing package. Needs no network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import smollm
from smollm import CONTEXT

HERE = Path(__file__).resolve().parent
IMPLEMENTATIONS = ("eager", "sdpa", "ours")
BATCH_IMPLEMENTATIONS = ("sdpa", "ours")
LABELS = {"eager": "eager", "sdpa": "torch SDPA", "ours": "flashattn_ext"}
QUESTION_TOPICS = "What is the with statement used for?"
QUESTION_FILE = "What is the text above about?"
SHORT = 128  # tokens of a short prompt, and
MANY = 16    # how many of them make a batch


class RunFailed(RuntimeError):
    """A run's process ended without a result; the text is the last it said."""


# ---- the prompt ------------------------------------------------------------------------------------------------------


def long_text(path: str | None) -> str:
    """The file's text, or Python's own manual, which every Python has, starting with its page on `with`."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return topics["with"] + "".join(text for name, text in sorted(topics.items()) if name != "with")


def build_prompt(tokenizer, text: str, question: str, tokens: int) -> list[int]:
    """Token ids of the chat template around the start of the text and the question, `tokens` of them at most."""

    def ids_of(part: str) -> list[int]:
        messages = [{"role": "user", "content": f"{part}\n\n{question}"}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    room = tokens - len(ids_of(""))
    if room < 1:
        raise ValueError(f"{tokens} tokens (--tokens) leave no room for the text: the question and the template take "
                         f"{tokens - room}")
    # Cut by tokens, then once more by what re-tokenizing the cut text adds.
    text_ids = tokenizer(text[: 16 * tokens])["input_ids"]
    ids = ids_of(tokenizer.decode(text_ids[:room]))
    surplus = max(0, len(ids) - tokens)
    return ids_of(tokenizer.decode(text_ids[: room - surplus])) if surplus else ids


def build_batches(tokenizer, text: str, question: str, tokens: int) -> dict[str, list[list[int]]]:
    """The batches by name: prompts of very different lengths, and many short ones, each on a part of its own of the
    text."""

    def prompts(*sizes: int) -> list[list[int]]:
        starts = [len(text) * i // len(sizes) for i in range(len(sizes))]
        return [build_prompt(tokenizer, text[start:], question, size) for start, size in zip(starts, sizes)]

    ragged = prompts(*(min(tokens, max(SHORT, tokens * percent // 100)) for percent in (13, 50, 100)))
    many = prompts(*[min(tokens, SHORT)] * MANY)
    lengths = [sorted(map(len, batch)) for batch in (ragged, many)]
    return {f"{len(ragged)} texts, tokens: {', '.join(f'{n:,}' for n in lengths[0])}": ragged,
            f"{MANY} texts, tokens: {lengths[1][-1]} each": many}


# ---- the runs --------------------------------------------------------------------------------------------------------


def run_process(command: list[str], on_event) -> dict | None:
    """Runs a Python script that prints JSON lines; hands each "step" to on_event, returns the "result"."""
    result = None
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    result = event
                else:
                    on_event(event)
        errors.seek(0)
        said = errors.read().strip()
    if process.returncode != 0 or result is None:
        raise RunFailed(said.splitlines()[-1] if said else f"the process ended with status {process.returncode}")
    return result


def run_all(args, prompt: list[int], scratch: Path, advance) -> tuple[dict, dict]:
    """Each implementation in turn -> (results by name, errors by name)."""
    (scratch / "prompt.json").write_text(json.dumps(prompt))
    results, errors = {}, {}
    for name in IMPLEMENTATIONS:
        command = [str(HERE / "generate.py"), "--attention", name, "--prompt", str(scratch / "prompt.json"),
                   "--logits", str(scratch / f"{name}.npy"), "--dtype", args.dtype, "--device", args.device,
                   "--new", str(args.new)]
        try:
            results[name] = run_process(command, lambda event, name=name: advance(name, event))
        except RunFailed as error:
            errors[name] = str(error)
        advance(name, {"kind": "end"})
    return results, errors


def run_batches(args, batches: dict, scratch: Path, advance) -> tuple[dict, dict]:
    """The batches with each implementation -> (results by name, errors by name)."""
    (scratch / "batches.json").write_text(json.dumps(batches))
    results, errors = {}, {}
    for name in BATCH_IMPLEMENTATIONS:
        command = [str(HERE / "batch.py"), "--attention", name, "--batches", str(scratch / "batches.json"), "--dtype",
                   args.dtype, "--device", args.device, "--new", str(args.new)]
        try:
            results[name] = run_process(command, lambda event, name=name: advance(f"{name} batches", event))
        except RunFailed as error:
            errors[name] = str(error)
        advance(f"{name} batches", {"kind": "end"})
    return results, errors


# ---- the verdict -----------------------------------------------------------------------------------------------------


def compare(results: dict, scratch: Path) -> None:
    """Adds to each result how its tokens and logits differ from eager's.

    Logits are compared for as long as the runs have read the same tokens: at the prefill's end and at each step up to
    and including the first where they chose differently.
    """
    import numpy as np

    eager = results["eager"]
    eager_logits = np.load(scratch / "eager.npy")
    for name, result in results.items():
        logits = np.load(scratch / f"{name}.npy")
        pairs = list(zip(result["tokens"], eager["tokens"]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        steps = min(same + 1, len(pairs))
        differences = np.abs(logits[:steps] - eager_logits[:steps]).max(axis=1)
        result["same_tokens"] = same
        result["tokens_equal"] = result["tokens"] == eager["tokens"]
        result["logit_difference_prefill"] = float(differences[0])
        result["logit_difference"] = float(differences.max())
        result["logit_difference_steps"] = [float(d) for d in differences]
    results["eager"]["logit_range"] = [float(eager_logits.min()), float(eager_logits.max())]


def judge(results: dict, errors: dict) -> list[str]:
    """Why the demo fails; empty if it holds what it promises."""
    reasons = [f"{LABELS[name]} did not run: {text}" for name, text in errors.items()]
    ours = results.get("ours")
    if ours is None or "eager" not in results:
        return reasons
    if not ours["tokens_equal"]:
        reasons.append(f"flashattn_ext's tokens leave eager's after {ours['same_tokens']} tokens")
    expected = ours["layers"] * ours["forward_passes"]
    if ours["calls"] != expected:
        reasons.append(f"flashattn_ext was called {ours['calls']} times instead of {expected} "
                       f"({ours['layers']} layers x {ours['forward_passes']} forward passes)")
    return reasons


def judge_batches(results: dict, errors: dict) -> list[str]:
    """The same for the batches, where SDPA's tokens are the measure."""
    reasons = [f"{LABELS[name]} did not run the batches: {text}" for name, text in errors.items()]
    ours, sdpa = results.get("ours"), results.get("sdpa")
    for batch, run in (ours or {"batches": {}})["batches"].items():
        if sdpa is not None and run["tokens"] != sdpa["batches"][batch]["tokens"]:
            reasons.append(f"flashattn_ext's tokens are not SDPA's: {batch}")
        expected = ours["layers"] * run["forward_passes"]
        if run["calls"] != expected:
            reasons.append(f"flashattn_ext was called {run['calls']} times instead of {expected}: {batch}")
    return reasons


# ---- what the user sees ----------------------------------------------------------------------------------------------


def table_rows(results: dict) -> list[list[str]]:
    rows = []
    for name in IMPLEMENTATIONS:
        r = results.get(name)
        if r is None:
            rows.append([LABELS[name], *["-"] * 6])
            continue
        decode = "-" if r["decode_ms"] is None else f"{r['decode_ms']:.1f}"
        extra = "not measured" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:,.0f}"
        same, logits = "", ""
        if name != "eager" and "tokens_equal" in r:
            same = "all" if r["tokens_equal"] else f"first {r['same_tokens']}"
            logits = f"{r['logit_difference']:.1e}"
        rows.append([LABELS[name], f"{r['prefill_seconds']:.2f}", f"{r['prompt_tokens'] / r['prefill_seconds']:,.0f}",
                     decode, extra, same, logits])
    return rows


def batch_rows(batches: dict, results: dict) -> list[list[str]]:
    rows = []
    for batch, prompts in batches.items():
        for name, label in zip(BATCH_IMPLEMENTATIONS, batch.split(": ")):  # in two lines, for narrow terminals
            r = results.get(name, {"batches": {}})["batches"].get(batch)
            if r is None:
                rows.append([label, LABELS[name], *["-"] * 4])
                continue
            tokens = sum(map(len, prompts)) + sum(map(len, r["tokens"]))
            extra = "not measured" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:,.0f}"
            same = ""
            if name == "ours" and "sdpa" in results:
                equal = sum(a == b for a, b in zip(r["tokens"], results["sdpa"]["batches"][batch]["tokens"]))
                same = "all" if equal == len(prompts) else f"{equal} of {len(prompts)} texts"
            rows.append([label, LABELS[name], f"{r['seconds']:.2f}", f"{tokens / r['seconds']:,.0f}", extra, same])
    return rows


def show_batches(console, args, batches: dict, results: dict) -> None:
    from rich.table import Table

    table = Table(title=f"Several prompts at once by continuous batching, {args.new} tokens written for each")
    table.add_column("prompts", no_wrap=True)
    table.add_column("attention", no_wrap=True)
    for heading in ("whole\ns", "in and out\ntokens/s", "extra\nMiB", "SDPA's\ntokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in batch_rows(batches, results):
        table.add_row(*row)
    console.print(table)
    console.print("- With SDPA each step attends over a mask of all the batch's tokens by all they read; flashattn_ext "
                  "takes the sequences as they are, and reads the cache's pages in place.", markup=False,
                  highlight=False, style="dim")


def notes(results: dict, dtype: str) -> list[str]:
    """What the figures mean and what they do not."""
    any_run = next(iter(results.values()))
    cache = any_run["kv_cache_bytes"] / 2**20
    lines = [f"Extra memory is the peak above the loaded, warmed-up model; {cache:,.0f} MiB of it are the KV cache, "
             "which all three need."]
    eager = results.get("eager")
    share = eager["prefill_system_seconds"] / max(eager["prefill_cpu_seconds"], 1e-9) if eager else 0.0
    if share > 0.1:
        lines.append(f"Eager's time is not all arithmetic: {share:.0%} of its processor time in the prefill was the "
                     "system's, for page faults of its S x S arrays.")
    sdpa = results.get("sdpa")
    if sdpa and not sdpa.get("tokens_equal", True):
        lines.append(f"In {dtype} rounding decides between words of nearly equal logits: torch's SDPA leaves eager's "
                     f"tokens as well, after {sdpa['same_tokens']}.")
    lines.append("Over torch's SDPA a whole model gains at most attention's share of the prefill: about 24% at 2,000 "
                 "tokens, 40% at 4,000, 55% at 8,000. The rest is matrix products that are the same in all three.")
    return lines


def show(console, args, results: dict) -> None:
    from rich.table import Table

    if results:
        first = next(iter(results.values()))
        table = Table(title=f"{smollm.NAME}, {args.dtype} on {args.device}: a prompt of {first['prompt_tokens']:,} "
                            f"tokens, {first['threads']} threads, torch {first['torch']}")
        table.add_column("attention", no_wrap=True)
        for heading in ("prefill\ns", "prefill\ntokens/s", "decode\nms/token", "extra\nMiB", "eager's\ntokens",
                        "logits\ndiffer by"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in table_rows(results):
            table.add_row(*row)
        console.print(table)
        console.print(f"Question: {args.question}", markup=False)
        answers = {}
        for name, result in results.items():
            answers.setdefault(result["answer"], []).append(LABELS[name])
        for text, names in answers.items():
            console.print(f"Answer ({', '.join(names)}): {text}", markup=False)
        for line in notes(results, args.dtype):
            console.print(f"- {line}", markup=False, highlight=False, style="dim")


def show_verdict(console, results: dict, batch_results: dict, reasons: list[str]) -> None:
    if reasons:
        for reason in reasons:
            console.print(f"FAILED: {reason}", markup=False, style="bold red")
        return
    ours, low_high = results["ours"], results["eager"]["logit_range"]
    batches = "; its batches gave SDPA's tokens" if batch_results else ""
    console.print(f"OK: flashattn_ext gave eager's {len(ours['tokens'])} tokens; the logits, which range from "
                  f"{low_high[0]:.1f} to {low_high[1]:.1f}, differ by at most {ours['logit_difference_prefill']:.1e} "
                  f"after the prefill and {ours['logit_difference']:.1e} over all steps; it was called {ours['calls']} "
                  f"times = {ours['layers']} layers x {ours['forward_passes']} forward passes{batches}.",
                  markup=False, style="bold green")


def run_with_progress(console, args, prompt: list[int], batches: dict, scratch: Path):
    """((results, errors) of the one prompt, the same of the batches)."""
    from generate import PREFILLS
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    steps = dict.fromkeys(IMPLEMENTATIONS, PREFILLS + args.new)
    if batches:
        steps.update({f"{name} batches": len(batches) for name in BATCH_IMPLEMENTATIONS})
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}
        for name, total in steps.items():
            words = name.split()
            label = " ".join([LABELS[words[0]], *words[1:]])
            tasks[name] = progress.add_task(f"{label:22}", total=total, doing="waiting", start=False)

        def advance(name: str, event: dict) -> None:
            progress.start_task(tasks[name])
            if event["kind"] == "end":
                progress.update(tasks[name], completed=steps[name], doing="done")
                progress.stop_task(tasks[name])
            else:
                progress.update(tasks[name], completed=event["done"], doing=event["kind"])

        one = run_all(args, prompt, scratch, advance)
        return one, run_batches(args, batches, scratch, advance) if batches else ({}, {})


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_options(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One model, three attention implementations: the same answer, timed.")
    parser.add_argument("--tokens", type=int, default=2300, help="length of the prompt (default 2300)")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate (default 24)")
    parser.add_argument("--file", help="read this text instead of Python's manual")
    parser.add_argument("--question", help="what to ask about the text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-batches", action="store_true", help="leave out the part with several prompts at once")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if args.new < 1:
        parser.error(f"--new {args.new}: at least 1")
    if not 1 <= args.tokens <= CONTEXT - args.new:
        parser.error(f"--tokens {args.tokens}: 1 to {CONTEXT - args.new} (the model reads {CONTEXT}, --new {args.new} "
                     "of them its own)")
    if args.file is not None and not Path(args.file).is_file():
        parser.error(f"--file {args.file}: no such file")
    if args.device == "cuda" and not _has_gpu():
        parser.error("--device cuda: torch finds no GPU here")
    if args.question is None:
        args.question = QUESTION_FILE if args.file else QUESTION_TOPICS
    return args


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def prepare(console) -> Path:
    """The folder of the model's float32 copy, made in a process of its own the first time."""
    smollm.gguf_folder()
    with console.status(f"{smollm.NAME}: unpacking the weights (half a minute, only the first time)"):
        made = subprocess.run([sys.executable, str(HERE / "smollm.py")], capture_output=True, text=True)
    if made.returncode != 0:
        raise smollm.ModelMissing(made.stderr.strip().splitlines()[-1])
    return smollm.cache_folder()


def main(argv=None) -> int:
    args = parse_options(argv)
    try:
        from rich.console import Console
    except ImportError:
        print("the demo needs rich for its table: pip install rich", file=sys.stderr)
        return 2
    console = Console()
    try:
        tokenizer = smollm.load_tokenizer(prepare(console))
        text = long_text(args.file)
        prompt = build_prompt(tokenizer, text, args.question, args.tokens)
        batches = {} if args.no_batches else build_batches(tokenizer, text, args.question, args.tokens)
    except (smollm.ModelMissing, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        (results, errors), (batch_results, batch_errors) = run_with_progress(console, args, prompt, batches,
                                                                             Path(folder))
        if "eager" in results:
            compare(results, Path(folder))
    for result in results.values():
        result["answer"] = tokenizer.decode(result["tokens"], skip_special_tokens=True).strip()
    reasons = judge(results, errors) + judge_batches(batch_results, batch_errors)
    show(console, args, results)
    if batch_results:
        show_batches(console, args, batches, batch_results)
    show_verdict(console, results, batch_results, reasons)
    if args.json:
        report = {"model": smollm.NAME, "dtype": args.dtype, "device": args.device, "question": args.question,
                  "ok": not reasons, "failures": reasons, "runs": results, "batches": batch_results}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
