"""Results as a table in the terminal, as Markdown, JSON and a plot."""

import dataclasses
import datetime
import itertools
import os
import platform
import sys

import torch

from .ceilings import Ceilings
from .peers import OWN, Peer
from .run import Result, cache_bytes, quartiles

FLAGS = ("fma", "f16c", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16",
         "asimd", "bf16")
FIRST_COLUMNS, LAST_COLUMNS = ("case", "ms", "+-", "rate", "of ceiling"), ("x best", "best other")
FEW_RATIOS = 2  # columns of ratios; with more of them a table is cut where other peers were timed
LARGE_RATE = 1e4  # from which GFLOP/s and GB/s are shown as TFLOP/s and TB/s
MARKERS = "os^DvP*X"


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(peers: list[Peer], device: str = "cpu") -> dict:
    """What the figures depend on: processor, instruction sets, threads, versions; the GPU of device "cuda"."""
    model, flags = platform.processor() or platform.machine(), []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, text = line.partition(":")
                if key.strip() == "model name":
                    model = text.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = text.split()
                    break
    except OSError:
        pass
    return {
        "device": _gpu() if device == "cuda" else None,
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_cache_bytes": cache_bytes(),
        "isa_limit": os.environ.get("FLASHATTN_EXT_ISA"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {peer.name: peer.version() for peer in peers},
        "build": _build_info(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> dict:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory": found.total_memory,
            "multiprocessors": found.multi_processor_count, "last_cache_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _build_info():
    try:
        import flashattn_ext

        return flashattn_ext.build_info()
    except (ImportError, AttributeError, OSError):
        return None


def describe(found: dict, machine_ceilings: Ceilings) -> list[str]:
    """The lines above the table."""
    others = {name: version for name, version in found["versions"].items() if version != found["torch"]}
    versions = ", ".join(f"{name} {version}" for name, version in {"torch": found["torch"], **others}.items())
    gpu = found["device"]
    if gpu:
        size = f"{gpu['multiprocessors']} multiprocessors, {gpu['memory'] / 2**30:.0f} GiB"
        return [f"{gpu['name']}, {size}; {found['cpu']}", f"{versions}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}",
                machine_ceilings.describe()]
    limit = f"; FLASHATTN_EXT_ISA={found['isa_limit']}" if found["isa_limit"] else ""
    processors = f"{found['threads']} of {found['processors']} processors"
    return [f"{found['cpu']}, {processors}; {' '.join(found['flags'])}{limit}", versions, machine_ceilings.describe()]


# ---- rows ------------------------------------------------------------------------------------------------------------


def rate(result: Result, ceilings: Ceilings) -> tuple[float, str, float | None]:
    """(figure, unit, share of the machine's ceiling or None)."""
    case, seconds = result.case, result.peers[result.subject].median
    ceiling = ceilings.of(case)
    if case.bound == "memory":
        figure, unit = case.bytes / seconds / 1e9, "GB/s"
    elif case.bound == "fma":
        figure, unit = case.flops / seconds / 1e9, "GFLOP/s"
    else:
        return 1 / seconds / 1e3, "calls/ms", None
    return figure, unit, figure / ceiling if ceiling else None


def _rate_text(figure: float, unit: str) -> str:
    if figure >= LARGE_RATE:
        figure, unit = figure / 1e3, unit.replace("G", "T", 1)
    return f"{figure:.0f} {unit}" if figure >= 100 else f"{figure:.3g} {unit}"


def columns(results: list[Result], peers: dict[str, Peer]) -> dict[str, str]:
    """Peers whose ratio has a column of its own, and its head: those that were timed and have one."""
    return {name: peer.column for name, peer in peers.items()
            if peer.column and any(result.subject != name and result.ratio(name) for result in results)}


def _times(ratios: list[float] | None) -> str:
    if not ratios:
        return "-"
    middle = quartiles(ratios)[1]
    return f"{middle:.2f}" if middle < 10 else f"{middle:.1f}"


def row(result: Result, ceilings: Ceilings, peers: dict[str, Peer], ratios) -> list[str]:
    """One line of the table; ratios: the peers of the columns between the first and the last."""
    own = result.peers[result.subject]
    if not own.times:
        rest = len(FIRST_COLUMNS) + len(ratios) + len(LAST_COLUMNS) - 2
        return [result.case.name, own.skipped or "-", *["-"] * rest]
    low, middle, high = quartiles(own.times)
    figure, unit, share = rate(result, ceilings)
    best = result.best_peer()
    name = result.case.name + (" WRONG" if result.wrong else "")
    return [name, f"{middle * 1e3:.3g}", f"{(high - low) / middle:.0%}", _rate_text(figure, unit),
            "-" if share is None else f"{share:.0%}", *(_times(result.ratio(of)) for of in ratios),
            _times(result.ratio(best)) if best else "-", peers[best].label if best else "-"]


def _legend(results: list[Result], peers: dict[str, Peer], device: str) -> list[str]:
    subject = peers[results[0].subject].label
    columns_are = {
        "cpu": "x SDPA, x best: its speed over that of torch's SDPA and of the fastest other, medians of the rounds' "
               "ratios; of ceiling: of memory read for GB/s; of multiply-adds for GFLOP/s, those of bfloat16 for bf16 "
               "where the processor has them, of float32 otherwise.",
        "cuda": "x NAME, x best: its speed over that of a peer and of the fastest, medians of the rounds' ratios; of "
                "ceiling: of memory read for GB/s, of a large matrix product for TFLOP/s (float32: none). A case of "
                "the host takes the time until a call returns, decode is one in a CUDA graph, backward is without the "
                "forward before it.",
    }
    lines = [f"ms: median time of a call of {subject}; +-: the middle half of the rounds, as a share of it; "
             + columns_are[device]]
    if any(result.ratio(OWN) for result in results):
        packed = "; of packed sequences over a call for each. x SDPA of packed sequences: over a padded batch."
        lines.append("x own: its speed over that of another way with this package: of a paged cache over one in one "
                     "piece; of a quantised cache over one in the query's dtype; of several new tokens over one"
                     + (packed if device == "cpu" else "."))
    if device == "cuda":
        lines.append("inputs: drawn as (B, H, S, D), which torch's backends get as they are; what wants tokens before "
                     "heads, or packed tokens, has them laid out like that, untimed. In place of pages or quantised "
                     "keys and values the backends get a cache in one piece in the query's dtype.")
    if any(result.case.dropout for result in results):
        lines.append("dropout: which weights are dropped is each peer's own affair, so of the output mean and variance "
                     "are checked, of gradients nothing.")
    return lines


def notes(results: list[Result], peers: dict[str, Peer], device: str = "cpu") -> list[str]:
    """What the columns mean, whose times are doubtful, and why which peer is left out of how many cases."""
    lines = _legend(results, peers, device)
    reasons: dict[str, dict[str, int]] = {}
    for result in results:
        for name, sampled in result.peers.items():
            if sampled.skipped:
                counts = reasons.setdefault(name, {})
                counts[sampled.skipped] = counts.get(sampled.skipped, 0) + 1
    waited = [result.case.name for result in results if result.waited]
    if waited:
        lines.append("The device may have waited for the host, so that times are too long, in: " + ", ".join(waited))
    for name, counts in reasons.items():
        lines.append(f"{peers[name].label} left out: " + "; ".join(f"{reason} ({n})" for reason, n in counts.items()))
    return lines


def _tables(results: list[Result], ceilings: Ceilings, peers: dict[str, Peer]) -> list[tuple]:
    """(results, head, rows) of each table."""
    parts = [results]
    if len(columns(results, peers)) > FEW_RATIOS:
        ops = [list(group) for _, group in itertools.groupby(results, lambda result: result.case.op)]
        alike = itertools.groupby(ops, lambda group: columns(group, peers))
        parts = [list(itertools.chain(*groups)) for _, groups in alike]
    tables = []
    for part in parts:
        ratios = columns(part, peers)
        head = [*FIRST_COLUMNS, *ratios.values(), *LAST_COLUMNS]
        tables.append((part, head, [row(result, ceilings, peers, ratios) for result in part]))
    return tables


def markdown(results: list[Result], ceilings: Ceilings, peers: dict[str, Peer]) -> str:
    texts = []
    for _, head, rows in _tables(results, ceilings, peers):
        lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 2) + "|---|"]
        texts.append("\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows]) + "\n")
    return "\n".join(texts)


def plain(results: list[Result], ceilings: Ceilings, peers: dict[str, Peer]) -> str:
    """The tables in plain text."""
    texts = []
    for _, head, rows in _tables(results, ceilings, peers):
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        texts.append("\n".join("  ".join(cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
                                         for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                               for line in [head, *rows]))
    return "\n\n".join(texts)


def rich_tables(results: list[Result], ceilings: Ceilings, peers: dict[str, Peer]) -> list:
    return [_rich_table(*parts) for parts in _tables(results, ceilings, peers)]


def _rich_table(results: list[Result], head: list[str], rows: list[list[str]]):
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i in (0, len(head) - 1) else "right", no_wrap=True)
    before = None
    for result, cells in zip(results, rows):
        for column in range(len(FIRST_COLUMNS), len(head) - 1):
            if cells[column] != "-":
                cells[column] = f"[{'green' if float(cells[column]) >= 1 else 'red'}]{cells[column]}[/]"
        if before not in (None, result.case.op):
            table.add_row()
        table.add_row(*cells, style="bold red" if result.wrong else None)
        before = result.case.op
    return table


# ---- files -----------------------------------------------------------------------------------------------------------


def as_json(results: list[Result], ceilings: Ceilings, found: dict) -> dict:
    """Everything that was measured; times in seconds, rates in GFLOP/s or GB/s."""
    rows = []
    for result in results:
        case = result.case
        own = result.peers[result.subject]
        figure, unit, share = rate(result, ceilings) if own.times else (None, None, None)
        best = result.best_peer()
        rows.append({
            "name": case.name, "op": case.op, "shape": dataclasses.asdict(case.shape), "dtype": case.dtype,
            "causal": case.causal, "mask": case.mask, "mask_gradient": case.mask_gradient, "option": case.option,
            "dropout": case.dropout, "page": case.page, "stored": case.stored, "lengths": case.lengths,
            "flops": case.flops, "bytes": case.bytes,
            "rate": figure, "unit": unit, "share_of_ceiling": share, "wrong": result.wrong, "waited": result.waited,
            "best_peer": best,
            "ratio_to_sdpa": _spread(result.ratio("sdpa")),
            "ratio_to_own": _spread(result.ratio(OWN)),
            "ratio_to_best": _spread(result.ratio(best)) if best else None,
            "ratios": {name: _spread(result.ratio(name)) for name in result.peers if name != result.subject},
            "peers": {name: {"seconds": _spread(p.times), "rounds": p.times, "error_of_bar": p.error,
                             "skipped": p.skipped} for name, p in result.peers.items()},
        })
    return {"command": " ".join(["python -m flashattn_ext.bench", *sys.argv[1:]]), "machine": found,
            "ceilings": dataclasses.asdict(ceilings), "subject": results[0].subject, "cases": rows}


def _spread(values: list[float] | None) -> dict | None:
    if not values:
        return None
    low, middle, high = quartiles(values)
    return {"median": middle, "q1": low, "q3": high}


def plot(results: list[Result], peers: dict[str, Peer], path: str, title: str) -> None:
    """Speed of every peer relative to torch's SDPA (to the subject, where SDPA was timed in few cases), a row for each
    case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_sdpa = sum(1 for r in results if r.peers.get("sdpa") and r.peers["sdpa"].times)
    base = "sdpa" if 2 * with_sdpa > len(results) else results[0].subject
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.2 * len(results)), layout="constrained")
    names = list(dict.fromkeys(name for r in results for name in r.peers))
    for index, name in enumerate(names):
        points = [(y, quartiles([b / a for a, b in zip(r.peers[name].times, r.peers[base].times)]))
                  for y, r in enumerate(results)
                  if all(r.peers.get(who) and r.peers[who].times for who in (name, base))]
        if not points:
            continue
        ys, spreads = [y for y, _ in points], [s for _, s in points]
        middles = [s[1] for s in spreads]
        bars = [[s[1] - s[0] for s in spreads], [s[2] - s[1] for s in spreads]]
        first = name == results[0].subject
        axes.errorbar(middles, ys, xerr=bars, fmt=MARKERS[index % len(MARKERS)], color=f"C{index}", elinewidth=1,
                      markersize=6 if first else 4, zorder=3 if first else 2, label=peers[name].label)
    for y in range(1, len(results)):
        if results[y].case.op != results[y - 1].case.op:
            axes.axhline(y - 0.5, color="0.8", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_yticks(range(len(results)), [r.case.name for r in results], fontsize=7)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel(f"speed relative to {peers[base].label} (bars: the middle half of the rounds)")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
