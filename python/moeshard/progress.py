"""What long work calls to say how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with what is done and with the whole, both in the unit of the work (bytes, tokens, windows); what it raises
ends the work."""
StageProgress = Callable[[str, float], object]
"""Called with a word for what is being done and the fraction of it that is, 0 to 1; what it raises ends the work."""
StepProgress = Callable[[str, int, int], object]
"""Called with a word for what is being done, and how many steps of how many are behind it."""
