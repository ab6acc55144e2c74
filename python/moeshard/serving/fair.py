"""A queue in which nobody waits for all that somebody else has put in."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

_T = TypeVar("_T")
_Owner = TypeVar("_Owner", bound=Hashable)


class FairQueue(Generic[_T]):
    """Items of several owners: each owner's in their order, the owners by turns."""

    def __init__(self) -> None:
        # The owner whose turn it is comes first; who has nothing is not in it.
        self._of: OrderedDict[Hashable, deque[_T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[_T]:
        for items in self._of.values():
            yield from items

    def add(self, owner: Hashable, item: _T) -> None:
        """Put an item at the end of its owner's."""
        self._of.setdefault(owner, deque()).append(item)

    def pop(self) -> _T:
        """Take the item whose turn it is; the next turn is another owner's, where there is one.

        Raises:
            IndexError: there is none.
        """
        if not self._of:
            raise IndexError("the queue is empty")
        owner, items = self._of.popitem(last=False)
        item = items.popleft()
        if items:
            self._of[owner] = items
        return item

    def remove(self, owner: Hashable, item: _T) -> bool:
        """Take an item out wherever it is; False where it is not there."""
        items = self._of.get(owner)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._of[owner]
        return True


def gives_way(waiting: Mapping[_Owner, int], owner: _Owner) -> _Owner | None:
    """Say whose newest item makes room for one of `owner` in a queue that is full; None: nobody's.

    Args:
        waiting: how many items each owner has in it.
        owner: has the new item.
    """
    greedy = max(waiting, key=waiting.__getitem__, default=None)
    # With one more the new owner would not have more than the other keeps.
    return greedy if greedy is not None and waiting[greedy] > waiting.get(owner, 0) + 1 else None
