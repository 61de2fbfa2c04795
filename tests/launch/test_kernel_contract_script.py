"""The script behind the full product of the numerical contract: what it writes, and where it goes on."""

import csv

import pytest

from launch import kernel_contract
from tests.kernels.contract import FACTORS, Measured


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(kernel_contract, "cases", lambda cases=kernel_contract.cases: cases()[:3])


def run(path, *arguments):
    kernel_contract.main(["--backend", "streamed", "--device", "cpu", "--results", str(path), *arguments])
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_combinations_small_ones_first():
    cases = kernel_contract.cases()
    count = 1
    for levels in FACTORS.values():
        count *= len(levels)
    assert len(set(cases)) == len(cases) == count
    assert (cases[0].tokens, cases[0].vocab) == (1, 2) and (cases[-1].tokens, cases[-1].vocab) == (4097, 50257)


def test_it_goes_on_where_it_stopped(few, tmp_path, monkeypatch):
    path = tmp_path / "contract.csv"
    assert run(path, "--minutes", "-1") == []
    rows = run(path)
    assert len(rows) == 3 and all(0 <= float(row["ratio"]) <= 1 for row in rows)
    monkeypatch.setattr(kernel_contract, "measure", lambda *_: pytest.fail("nothing is missing"))
    assert run(path) == rows


def test_a_broken_contract_fails_and_is_written(few, tmp_path, monkeypatch, capsys):
    path = tmp_path / "contract.csv"
    measured = [Measured("logp", 0.1, 0.2, 0.3), Measured("entropy by weight", float("nan"), 0.2, 0.3)]
    monkeypatch.setattr(kernel_contract, "measure", lambda *_: measured)
    with pytest.raises(SystemExit):
        run(path)
    assert "3 beyond what is allowed" in capsys.readouterr().out
    with path.open(newline="") as file:
        assert [(row["worst"], row["ratio"]) for row in csv.DictReader(file)] == [("entropy by weight", "inf")] * 3


def test_rows_of_another_version_are_not_mixed(few, tmp_path):
    path = tmp_path / "contract.csv"
    path.write_text("ratio\n0.5\n")
    with pytest.raises(ValueError, match="other columns"):
        run(path)
    assert len(run(path, "--overwrite")) == 3
