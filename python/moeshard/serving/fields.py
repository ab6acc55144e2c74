"""Reading the fields of a request's JSON: each typed and in its range, or an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moeshard.serving.errors import invalid

MAX_INT = 2**31 - 1


def parse_object(body: bytes) -> dict[str, Any]:
    """Read the JSON object of a request's body.

    Raises:
        ApiError: it is none, or holds NaN, an infinity, or half of a surrogate pair.
    """

    def refuse(constant: str) -> NoReturn:
        raise invalid(f"The body is not JSON: it holds {constant}.")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise invalid("The body is nested too deeply.") from error
    except ValueError as error:
        raise invalid(f"The body is not JSON in UTF-8: {error}.") from error
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.")
    if b"\\u" in body:
        # JSON can write half of a surrogate pair, which is no character: nothing behind this line has to expect it.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise invalid("The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from error
    return value


class Fields:
    """The fields of an object, taken one by one; ``null`` is as good as absent."""

    def __init__(self, source: Mapping[str, Any], where: str = ""):
        self._source, self._where = source, where
        self.taken: set[str] = set()

    def place(self, name: str) -> str:
        """Return how an error names a field."""
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        """Return the value, None where there is none."""
        self.taken.add(name)
        return self._source.get(name)

    def given(self, name: str) -> bool:
        return self._source.get(name) is not None

    def left(self) -> list[str]:
        """Return the names of fields that nobody took."""
        return sorted(set(self._source) - self.taken)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Take a number from `low` to `high`."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise invalid(f"{self.place(name)} must be a number.", self.place(name))
        if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
            raise invalid(f"{self.place(name)} must be from {low:g} to {high:g}, got {value}.", self.place(name))
        return float(value)

    def integer(self, name: str, default: int, low: int = 0, high: int = MAX_INT) -> int:
        """Take an integer from `low` to `high`."""
        value = self.raw(name)
        return default if value is None else self.check_integer(value, name, low, high)

    def check_integer(self, value: Any, name: str, low: int, high: int) -> int:
        """Return the value if it is an integer in this range."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON does not tell 1.0 from 1
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"{self.place(name)} must be an integer.", self.place(name))
        if not low <= value <= high:
            raise invalid(f"{self.place(name)} must be from {low} to {high}, got {value}.", self.place(name))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(f"{self.place(name)} must be true or false.", self.place(name))
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise invalid(f"{self.place(name)} must be a string.", self.place(name))
        return value

    def needed_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise invalid(f"{self.place(name)} is missing.", self.place(name))
        return value

    def array(self, name: str) -> Sequence[Any]:
        value = self.raw(name)
        if value is None:
            raise invalid(f"{self.place(name)} is missing.", self.place(name))
        if not isinstance(value, list):
            raise invalid(f"{self.place(name)} must be an array.", self.place(name))
        return value

    def inner(self, name: str) -> Fields | None:
        """Take an object."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(f"{self.place(name)} must be an object.", self.place(name))
        return Fields(value, self.place(name))

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """Refuse a field that would change the answer and cannot be heeded, unless it asks for what is done anyway."""
        value = self.raw(name)
        if value is not None and value not in harmless:
            raise invalid(f"{self.place(name)}: {why}", self.place(name), "unsupported_parameter")
