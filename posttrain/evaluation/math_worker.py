"""Compares answers with math-verify in a process of its own, one JSON line in and one out.

Run as a script so that nothing but math-verify is imported. Its parent kills it when an answer takes too long: an
alarm, which math-verify uses itself, works on the main thread alone and cannot interrupt one long integer power.
"""

import json
import logging
import re
import sys

import sympy
from math_verify import parse, verify

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")
_MIXED_NUMBER = re.compile(r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d/])")


def _improper_fraction(mixed: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, mixed.groups())
    return f"{whole * denominator + numerator}/{denominator}"


def _parse(text: str) -> list[sympy.Basic | str]:
    """Expressions that math-verify reads; it misreads "3 1/2" as 1 and formulas without delimiters, so help first."""
    text = _MIXED_NUMBER.sub(_improper_fraction, text)
    if "\\" in text and not _DELIMITED.search(text) and not _PROSE.search(text):
        text = f"${text}$"
    return parse(text, parsing_timeout=None)


def _canonical(parsed: list[sympy.Basic | str]) -> str | None:
    """One spelling per value, so that 0.5, 1/2 and .50 are the same vote."""
    if not parsed:
        return None
    value = parsed[0]
    if isinstance(value, sympy.Expr) and value.is_number:
        value = sympy.nsimplify(value.doit(), rational=True)
    return str(value)


def answer(gold: str, candidate: str) -> dict[str, str | bool | None]:
    """Whether the candidate equals the gold answer, its canonical form, and whether the gold could be read at all."""
    gold_parsed, parsed = _parse(gold), _parse(candidate)
    return {
        "readable": bool(gold_parsed),
        "correct": verify(gold_parsed, parsed, timeout_seconds=None),
        "answer": _canonical(parsed),
    }


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            response = answer(request["gold"], request["candidate"])
        except Exception as error:
            # A model can write anything; the parent counts what could not be judged and says so in its report.
            response = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(response), flush=True)


if __name__ == "__main__":
    main()
