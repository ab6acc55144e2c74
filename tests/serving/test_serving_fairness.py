"""Who asks a lot makes nobody else wait for all of it, nor leaves them without a place in the queue."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import pairwise

import httpx
from conftest import Application
from hypothesis import given
from hypothesis import strategies as st
from running import Running

from moeshard.serving.auth import Keys
from moeshard.serving.fair import FairQueue, gives_way
from moeshard.serving.settings import Settings


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=40))
def test_owners_are_served_by_turns_and_each_in_its_order(items: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for item in items:
        queue.add(item[0], item)
    assert len(queue) == len(items) and sorted(queue) == sorted(items)
    found = [queue.pop() for _ in items]
    assert len(queue) == 0
    for owner in "abc":
        own = [item for item in items if item[0] == owner]
        assert [item for item in found if item[0] == owner] == own
        # Between two of an owner each other one that waits has exactly one turn.
        places = [index for index, item in enumerate(found) if item[0] == owner]
        for a, b in pairwise(places):
            between = [item[0] for item in found[a + 1 : b]]
            assert len(between) == len(set(between))
            waiting = {item[0] for item in found[b:]} - {owner}
            assert waiting <= set(between)


def test_items_are_taken_out_from_the_middle() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in range(6):
        queue.add(item % 2, item)
    assert queue.remove(1, 3) and not queue.remove(1, 3) and not queue.remove(7, 0)
    assert [queue.pop() for _ in range(5)] == [0, 1, 2, 5, 4]
    queue.add("a", 1)
    assert queue.remove("a", 1) and len(queue) == 0


def test_only_who_has_more_gives_way() -> None:
    assert gives_way({"a": 4}, "b") == "a"
    assert gives_way({"a": 3, "b": 1}, "b") == "a"
    assert gives_way({"a": 2, "b": 1}, "b") is None  # it would then have more than the other
    assert gives_way({"a": 4}, "a") is None and gives_way({}, "a") is None


def test_a_key_that_floods_starves_nobody(application: Application) -> None:
    """One slot, six places: a flood of one key, then one request of another."""
    settings = Settings(keys=Keys(["flood", "other"]))
    running = Running(lambda: application(False, settings, n_slots=1, n_waiting=6)[0])
    done: deque[str] = deque()

    async def ask(client: httpx.AsyncClient, key: str, n: int) -> int:
        body = {"prompt": f"Once {n}", "max_tokens": 150, "ignore_eos": True}
        headers = {"authorization": f"Bearer {key}"}
        answer = await client.post(f"{running.url}/v1/completions", json=body, headers=headers)
        done.append(f"{key} {answer.status_code}")
        return answer.status_code

    async def flood() -> list[int]:
        async with httpx.AsyncClient(timeout=120) as client:
            tasks = [asyncio.ensure_future(ask(client, "flood", n)) for n in range(9)]
            while "flood 429" not in done:
                await asyncio.sleep(0.005)
            others = [await ask(client, "other", n) for n in range(2)]
            return [*await asyncio.gather(*tasks), *others]

    try:
        codes = asyncio.run(flood())
    finally:
        running.stop()
    assert codes[-2:] == [200, 200]
    # Room was made by a request of the flood, and the other key did not wait for what stood before it.
    assert codes[:-2].count(200) >= 5 and codes.count(429) >= 2
    assert list(done).index("other 200") <= 5 and done.count("other 200") == 2
    assert done[-1] == "flood 200"
