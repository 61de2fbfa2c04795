"""The numerical contract of the kernels over the full product of dtypes, shapes, logits, heads, statistics and paths.

    python -m launch.kernel_contract [--backend NAME] [--device NAME] [--minutes N] [--overwrite]

One row a combination in launch/results/kernel_contract.csv: the comparison that comes nearest to what is allowed, or
beyond it furthest (`ratio` of its error to the allowed one, at most 1 where the contract is kept). Small combinations
come first; one that has a row is not measured again, so a run goes on where it stopped. Fails where a ratio exceeds 1.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from tests.kernels.contract import FACTORS, Case, measure

RESULTS = Path(__file__).parent / "results/kernel_contract.csv"
KEY = ("backend", "hardware", *FACTORS)
COLUMNS = (*KEY, "ratio", "worst", "error", "dense_error", "allowed", "seconds", "torch")

Row = dict[str, str]


def cases() -> list[Case]:
    """All combinations, small ones first."""
    found = [Case(*levels) for levels in product(*FACTORS.values())]  # type: ignore[arg-type]
    return sorted(found, key=lambda case: (case.tokens + case.width) * case.vocab)


def rows(backend: str, device: str, done: set[tuple[str, ...]], until: float) -> Iterator[Row]:
    """A row for each combination that is not done, until the clock shows `until`."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} {platform.machine()}"
    for case in cases():
        key = {"backend": backend, "hardware": hardware} | {name: str(level) for name, level in asdict(case).items()}
        if tuple(key.values()) in done:
            continue
        if time.monotonic() > until:
            return
        start = time.monotonic()
        worst = max(measure(case, backend, device), key=lambda one: one.ratio)
        yield key | {
            "ratio": f"{worst.ratio:.4g}",
            "worst": worst.name,
            "error": f"{worst.error:.4g}",
            "dense_error": f"{worst.dense_error:.4g}",
            "allowed": f"{worst.allowed:.4g}",
            "seconds": f"{time.monotonic() - start:.2f}",
            "torch": torch.__version__,
        }


def read(path: Path) -> list[Row]:
    """The rows of earlier runs."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    if found and tuple(found[0]) != COLUMNS:
        raise ValueError(f"{path.name} has other columns than this version writes; move it away or pass --overwrite")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and say what breaks the contract."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help="of vocab_statistics")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no combination after this time")
    parser.add_argument("--overwrite", action="store_true", help="forget earlier rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found = [] if given.overwrite else read(given.results)
    done = {tuple(row[name] for name in KEY) for row in found}
    with given.results.open("a" if found else "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not found:
            writer.writeheader()
        for row in rows(given.backend, given.device, done, time.monotonic() + 60 * given.minutes):
            writer.writerow(row)
            file.flush()
            found.append(row)
            if not float(row["ratio"]) <= 1:
                print("broken:", " ".join(row.values()), flush=True)
    broken = sum(not float(row["ratio"]) <= 1 for row in found)
    print(f"{len(found)} rows ({len(cases())} combinations a backend and device), {broken} beyond what is allowed")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
