"""Measures a set group by group and writes each group's rows when it is done; started again, it goes on."""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.benchmark import results, targets
from launch.benchmark.cases import CASES, Case
from launch.benchmark.competitors import OURS, Competitor, competitors
from launch.benchmark.measure import Errors, Memory, Times, check, failure, matmul_rate, memory, rounds, timed
from launch.benchmark.problems import THRESHOLD, Problem, Shape, make_probabilities, make_problem, resample
from launch.benchmark.results import MEASURED, Row
from launch.benchmark.sets import FROM_FILE, Entry, Group, groups


@dataclass(eq=False)
class Contender:
    """One competitor on one entry, and all that is found out about it."""

    entry: Entry
    competitor: Competitor
    problem: Problem
    live_share: float
    status: str = MEASURED
    errors: Errors | None = None
    memory: Memory | None = None
    times: Times | None = None


def live(probabilities: Tensor) -> float:
    return float((probabilities >= THRESHOLD).double().mean())


def contenders(
    group: Group, device: torch.device, given: Tensor | None, extra: Sequence[Competitor] = ()
) -> list[Contender]:
    """Everybody in the group, gradients checked; `extra` take part in every entry."""
    found: list[Contender] = []
    weight: Tensor | None = None
    needs_teacher = any(CASES[entry.case].teacher for entry in group.entries)
    for entry in group.entries:
        case = CASES[entry.case]
        take_part = [
            one for one in (*competitors(case, device), *extra) if not entry.only or one.name.startswith(entry.only)
        ]

        def problem(shape: Shape, weight: Tensor | None, entry: Entry = entry) -> tuple[Problem, float]:
            if entry.live_share == FROM_FILE:
                assert given is not None
                probabilities = resample(given, shape.tokens)
            else:
                probabilities = make_probabilities(shape.tokens, entry.live_share)
            made = make_problem(
                shape, probabilities, dtype=group.dtype, device=device, teacher=needs_teacher, weight=weight
            )
            return made, live(probabilities)

        small, _ = problem(group.shape.reduced, None)
        errors, refused = check(case, take_part, small)
        whole, share = problem(group.shape, weight)
        weight = whole.weight
        found += [
            Contender(entry, one, whole, share, refused.get(one.name, MEASURED), errors.get(one.name))
            for one in take_part
        ]
    return found


def measure(group: Group, device: torch.device, given: Tensor | None, extra: Sequence[Competitor] = ()) -> list[Row]:
    """The group's rows, without the run's name."""
    everyone = contenders(group, device, given, extra)
    for one in everyone:
        if one.status != MEASURED or one.competitor.run is None:
            continue
        try:
            if one.competitor.compiles:
                timed(one.competitor.run, one.problem)
            # also the first call, which is not timed
            one.memory = memory(one.competitor.run, one.problem)
        except Exception as error:  # of any kind, by other people's code: it becomes the row
            one.status = failure(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    able = {str(i): one for i, one in enumerate(everyone) if one.status == MEASURED}
    runs = {key: (one.competitor.run, one.problem) for key, one in able.items() if one.competitor.run is not None}
    rate = matmul_rate(everyone[0].problem)
    for key, times in rounds(runs, group.rounds).items():
        able[key].times = times
    return [_row(one, everyone, group, device, rate) for one in everyone]


def _best(one: Contender, everyone: Sequence[Contender]) -> tuple[str, Times] | None:
    """The fastest of the others' implementations of the same entry."""
    others = [
        (results.spread(other.times.total)["time_s"], other.competitor.name, other.times)
        for other in everyone
        if other.entry == one.entry and other.times is not None and not other.competitor.name.startswith(OURS)
    ]
    return min(others, key=lambda other: other[0])[1:] if others else None


def _row(one: Contender, everyone: Sequence[Contender], group: Group, device: torch.device, rate: float) -> Row:
    case: Case = CASES[one.entry.case]
    shape = group.shape
    # two of a case's units are the forward; dead rows need no more
    needed = 2 + (case.units - 2) * one.live_share if case.name == "threshold_0.2" else case.units
    row: Row = {
        "group": group.name, "key": group.key, "case": case.name, "competitor": one.competitor.name,
        "status": one.status, "shape": shape.name, "tokens": shape.tokens, "width": shape.width, "vocab": shape.vocab,
        "dtype": str(group.dtype).removeprefix("torch."), "device": device.type, "live_share": one.live_share,
        "needed_units": needed, "done_units": one.competitor.units, "matmul_gflops_per_s": rate / 1e9,
    }  # fmt: skip
    if one.errors is not None:
        row |= {"gradient_error": one.errors.gradient, "loss_error": one.errors.loss}
    if one.memory is not None:
        row |= {"extra_mib": one.memory.extra, "peak_mib": one.memory.total}
    if one.times is not None:
        row |= _timing(one, one.times, rate, row)
        best = _best(one, everyone)
        if best is not None:
            row |= {"best_competitor": best[0], "ratio_to_best": results.ratio(one.times.total, best[1].total)}
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}


def _timing(one: Contender, times: Times, rate: float, row: Row) -> Row:
    found: Row = dict(results.spread(times.total))
    backward = results.spread(times.backward)["time_s"]
    unit = row["tokens"] * row["width"] * row["vocab"]
    forward = results.spread([t - b for t, b in zip(times.total, times.backward, strict=True)])["time_s"]
    found |= {"rounds": len(times.total), "forward_s": forward, "backward_s": backward}
    found["needed_share"] = row["needed_units"] * unit / found["time_s"] / rate
    if one.competitor.units is not None:
        found["done_share"] = one.competitor.units * unit / found["time_s"] / rate
    found["times_s"] = " ".join(f"{seconds:.6g}" for seconds in times.total)
    found["backward_times_s"] = " ".join(f"{seconds:.6g}" for seconds in times.backward)
    return found


def run(
    name: str, todo: Sequence[Group], path: Path, *, given: Tensor | None = None, overwrite: bool = False,
    minutes: float | None = None, extra: Sequence[Competitor] = (),
) -> bool:  # fmt: skip
    """Measures the groups that the file does not hold yet; whether all of them are in it then.

    Args:
        name: the set.
        todo: its groups.
        path: the CSV.
        given: target probabilities, for the entries that take them from a file.
        overwrite: begin anew.
        minutes: after which no further group is begun.
        extra: competitors beside the built-in ones.
    """
    device = torch.device("cuda" if name == "gpu" else "cpu")
    command = f"launch/benchmark_kernels.sh {name}" + (" --probabilities FILE" if given is not None else "")
    run_name, rows = results.start(path, results.about(name, command), overwrite=overwrite)
    held = {row["key"] for row in rows}
    begun = time.monotonic()
    for number, group in enumerate(todo, start=1):
        if group.key in held:
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            print(f"{minutes:g} minutes are over before group {number} of {len(todo)}; the same command goes on")
            return False
        since = time.monotonic()
        found = measure(group, device, given, extra)
        results.append(path, [{"run": run_name} | row for row in found])
        _print(f"[{number}/{len(todo)}] {group.key}: {time.monotonic() - since:.0f} s", found)
        torch.compiler.reset()
        gc.collect()
    return True


def _print(title: str, rows: Sequence[Row]) -> None:
    print(title)
    for row in rows:
        who = f"  {row['case']:<14} {row['competitor']:<32} live {row['live_share']:<5}"
        if row["status"] == MEASURED:
            print(f"{who} {row['time_s']:>9} s {row['extra_mib']:>9} MiB  error {row['gradient_error']}")
        else:
            print(f"{who} {row['status']}")
    sys.stdout.flush()


def main() -> None:
    """One set from the command line."""
    parser = argparse.ArgumentParser(prog="launch/benchmark_kernels.sh", description=__doc__)
    parser.add_argument("set", nargs="?", choices=("smoke", "cpu", "gpu"), help="by default cpu, on CUDA gpu")
    parser.add_argument("--probabilities", type=Path, help="text file of target probabilities, one on a line")
    parser.add_argument("--overwrite", action="store_true", help="begin anew instead of going on")
    parser.add_argument("--minutes", type=float, help="begin no further group after so many")
    arguments = parser.parse_args()
    name = arguments.set or ("gpu" if torch.cuda.is_available() else "cpu")
    if name == "gpu" and not torch.cuda.is_available():
        parser.error("the gpu set needs a CUDA device, and torch finds none; take cpu or smoke")
    given = None
    if arguments.probabilities is not None:
        given = torch.from_numpy(np.loadtxt(arguments.probabilities, dtype=np.float32, ndmin=1))
    path = results.place(name)
    todo = groups(name, with_file=given is not None)
    try:
        finished = run(name, todo, path, given=given, overwrite=arguments.overwrite, minutes=arguments.minutes)
    except results.OtherRunError as error:
        parser.error(str(error))
    if finished and name != "smoke":
        targets.main()
    print(os.path.relpath(path))


if __name__ == "__main__":
    main()
