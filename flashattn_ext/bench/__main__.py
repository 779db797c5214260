"""The command line of the benchmark; see `python -m flashattn_ext.bench --help`."""

import argparse
import importlib.util
import json
import sys
import textwrap
from pathlib import Path

import torch

from . import cases, cases_cuda, peers, peers_cuda, report, run, run_cuda

# Of each device what is measured, who is, and how: modules with the same names in them.
PARTS = {"cpu": (cases, peers, run), "cuda": (cases_cuda, peers_cuda, run_cuda)}
DEFAULT_SECONDS = 90.0
QUICK_SECONDS = {"cpu": 10.0, "cuda": 20.0}
WIDTH = 120  # of text where there is no terminal; tables may be wider


def _device(argv) -> str:
    """That of --device, on which the other options depend; a wrong one is left for the parser to refuse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    found = parser.parse_known_args(argv)[0].device
    return found if found in PARTS else "cpu"


def parse_options(argv) -> argparse.Namespace:
    device = _device(argv)
    what, who, _ = PARTS[device]
    known = [peer.name for peer in who.all_peers()]
    on_request = {"cpu": "but flex", "cuda": "flex for the options only"}[device]
    parser = argparse.ArgumentParser(
        prog="python -m flashattn_ext.bench", allow_abbrev=False,
        description="Compares attention implementations on this machine: interleaved rounds in one process, medians "
                    "with their spread, each result checked against float64 before it is timed.")
    parser.add_argument("--device", choices=tuple(PARTS), default="cpu",
                        help=f"what to measure (default cpu); this help is that of {device}: the other has other ops "
                             "and peers")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(what.OPS)} (default all)")
    parser.add_argument("--shapes", help="comma-separated, instead of the built-in ones, e.g. B1H8S512D64 or "
                                         "HQ32HK8SQ1SK4096D128")
    parser.add_argument("--dtypes", help=f"comma-separated, of {', '.join(cases.DTYPES)} (default: those of each op)")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(known)}, or all; the first is the one the "
                                        f"others are compared with (default: all that are installed, {on_request})")
    parser.add_argument("--threads", type=int, help="threads of each peer (default: torch's); of a CPU only")
    parser.add_argument("--rounds", type=int, default=9, help="most rounds of a case (default 9); at least 3 are taken")
    parser.add_argument("--seconds", type=float, help=f"aim for so long in total (default {DEFAULT_SECONDS:.0f}, "
                                                      f"with --quick {QUICK_SECONDS[device]:.0f})")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--all", action="store_true", help="some more, larger cases")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios there (needs matplotlib)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there as Markdown")
    args = parser.parse_args(argv)
    try:
        args.ops = _choices("--ops", args.ops, what.OPS)
        args.dtypes = _choices("--dtypes", args.dtypes, tuple(cases.DTYPES), cases.DTYPE_ALIASES)
        args.peers = known if args.peers == "all" else _choices("--peers", args.peers, known)
        args.shapes = [cases.Shape.parse(text) for text in args.shapes.split(",")] if args.shapes else None
    except ValueError as error:
        parser.error(str(error))
    if args.rounds < run.MIN_ROUNDS:
        parser.error(f"--rounds {args.rounds}: at least {run.MIN_ROUNDS}")
    if args.threads is not None and args.device != "cpu":
        parser.error("--threads is for --device cpu")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads {args.threads}: at least 1")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def _choices(option: str, text: str | None, allowed, aliases=None) -> list[str] | None:
    if text is None:
        return None
    names = [(aliases or {}).get(name, name) for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} {name}: one of {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def choose_peers(names: list[str] | None, device: str = "cpu") -> tuple[list[peers.Peer], list[str]]:
    """(peers to time, in order; sentences about those that are not). LookupError if the compared one is missing."""
    by_name = {peer.name: peer for peer in PARTS[device][1].all_peers()}
    wanted = [by_name[name] for name in names] if names else list(by_name.values())
    chosen, left_out = [], []
    for index, peer in enumerate(wanted):
        if names is None and not peer.default:
            left_out.append(f"{peer.label} is timed only on request: --peers all")
            continue
        peer.asked = names is not None
        reason = peer.missing()
        if reason is None:
            chosen.append(peer)
        elif index == 0:
            raise LookupError(reason)
        else:
            left_out.append(f"{peer.label} is not timed: {reason}")
    return chosen, left_out


def choose_cases(args, subject: peers.Peer) -> list[cases.Case]:
    """LookupError if the compared peer has nothing to do with any of them."""
    found = PARTS[args.device][0].select(args.ops, args.shapes, args.dtypes, args.quick, args.all)
    found = [case for case in found if subject.concerns(case)]
    if not found:
        raise LookupError(f"{subject.label} is compared in none of these cases")
    return found


def measure(args, problems: list[cases.Case], chosen: list[peers.Peer]):
    """(results, ceilings), with a progress bar where rich is installed and a line a case where it is not."""
    how = PARTS[args.device][2]
    seconds = args.seconds or (QUICK_SECONDS[args.device] if args.quick else DEFAULT_SECONDS)
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        def tell(case):
            if case:
                print(case.name, file=sys.stderr)

        return how.measure_all(problems, chosen, args.rounds, seconds, tell)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        begun = iter(range(len(problems) + 1))

        def on_case(case):
            progress.update(task, completed=next(begun), description=case.name if case else "done")

        return how.measure_all(problems, chosen, args.rounds, seconds, on_case)


def show(results, ceilings, found, timed, left_out, device) -> None:
    lines = report.describe(found, ceilings)
    trailer = [*report.notes(results, timed, device), *left_out]
    try:
        from rich.console import Console

        console = Console()
    except ImportError:
        console = None
    if console is None or not console.is_terminal:
        lines, trailer = ([textwrap.fill(line, WIDTH) for line in part] for part in (lines, trailer))
        print("\n".join([*lines, "", report.plain(results, ceilings, timed), "", *trailer]))
        return
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for table in report.rich_tables(results, ceilings, timed):
        console.print()
        console.print(table)
    console.print()
    for line in trailer:
        console.print(line, markup=False, highlight=False, style="dim")


def failures(results, subject: peers.Peer) -> list[str]:
    """A line for each case in which the compared peer gave a wrong result, or none though it does not refuse."""
    lines = [f"WRONG RESULT: {result.case.name}" for result in results if result.wrong]
    for result in results:
        own = result.peers[subject.name]
        if not own.times and not subject.refuses(result.case):
            lines.append(f"NO RESULT: {result.case.name}: {own.skipped}")
    return lines


def main(argv=None) -> int:
    """Exit status: 0; 1 if the compared implementation gave a wrong result, or none in a case that it does not refuse;
    2 for a wrong option or a missing build."""
    args = parse_options(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    no_device = peers_cuda.no_device() if args.device == "cuda" else None
    if no_device:
        print(no_device, file=sys.stderr)
        return 2
    try:
        chosen, left_out = choose_peers(args.peers, args.device)
        problems = choose_cases(args, chosen[0])
    except LookupError as error:
        without = {"cpu": "sdpa,eager", "cuda": "cudnn,fa2"}[args.device]
        print(f"{error}\n(--peers {without} compares those two without it)", file=sys.stderr)
        return 2
    results, ceilings = measure(args, problems, chosen)
    timed = {peer.name: peer for peer in chosen}
    found = report.machine(chosen, args.device)
    show(results, ceilings, found, timed, left_out, args.device)
    if args.json:
        Path(args.json).write_text(json.dumps(report.as_json(results, ceilings, found), indent=1) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(results, ceilings, timed))
    if args.plot:
        where = found["device"]["name"] if found["device"] else f"{found['cpu']}, {found['threads']} threads"
        report.plot(results, timed, args.plot, f"{where}, torch {found['torch']}")
    failed = failures(results, chosen[0])
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
