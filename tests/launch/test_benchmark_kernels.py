"""The benchmark of the kernels: it checks before it times, goes on where it stopped, and its arithmetic is right."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch

from launch.benchmark import plot, results, targets
from launch.benchmark.cases import CASES, dense_values
from launch.benchmark.competitors import Competitor, competitors
from launch.benchmark.measure import check, failure, memory, replay
from launch.benchmark.problems import THRESHOLD, Shape, make_probabilities, make_problem, resample
from launch.benchmark.run import run
from launch.benchmark.sets import Entry, Group, groups

CPU = torch.device("cpu")
TINY = Shape("tiny", 32, 64, 500)
PEOPLE = ("dense", "trl", "cce", "posttrain", "planted")


def doubled(problem):
    """The right loss with a gradient twice too large."""
    loss = CASES["nll"].loss(dense_values(problem, CASES["nll"]), problem)
    return 2 * loss - loss.detach()


def tiny(case="nll", **options):
    generator = {"dtype": torch.float32, "device": CPU} | options
    return make_problem(TINY, make_probabilities(TINY.tokens, 0.5), teacher=CASES[case].teacher, **generator)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The tiniest set with a wrong competitor among the others, and its CSV."""
    path = tmp_path_factory.mktemp("results") / "kernels_smoke.csv"
    todo = [
        Group("nll", TINY, torch.float32, (Entry("nll", PEOPLE),), 2),
        Group("growth_tokens", TINY, torch.float32, (Entry("nll", ("dense",)),), 2),
        Group("growth_tokens", Shape("tiny", 16, 64, 500), torch.float32, (Entry("nll", ("dense",)),), 2),
    ]
    planted = [Competitor("planted", doubled, 6)]
    assert run("smoke", todo, path, extra=planted)
    return path, todo, planted


def test_every_row_has_its_columns(measured):
    path, _, _ = measured
    with path.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == results.COLUMNS
    rows = [row for row in results.read(path) if row["group"] == "nll"]
    found = {row["competitor"]: row for row in rows}
    assert set(found) >= {"dense", "trl", "posttrain one pass (streamed)", "posttrain budget 0 (streamed)"}
    for row in rows:
        if row["status"] == "measured":
            assert len(row["times_s"]) == len(row["backward_times_s"]) == row["rounds"] == 2
            assert row["time_min_s"] <= row["time_q1_s"] <= row["time_s"] <= row["time_q3_s"] <= row["time_max_s"]
            assert row["gradient_error"] < 1e-5 and row["extra_mib"] <= row["peak_mib"]
            assert row["best_competitor"] in ("dense", "trl") and row["ratio_to_best"] > 0
            unit = 32 * 64 * 500
            share = row["needed_units"] * unit / row["time_s"] / (row["matmul_gflops_per_s"] * 1e9)
            assert row["needed_units"] == 6 and row["needed_share"] == pytest.approx(share, rel=1e-3)
    assert found["trl"]["done_units"] == found["posttrain budget 0 (streamed)"]["done_units"] == 8
    assert found["posttrain one pass (streamed)"]["done_units"] == 6
    assert found["cce"]["status"] == "not measured: needs a GPU" and found["cce"]["time_s"] is None
    record = json.loads(path.with_suffix(".json").read_text())
    assert {"run", "machine", "versions", "threads", "git", "kernels", "command"} <= set(record)


def test_a_wrong_gradient_is_shown_and_not_timed(measured):
    (row,) = [row for row in results.read(measured[0]) if row["competitor"] == "planted"]
    assert row["status"] == "wrong gradient"
    assert row["time_s"] is None and row["times_s"] == []
    assert row["gradient_error"] == pytest.approx(1, rel=1e-3) and row["loss_error"] < 1e-6


def test_a_stopped_run_goes_on(measured):
    path, todo, planted = measured
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    kept = [line for line in lines if ",growth_tokens,growth_tokens tiny 16x" not in line]
    path.write_text("".join(kept))
    assert run("smoke", todo, path, extra=planted)
    after = path.read_text().splitlines(keepends=True)
    assert after[: len(kept)] == kept and len(after) == len(lines)
    assert not run("smoke", [*todo, Group("dpo", TINY, torch.float32, (Entry("dpo", ("dense",)),))], path, minutes=-1)


def test_rows_of_other_kernels_are_not_mixed(measured, tmp_path):
    path = tmp_path / "kernels_smoke.csv"
    path.write_text(measured[0].read_text())
    record = json.loads(measured[0].with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"kernels": "others"}))
    with pytest.raises(results.OtherRunError, match="with other kernels; pass --overwrite"):
        run("smoke", [], path)
    assert run("smoke", [], path, overwrite=True)
    assert results.read(path) == []


@pytest.mark.parametrize("case", [name for name in CASES if name != "nll"])
def test_our_rows_have_the_truth_s_gradients(case):
    people = [one for one in competitors(CASES[case], CPU) if one.name.startswith(("trl", "posttrain", "linear"))]
    found, refused = check(CASES[case], people, tiny(case))
    assert len(found) + len(refused) == len(people)
    assert {name for name, why in refused.items() if not why.startswith("not measured")} == set()


def test_probabilities_are_as_asked_for():
    probabilities = make_probabilities(2000, 0.25)
    assert float((probabilities >= THRESHOLD).double().mean()) == 0.25
    problem = make_problem(Shape("", 2000, 256, 4000), probabilities, dtype=torch.float64, device=CPU)
    found = dense_values(problem, CASES["nll"])["logp"].exp()
    assert torch.equal(found >= THRESHOLD, probabilities >= THRESHOLD)
    assert (torch.logit(found) - torch.logit(probabilities)).abs().max() < 0.5
    given = torch.tensor([0.1, 0.9, 0.9])
    assert resample(given, 3).sort().values.tolist() == pytest.approx(given.tolist())
    assert resample(given, 300).unique().tolist() == pytest.approx([0.1, 0.9])


def test_memory_counts_what_is_neither_input_nor_gradient():
    # 10 is allocated and released, 4 becomes the gradient at an address that was in use before
    events = [(1, 10), (2, 4), (1, -10), (2, -4), (2, 4), (3, 5), (3, -5)]
    assert replay(events, {2}) == (14, 14)
    assert replay(events[4:], {2}) == (9, 5)
    problem = tiny()
    logits = TINY.tokens * TINY.vocab * 4 / 2**20

    def squares(problem):
        return (problem.hidden @ problem.weight.T).square().sum()

    found = memory(squares, problem)
    # z, its square or gradient, and what the product rule makes on the way
    assert 2 * logits <= found.extra <= 4.1 * logits
    assert found.extra <= found.total <= found.extra + (TINY.tokens + TINY.vocab) * TINY.width * 4 / 2**20 + 1e-3


def test_a_failure_names_no_place_of_the_machine():
    place = "/".join(("", "home", "me", "x.cpp"))
    assert failure(RuntimeError(f"cannot compile {place}: no\nmore")) == "failed: RuntimeError: cannot compile ...: no"


def row(competitor, times, **changes):
    base = {
        "group": "nll", "case": "nll", "status": "measured", "shape": "tiny", "tokens": 10.0, "width": 10.0,
        "vocab": 10.0, "done_units": 6.0, "needed_units": 6.0, "needed_share": 0.7, "matmul_gflops_per_s": 1.0,
        "extra_mib": 1.0, "live_share": 1.0, "key": "nll tiny", "backward_s": 1.0, "backward_times_s": times,
    }  # fmt: skip
    return base | {"competitor": competitor, "times_s": times, "time_s": sorted(times)[len(times) // 2]} | changes


def test_target_arithmetic():
    rows = [
        row("posttrain one pass (streamed)", [0.8, 0.45, 1.8]),
        row("dense", [1.0, 0.5, 2.0], extra_mib=5.0),
        row("trl", [4.0, 4.0, 4.0], extra_mib=20.0),
    ]
    dense, trl, memory_by_dense, memory_by_trl = targets.nll_on_cpu(rows)
    # 0.8, 0.9 and 0.9 round by round; the medians, of different rounds, have the ratio 0.8
    assert dense.found == pytest.approx(0.9) and dense.verdict == "missed by 5.9 %"
    assert trl.found == pytest.approx(0.2) and trl.verdict == "met"
    assert memory_by_dense.found == 0.2 and memory_by_dense.verdict == "missed by 33.3 %"
    assert memory_by_trl.found == 0.05 and memory_by_trl.verdict == "met"
    _, share = targets.nll_on_gpu(rows)
    assert share.verdict == "missed by 12.5 %"
    base = row("posttrain budget 0", [4.0, 4.0], group="live_rows")
    half = row("posttrain budget 0", [2.3, 2.3], group="live_rows", live_share=0.5)
    unknown, proportion = targets.live_rows([base, half])
    assert unknown.verdict == "not measured"
    assert proportion.found == pytest.approx(1.15) and proportion.verdict == "missed by 4.5 %"
    recomputing, one_pass = targets.memory([row("posttrain budget 0", [1.0], extra_mib=64.0)])
    assert recomputing.found == pytest.approx(64 * 2**20 / (128e6 + 400)) and one_pass.found is None


def test_slope():
    assert targets.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert targets.slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_table_and_plot_come_from_the_rows(measured, tmp_path):
    rows = results.read(measured[0])
    lines = targets.table({"cpu": rows})
    assert sum("not measured" in line for line in lines if "| gpu |" in line) == sum("| gpu |" in x for x in lines) > 0
    assert any("GFLOP" in line for line in lines)
    plot.draw(rows, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu"])
def test_the_sets_hold_every_case_and_tell_their_groups_apart(name):
    found = groups(name, with_file=True)
    assert len({group.key for group in found}) == len(found)
    assert {entry.case for group in found for entry in group.entries} == set(CASES)


def test_the_script_is_executable_and_parses():
    script = Path(__file__).parents[2] / "launch/benchmark_kernels.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
