"""The one cache of seen messages: bounded by bytes, what was used lately stays, and it is freed with its engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from agentmem.messages import MessageCache


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    cache = MessageCache(20_000)
    cache.put("used", 1, 100)
    cache.put("unused", 2, 100)
    for number in range(200):
        cache.put(number, number, 100)
        assert cache.get("used") == 1
    assert cache.get("unused") is None
    assert cache.get(199) == 199
    assert cache.get_all([199, "unused", "used"]) == [199, None, 1]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4000)), max_size=80))
def test_it_never_takes_more_than_its_limit(entries: list[tuple[int, int]]) -> None:
    cache = MessageCache(10_000)
    for key, size in entries:
        cache.put(key, key, size)
        assert cache.size <= 10_000
        assert cache.get(key) == key
        assert cache.size <= 10_000
    cache.put("half of the limit", 1, 5_000)
    assert cache.get("half of the limit") is None


def test_many_threads_use_it_at_once() -> None:
    cache = MessageCache(50_000)

    def work(seed: int) -> bool:
        rng = Random(seed)
        for _ in range(2000):
            key = rng.randrange(400)
            if cache.get(key) not in (None, key):
                return False
            cache.put(key, key, rng.randrange(300))
        return cache.size <= 50_000

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
