"""The README's tables and plots, from what the benchmarks wrote.

    python -m benchmarks.claim.tables                      # prints Markdown, plots to results/
    python -m benchmarks.claim.tables --readme README.md   # and into its marked places
    python -m benchmarks.claim.tables --suffix=-tiny --results FOLDER      # a rehearsal

A marked place is what stands between `<!-- claim: begin -->` and `<!-- claim: end -->`; the others
are `capacity`, `peers` and `targets`. A table whose results are missing is left out.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.claim.models import CASES, NAMES
from benchmarks.record import RESULTS

Row = dict[str, Any]
GIB = 2**30
NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_NOT_STREAMED = ("resident", "dfloat11")  # all of the weights stay on the device


def read(name: str, args: argparse.Namespace) -> Row | None:
    path = args.results / f"{name}{args.suffix}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(num_bytes: float | None) -> str:
    if not num_bytes:
        return NONE
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def ms(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms"


def yes(value: object) -> str:
    return "yes" if value else "**no**"


def source(found: Row, name: str, args: argparse.Namespace) -> str:
    """Where the figures of a table are from."""
    e = found["environment"]
    versions = ", ".join(f"{n} {e[n]}" for n in ("python", "torch", "transformers") if e.get(n))
    return (
        f"{e['device']}, {e['cores']} cores; {versions}; {e['date']}; `{e['command']}`; "
        f"[{name}{args.suffix}.json](benchmarks/results/{name}{args.suffix}.json)."
    )


# ---- the claim ----------------------------------------------------------------------------------


def claim(args: argparse.Namespace) -> str:
    """Peak device memory and speed of each model, plain and streamed."""
    parts = []
    for model, name in [(m + more, n) for m, n in NAMES.items() for more in ("", "-capped")]:
        found = read(f"claim-{model}", args)
        if found is None:
            continue
        settled = _equal_to_a_deterministic_model(f"claim-{model}-deterministic", args)
        rows = [
            _claim_row(row, settled)
            for workload in CASES[model.removesuffix("-capped")]
            for row in found["figures"]
            if row.get("workload") == workload
        ]
        head = ("workload", "weights=", "peak device memory", "less", "time", "of plain",
                "a second", "equal")  # fmt: skip
        weights = gib(next(row["weights"] for row in found["figures"]))
        title = f"**{name}** ({weights} of weights){_capped(found['figures'])}"
        parts.append(
            "\n\n".join((title, markdown(head, rows), source(found, f"claim-{model}", args)))
        )
    return "\n\n".join(parts)


def _capped(rows: list[Row]) -> str:
    """What became of the plain model on the smaller device, if there was one."""
    row = next((row for row in rows if "cap GiB" in row), None)
    if row is None:
        return ""
    outcome = "does not fit" if "error" in row else "fits"
    return (
        f"; streamed with the allocator capped to {row['cap GiB']:.0f} GiB, where the plain model "
        f"{outcome}; the plain rows are without the cap"
    )


def _equal_to_a_deterministic_model(name: str, args: argparse.Namespace) -> set[tuple[str, str]]:
    """Workloads and settings that are equal once the plain model equals itself."""
    found = read(name, args)
    rows = [] if found is None else found["figures"]
    return {(row["workload"], row["setting"]) for row in rows if row.get("equal")}


def _claim_row(row: Row, settled: set[tuple[str, str]]) -> list[str]:
    if "error" in row:
        return [row["workload"], row["setting"], NONE, NONE, NONE, NONE, NONE, "out of memory"]
    less = "" if row.get("saved") is None else f"{row['saved']:.0%}"
    times = f"{row['time / plain']:.2f}{TIMES}" if "time / plain" in row else ""
    speed = f"{row['a second']:,.0f} {row['unit']}"
    taken = gib(row["peak allocated"])
    is_settled = not row["equal"] and (row["workload"], row["setting"]) in settled
    equal = "yes, deterministic" if is_settled else yes(row["equal"])
    return [
        row["workload"], row["setting"], taken, less, ms(row["ms"]), times, speed, equal
    ]  # fmt: skip


def capacity(args: argparse.Namespace) -> str:
    """The largest batch and the longest context under the cap."""
    found = read("claim-capacity", args)
    if found is None:
        return ""
    head = ("what", "weights=", "largest", "prefill tokens/s", "decode tokens/s", "peak", "equal")
    rows = [
        [
            "batch" if row["what"] == "batch" else "context", row["setting"], f"{row['largest']:,}",
            f"{row['prefill tokens a second']:,.0f}", f"{row['decode tokens a second']:,.1f}",
            gib(row["peak allocated"]), _equal_where_plain_is(row, found["figures"]),
        ]
        for row in found["figures"] if "largest" in row
    ]  # fmt: skip
    cap = gib(found["figures"][0]["cap bytes"])
    return f"{markdown(head, rows)}\n\nAllocator capped to {cap}. " + source(
        found, "claim-capacity", args
    )


def _equal_where_plain_is(row: Row, rows: list[Row]) -> str:
    """Nothing can be said where the plain model's two runs at its largest size differ."""
    plain = next(r for r in rows if (r["what"], r["setting"]) == (row["what"], "plain"))
    tried = {one[0]: one[-1] for one in plain["attempts"] if isinstance(one, list)}
    if tried.get(plain["largest"]) != plain["digest"]:
        return "the plain model differs from itself"
    return yes(row["equal"])


# ---- the peers ----------------------------------------------------------------------------------


def peers(args: argparse.Namespace) -> str:
    """Every contender at its memory, and Superpipeline at the same."""
    found = read("peers", args)
    if found is None:
        return ""
    parts = []
    groups = dict.fromkeys((r["workload"], r.get("paced GB/s")) for r in found["figures"])
    for workload, paced in groups:
        rows = [
            r for r in found["figures"] if (r["workload"], r.get("paced GB/s")) == (workload, paced)
        ]
        link = median(r["link GB/s"] for r in rows if "link GB/s" in r)
        title = f"**{workload}**, link {link:.1f} GB/s" + (" (paced)" if paced else "")
        head = ("tool", "budget", "weights on the device", "a step", "of the floor", "ours there",
                "tool / ours", "set-up", "host memory", "equal")  # fmt: skip
        shown = [_peer_row(row, rows) for row in rows if not row["budget"].startswith("as ")]
        parts.append(f"{title}\n\n{markdown(head, shown)}")
    return "\n\n".join([*parts, source(found, "peers", args)])


def _peer_row(row: Row, rows: list[Row]) -> list[str]:
    version = row.get("version", "").replace("not installed", "")  # but run from its sources
    name = f"{row['contender']} {version}".strip()
    if "error" in row:
        return [name, row["budget"], *[NONE] * 7, row["error"].split("\n")[0][:80]]
    ours = partner(row, rows)
    ratio = f"{row['ratio']:.2f}" if row.get("ratio") and is_streamed(row) else NONE
    setup = (
        f"{row['setup s'] / row['weights'] * GIB:.2f} s/GiB" if row["setup"] == "first" else NONE
    )
    host = f"{row['host bytes'] / row['weights']:.2f}{TIMES}" if row["setup"] == "first" else NONE
    return [
        name, row["budget"], gib(row.get("measured weight bytes") or row.get("weight bytes")),
        ms(row["ms"]), ratio, ms(ours["ms"]) if ours else NONE,
        _spread(row, ours) if ours else NONE, setup, host, yes(row["equal"]),
    ]  # fmt: skip


def is_streamed(row: Row) -> bool:
    return row["contender"] not in _NOT_STREAMED


def partner(row: Row, rows: list[Row]) -> Row | None:
    """Superpipeline's row at this row's memory, from the same round."""
    label = f"as {row['contender']}, {row['budget']}"
    return next(
        (
            other
            for other in rows
            if (other["contender"], other["budget"]) == ("superpipeline", label)
            and other["workload"] == row["workload"]
            and other.get("round") == row.get("round")
            and other.get("paced GB/s") == row.get("paced GB/s")
            and "ms" in other
        ),
        None,
    )


def _spread(theirs: Row, ours: Row) -> str:
    """Their time over ours, and between the quartiles of both."""
    low, high = _quartiles(theirs["samples ms"]), _quartiles(ours["samples ms"])
    return f"{theirs['ms'] / ours['ms']:.2f} ({low[0] / high[1]:.2f} to {low[1] / high[0]:.2f})"


def _quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    cuts = quantiles(samples, n=4, method="inclusive")
    return cuts[0], cuts[2]


# ---- the targets --------------------------------------------------------------------------------


def targets(args: argparse.Namespace) -> str:
    """The issue's targets beside what was measured on the link as it is."""
    found = read("peers", args)
    if found is None:
        return ""
    rows = [r for r in found["figures"] if "ms" in r and not r.get("paced GB/s")]
    ours = [r for r in rows if r["contender"] == "superpipeline"]
    at_least = [r for r in ours if r["budget bytes"] >= 0.25 * r["weights"]]
    whole = [r["ms"] / r["plain ms"] for r in ours if r["budget"] == "100%"]
    filled = [r["weight bytes"] / r["budget bytes"] for r in ours if r["budget"].endswith("%")]
    firsts = [r for r in ours if r["setup"] == "first"]
    against = best_peers(rows)
    lines = [
        ("inference time / floor, bounds ≥ 25%", "≤ 1.03", _most(r["ratio"] for r in at_least)),
        ("best peer's time / ours, least", "≥ 0.98", _least(against)),
        ("best peer's time / ours, median", "≥ 1.2", f"{median(against):.2f}" if against else NONE),
        ("bound 100% / plain", "≤ 1.02", _most(whole)),
        ("weight bytes / bound", "≤ 1.00", _most(filled)),
        ("weight bytes / bound, least", "≥ 0.97", _least(filled)),
        ("set-up, s/GiB", "≤ 0.2", _most(r["setup s"] / r["weights"] * GIB for r in firsts)),
        (
            "peak host RSS / weights",
            "≤ 1.06",
            _most(r["host bytes"] / r["weights"] for r in firsts),
        ),
    ]
    return markdown(("what", "target", "measured"), lines)


def best_peers(rows: list[Row]) -> list[float]:
    """For each workload and budget, the best peer's time over ours at that peer's memory."""
    best: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in rows:
        ours = partner(row, rows)
        if ours is not None and row["contender"] not in ("superpipeline", *_NOT_STREAMED):
            key = (row["workload"], row["budget"], row.get("round"))
            pair = (row["ratio"], row["ms"] / ours["ms"])  # nearest to its floor is the best
            best[key] = min(best.get(key, pair), pair)
    return [ratio for _, ratio in best.values()]


def _most(values: Iterable[float]) -> str:
    found = list(values)
    return f"{max(found):.2f}" if found else NONE


def _least(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f}" if found else NONE


TABLES: dict[str, Callable[[argparse.Namespace], str]] = {
    "claim": claim, "capacity": capacity, "peers": peers, "targets": targets,
}  # fmt: skip


def write_into(readme: Path, name: str, text: str) -> bool:
    """Puts `text` between the marks of `name`; False where there are none."""
    before = readme.read_text()
    marks = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    after, count = marks.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", before)
    readme.write_text(after)
    return bool(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--suffix", default="", help="-tiny for a rehearsal's results")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args()
    for name, make in TABLES.items():
        text = make(args)
        print(f"## {name}\n\n{text or 'no results'}\n")
        if args.readme and text and not write_into(args.readme, name, text):
            print(f"{args.readme} has no place marked for {name}")
    if not args.no_plots:
        from benchmarks.claim import plots

        for path in plots.draw(args):
            print(path)


if __name__ == "__main__":
    main()
