"""Numbers between bounds, as a grammar of their digits."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from moeshard._core import MoeshardError
from moeshard.serving.grammar import EMPTY, Grammar, either

MAX_DIGITS = 40
_FREE_WHOLE = 16
_FREE_FRACTION = 16

INTEGER = '"-"? ( "0" | [1-9] [0-9]{0,15} )'
NUMBER = f'{INTEGER} ( "." [0-9]{{1,16}} )? ( [eE] [-+]? [0-9]{{1,2}} )?'


@dataclass(frozen=True)
class Bound:
    """An end of a range."""

    value: Decimal
    is_in: bool
    """Whether the range holds it."""


def number_between(grammar: Grammar, low: Bound | None, high: Bound | None, *, whole: bool) -> str | None:
    """Return the expression of the numbers of a range, None where it holds none.

    Without an exponent, and with as many digits as fit the bounds, or 16 before and behind the point.

    Args:
        grammar: gets the rules that are needed.
        low: where the range begins; None: nowhere.
        high: where it ends; None: nowhere.
        whole: whether numbers have no fraction.

    Raises:
        MoeshardError: a bound has too many digits.
    """
    for bound in (low, high):
        if bound is not None and (abs(bound.value.adjusted()) > MAX_DIGITS or len(bound.value.as_tuple().digits) > 30):
            raise MoeshardError("a bound of numbers has too many digits")
    if whole:
        low, high = _whole(low, up=True), _whole(high, up=False)
    zero = Bound(Decimal(0), True)
    parts = []
    if high is None or high.value > 0 or (high.value == 0 and high.is_in):
        start = low if low is not None and low.value >= 0 else zero
        parts.append(_Positive(grammar, start, high, whole).expression())
    if low is None or low.value < 0:
        start = Bound(-high.value, high.is_in) if high is not None and high.value < 0 else Bound(Decimal(0), False)
        below = _Positive(grammar, start, None if low is None else Bound(-low.value, low.is_in), whole).expression()
        parts.append(below and f'"-" {below}')
    found = [part for part in parts if part is not None]
    return either(found) if found else None


def _whole(bound: Bound | None, *, up: bool) -> Bound | None:
    """Return a bound of whole numbers, which the range holds."""
    if bound is None:
        return None
    nearest = bound.value.to_integral_value("ROUND_CEILING" if up else "ROUND_FLOOR")
    if nearest == bound.value and not bound.is_in:
        nearest += 1 if up else -1
    return Bound(nearest, True)


class _Positive:
    """Digits from one bound, at least 0, to another, compared one by one."""

    def __init__(self, grammar: Grammar, low: Bound, high: Bound | None, whole: bool):
        self._grammar, self._low, self._high, self._whole = grammar, low, high, whole
        self._low_digits, self._low_fraction = _digits(low.value)
        self._high_digits, self._high_fraction = _digits(high.value) if high is not None else ("9" * _FREE_WHOLE, "")
        if high is None and len(self._low_digits) >= _FREE_WHOLE:
            self._high_digits = "9" * (len(self._low_digits) + 1)

    def expression(self) -> str | None:
        """Return the expression, None where there is no such number."""
        parts = []
        for width in range(len(self._low_digits), len(self._high_digits) + 1):
            first = self._low_digits if width == len(self._low_digits) else "1" + "0" * (width - 1)
            last = self._high_digits if width == len(self._high_digits) else "9" * width
            low = first + self._low_fraction if first is self._low_digits else None
            high = last + self._high_fraction if last is self._high_digits and self._high is not None else None
            parts.append(self._from(0, width, first, last, low, high))
        found = [part for part in parts if part is not None]
        return either(found) if found else None

    def _from(self, at: int, width: int, first: str, last: str, low: str | None, high: str | None) -> str | None:
        """Return the expression of the digits from `at` on; `first` and `last` bound those before the point, while
        `low` and `high` are set where all digits so far are those of a bound that matters, its fraction included."""
        if low is None and not first[at:].strip("0"):
            first = ""
        if high is None and not last[at:].strip("9"):
            last = ""
        if at == width or not (first or last):
            digits = f"[0-9]{{{width - at}}} " if at < width else ""
            behind = self._behind_point(width, low, high)
            return behind and digits + behind
        parts = []
        floor, ceiling = int(first[at]) if first else 0, int(last[at]) if last else 9
        for digit, end in _steps(floor, ceiling, bool(first), bool(last)):
            on_floor = bool(first) and digit == floor == end
            on_ceiling = bool(last) and digit == ceiling == end
            rest = self._from(
                at + 1,
                width,
                first if on_floor else "",
                last if on_ceiling else "",
                low if on_floor else None,
                high if on_ceiling else None,
            )
            if rest is not None:
                parts.append(f"{_digit(digit, end)} {rest}")
        return self._grammar.rule(either(parts)) if parts else None

    def _behind_point(self, at: int, low: str | None, high: str | None) -> str | None:
        stop = self._may_stop(at, low, high)
        if self._whole:
            return EMPTY if stop else None
        more = self._fraction(at, low, high, 1)
        if more is None:
            return EMPTY if stop else None
        return f'( "." {more} )?' if stop else f'"." {more}'

    def _fraction(self, at: int, low: str | None, high: str | None, n: int) -> str | None:
        """Return the expression of at least one more digit of a fraction, the `n`th of it."""
        if low is not None and self._low.is_in and not low[at:].strip("0"):
            low = None  # whatever follows is above it
        if high is not None and not high[at:].strip("0"):
            return None  # whatever follows is above it, but zeros
        if low is None and high is None:
            return f"[0-9]{{1,{max(_FREE_FRACTION - n + 1, 1)}}}"
        if n > _FREE_FRACTION + max(len(self._low_fraction), len(self._high_fraction)):
            return None
        floor = 0 if low is None or at >= len(low) else int(low[at])
        ceiling = 9 if high is None else int(high[at])
        parts = []
        for digit, end in _steps(floor, ceiling, low is not None, high is not None):
            next_low = low if low is not None and digit == floor == end else None
            next_high = high if high is not None and digit == ceiling == end else None
            stop = self._may_stop(at + 1, next_low, next_high)
            more = self._fraction(at + 1, next_low, next_high, n + 1)
            if more is not None:
                parts.append(f"{_digit(digit, end)} ( {more} )?" if stop else f"{_digit(digit, end)} {more}")
            elif stop:
                parts.append(_digit(digit, end))
        return self._grammar.rule(either(parts)) if parts else None

    def _may_stop(self, at: int, low: str | None, high: str | None) -> bool:
        """Whether a number with these digits and zeros behind them lies between the bounds."""
        if low is not None:
            left = low[at:].strip("0")
            if left or not self._low.is_in:
                return False
        if high is not None and self._high is not None:
            return bool(high[at:].strip("0")) or self._high.is_in
        return True


def _digits(value: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _steps(floor: int, ceiling: int, has_floor: bool, has_ceiling: bool) -> list[tuple[int, int]]:
    """Split digits where what follows differs: at the bounds."""
    if floor > ceiling:
        return []
    if floor == ceiling:
        return [(floor, floor)]
    found = [(floor, floor)] if has_floor else []
    begin, end = floor + has_floor, ceiling - has_ceiling
    if begin <= end:
        found.append((begin, end))
    return [*found, (ceiling, ceiling)] if has_ceiling else found


def _digit(low: int, high: int) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"
