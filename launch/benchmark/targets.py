"""What was to be reached and what was, out of the CSVs alone: launch/results/kernels_targets.md."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.benchmark import results
from launch.benchmark.results import MEASURED, Row, ratio

# MB of 10^6 bytes, as the targets name them
ALLOWED_MB = 128
MEBIBYTE = 2**20
FLOAT32 = 4


@dataclass(frozen=True)
class Outcome:
    """One number against its limit; None where it was not measured."""

    what: str
    found: float | None
    limit: float
    at_least: bool = False
    bound: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        off = (self.found / self.limit - 1) * (-1 if self.at_least else 1)
        return "met" if off <= 0 else f"missed by {100 * off:.1f} %"


@dataclass(frozen=True)
class Target:
    """A row of the table: where it is measured, and how its outcomes come out of that file's rows."""

    measure: str
    where: str
    outcomes: Callable[[Sequence[Row]], Iterator[Outcome]]


def pick(
    rows: Sequence[Row], group: str, competitor: str, case: str | None = None, shape: str | None = None
) -> list[Row]:
    """The measured rows of a group whose competitor's name begins so, fastest first."""
    found = [
        row
        for row in rows
        if row["group"] == group
        and row["competitor"].startswith(competitor)
        and row["status"] == MEASURED
        and case in (None, row["case"])
        and shape in (None, row["shape"])
    ]
    return sorted(found, key=lambda row: row["time_s"])


def shapes(rows: Sequence[Row], group: str) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows if row["group"] == group)) or ["any"]


def _time(ours: list[Row], others: list[Row], limit: float, what: str, shape: str) -> Outcome:
    """Our fastest row's time by the others' fastest, round by round."""
    if not ours or not others:
        return Outcome(f"{shape}: time by {what}", None, limit)
    one, other = ours[0], others[0]
    what = f"{shape}: time of {one['competitor']} by {what} ({other['competitor']})"
    return Outcome(what, ratio(one["times_s"], other["times_s"]), limit, bound=operations(one, other))


def operations(one: Row, other: Row) -> str:
    """The time of the products alone at the measured rate, and what is left."""
    gigaflops = one["tokens"] * one["width"] * one["vocab"] / 1e9
    units = one["done_units"] or one["needed_units"]
    least = units * gigaflops / one["matmul_gflops_per_s"]
    logits = FLOAT32 * one["tokens"] * one["vocab"] / 1e6
    rest = max(one["time_s"] - least, 0)
    return (
        f"operations: {units:g} units are {units * gigaflops:.0f} GFLOP, {least:.3g} s at the measured "
        f"{one['matmul_gflops_per_s']:.0f} GFLOP/s and {least / other['time_s']:.2f} of the other's time; beside the "
        f"products {rest:.2g} s of sweeps over {logits:.0f} MB of float32 logits"
    )


def nll_on_cpu(rows: Sequence[Row]) -> Iterator[Outcome]:
    for shape in shapes(rows, "nll"):
        ours = pick(rows, "nll", "posttrain one pass", shape=shape)
        trl, dense = (pick(rows, "nll", name, shape=shape) for name in ("trl", "dense"))
        best = [row for row in pick(rows, "nll", "", shape=shape) if not row["competitor"].startswith("posttrain")]
        yield _time(ours, best, 0.85, "the best competitor's", shape)
        yield _time(ours, trl, 0.45, "TRL's", shape)
        for name, others in (("dense", dense), ("trl", trl)):
            found = ours[0]["extra_mib"] / others[0]["extra_mib"] if ours and others else None
            bound = (
                f"bytes: {ours[0]['extra_mib']:.1f} MiB against {others[0]['extra_mib']:.1f}" if ours and others else ""
            )
            yield Outcome(f"{shape}: extra memory by {name}'s", found, 0.15, bound=bound)


def dpo_on_cpu(rows: Sequence[Row]) -> Iterator[Outcome]:
    for shape in shapes(rows, "dpo"):
        ours = pick(rows, "dpo", "posttrain", shape=shape)
        yield _time(ours, pick(rows, "dpo", "dense", shape=shape), 1.1, "dense torch's", shape)
        yield _time(ours, pick(rows, "dpo", "trl", shape=shape), 0.60, "TRL's", shape)


def statistics(limit: float) -> Callable[[Sequence[Row]], Iterator[Outcome]]:
    def outcomes(rows: Sequence[Row]) -> Iterator[Outcome]:
        for shape in shapes(rows, "logp_statistics"):
            alone = pick(rows, "logp_statistics", "posttrain", "logp", shape)
            if not alone:
                yield Outcome(f"{shape}: all statistics by logp alone", None, limit)
            for base in alone:
                full = pick(rows, "logp_statistics", base["competitor"], "statistics", shape)
                yield _time(full, [base], limit, "logp alone", shape)

    return outcomes


def nll_on_gpu(rows: Sequence[Row]) -> Iterator[Outcome]:
    for shape in shapes(rows, "nll"):
        ours = pick(rows, "nll", "posttrain one pass", shape=shape)
        others = [row for name in ("trl", "liger", "cce") for row in pick(rows, "nll", name, shape=shape)]
        yield _time(ours, sorted(others, key=lambda row: row["time_s"]), 0.80, "the best of TRL, Liger and CCE", shape)
        share = ours[0]["needed_share"] if ours else None
        yield Outcome(f"{shape}: share of the matmul rate for 6 units", share, 0.80, at_least=True)


def dpo_on_gpu(rows: Sequence[Row]) -> Iterator[Outcome]:
    for shape in shapes(rows, "dpo"):
        ours = pick(rows, "dpo", "posttrain", shape=shape)
        yield _time(ours, pick(rows, "dpo", "trl", shape=shape), 0.90, "TRL's", shape)


def live_rows(rows: Sequence[Row]) -> Iterator[Outcome]:
    """The backward's time by its time with every row live, over the share of live rows; less than 1 is no miss."""
    real = [row for row in rows if row["group"] == "live_rows_real" and row["status"] == MEASURED]
    if not real:
        yield Outcome("on given probabilities (--probabilities)", None, 1.10)
    for group in ("live_rows_real", "live_rows"):
        found = [row for row in rows if row["group"] == group and row["status"] == MEASURED]
        for base in (row for row in found if row["live_share"] == 1):
            for row in found:
                same = (row["competitor"], row["shape"]) == (base["competitor"], base["shape"])
                if not same or row["live_share"] == 1:
                    continue
                share = row["live_share"]
                took = ratio(row["backward_times_s"], base["backward_times_s"])
                bound = (
                    f"backward of {row['backward_s']:.3g} s, {took:.3f} of that of all rows; {6 * share:.2f} units of 6"
                )
                what = f"{row['shape']}, {group}: {row['competitor']}, {share:.2f} live: backward time by proportional"
                yield Outcome(what, took / share, 1.10, bound=bound)


def memory(rows: Sequence[Row]) -> Iterator[Outcome]:
    """The row that comes nearest to its allowance, in each of the two paths."""
    for name, sides in (("posttrain budget 0", "tokens"), ("posttrain one pass (", "vocab")):
        allowed = f"{ALLOWED_MB} MB" + (" and a float32 gradient of " + ("hidden" if sides == "tokens" else "the head"))
        found = [row for row in rows if row["competitor"].startswith(name) and row["extra_mib"] is not None]
        worst: tuple[float, Row] | None = None
        for row in found:
            # a float32 head's sums are its gradient already, which is not counted
            counted = name == "posttrain budget 0" or row["dtype"] != "float32"
            limit = ALLOWED_MB * 1e6 + (FLOAT32 * row["width"] * row[sides] if counted else 0)
            share = row["extra_mib"] * MEBIBYTE / limit
            worst = max(worst, (share, row), key=lambda pair: pair[0]) if worst else (share, row)
        if worst is None:
            yield Outcome(f"{name}: extra memory by {allowed}", None, 1.0)
            continue
        share, row = worst
        megabytes = row["extra_mib"] * MEBIBYTE / 1e6
        bound = f"bytes: {megabytes:.1f} MB in {row['case']}, {row['key']}, the most of {len(found)} rows"
        yield Outcome(f"{row['competitor']}: extra memory by {allowed}", share, 1.0, bound=bound)


def costream(rows: Sequence[Row]) -> Iterator[Outcome]:
    for shape in shapes(rows, "kl"):
        apart = pick(rows, "kl", "posttrain", "two_passes", shape)
        if not apart:
            yield Outcome(f"{shape}: forward_kl by two separate passes", None, 1.15)
        for base in apart:
            together = pick(rows, "kl", base["competitor"], "kl", shape)
            yield _time(together, [base], 1.15, "two separate passes", shape)


TARGETS = (
    Target("nll forward + backward, exact, one pass", "cpu", nll_on_cpu),
    Target("sequence objective (DPO pair loss), exact", "cpu", dpo_on_cpu),
    Target("all statistics against logp alone, forward + backward", "cpu", statistics(1.5)),
    Target("all statistics against logp alone, forward + backward", "gpu", statistics(1.25)),
    Target("nll forward + backward, exact", "gpu", nll_on_gpu),
    Target("sequence objective (DPO), exact", "gpu", dpo_on_gpu),
    Target("threshold 0.2 (dead rows)", "cpu", live_rows),
    Target("threshold 0.2 (dead rows)", "gpu", live_rows),
    Target("peak memory beyond inputs and gradients", "cpu", memory),
    Target("peak memory beyond inputs and gradients", "gpu", memory),
    Target("teacher co-stream against separate passes", "cpu", costream),
    Target("teacher co-stream against separate passes", "gpu", costream),
)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log value against log size, by least squares: 1 is proportional growth, 0 none."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(rows: Sequence[Row]) -> Iterator[tuple[str, str, float, float]]:
    """(axis, competitor, slope of the time, slope of the extra memory)."""
    for group, axis in (("growth_tokens", "tokens"), ("growth_vocabulary", "vocab")):
        for name in dict.fromkeys(row["competitor"] for row in pick(rows, group, "")):
            found = [row for row in pick(rows, group, name) if row["competitor"] == name]
            sizes = [row[axis] for row in found]
            if len(set(sizes)) > 1:
                times, extra = ([row[column] for row in found] for column in ("time_s", "extra_mib"))
                yield axis, name, slope(sizes, times), slope(sizes, extra)


def table(files: Mapping[str, Sequence[Row]]) -> list[str]:
    """The targets as lines of Markdown."""
    lines = [
        "| measure | where | number | limit | reached | verdict | what bounds it |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        for one in target.outcomes(files.get(target.where, [])):
            limit = f"{'≥' if one.at_least else '≤'} {one.limit:g}"
            reached = "" if one.found is None else f"{one.found:.3f}"
            cells = (target.measure, target.where, one.what, limit, reached, one.verdict, one.bound)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _source(path: Path) -> str:
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    machine, versions = record["machine"], record["versions"]
    device = machine["devices"][0]["name"] if machine["devices"] else machine["processor"]
    return (
        f"`{path.name}`: run {record['run']}, {device}, {record['threads']} threads, torch {versions['torch']}, trl "
        f"{versions['trl']}, `{record['command']}`."
    )


def main() -> None:
    """Write the table of what the CSVs hold."""
    paths = [path for name in ("cpu", "gpu") if (path := results.place(name)).exists()]
    files = {path.stem.removeprefix("kernels_"): results.read(path) for path in paths}
    lines = [
        "# Kernels: targets and what was reached",
        "",
        "Written by `launch/benchmark_kernels.sh targets` out of the CSVs beside it. Time ratios are medians over",
        "rounds of two times of the same round. Extra memory is what torch's allocators hold at the peak beyond inputs",
        "and the storages of the gradients that are returned.",
        "",
        *(_source(path) for path in paths),
        "",
        *table(files),
        "",
    ]
    slopes = [(name, *entry) for name, rows in files.items() for entry in growth(rows)]
    if slopes:
        lines += [
            "## Growth of nll, slope of log against log",
            "",
            "| where | against | who | time | extra memory |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {where} | {axis} | {who} | {time:.2f} | {extra:.2f} |" for where, axis, who, time, extra in slopes
        ]
    text = "\n".join(lines).rstrip() + "\n"
    (results.RESULTS / "kernels_targets.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
