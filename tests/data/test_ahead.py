import gc
import itertools
import threading

import pytest

from gemma_jax.data.ahead import ahead


def _threads():
  return [t for t in threading.enumerate() if t.name == "ahead"]


def test_items_arrive_in_order_and_the_thread_ends():
  assert list(ahead(lambda: iter(range(100)), 2)) == list(range(100))
  assert not _threads()


def test_the_producer_runs_ahead_by_no_more_than_the_depth():
  made, room = [], threading.Semaphore(0)

  def make():
    for i in itertools.count():
      made.append(i)
      room.release()
      yield i

  items = ahead(make, 2)
  assert next(items) == 0
  # One is handed over, two wait, one is in the hand.
  for _ in range(4):
    assert room.acquire(timeout=10)
  assert not room.acquire(timeout=0.05)
  assert made == [0, 1, 2, 3]
  items.close()
  assert not _threads()


def test_closing_early_ends_the_thread_and_the_iterator():
  ended = []

  def make():
    try:
      yield from itertools.count()
    finally:
      ended.append(True)

  items = ahead(make, 1)
  assert [next(items), next(items)] == [0, 1]
  assert len(_threads()) == 1
  items.close()
  assert ended == [True]
  assert not _threads()


def test_an_iterator_that_nobody_holds_ends_its_thread():
  items = ahead(itertools.count, 1)
  next(items)
  del items
  gc.collect()
  assert not _threads()


def test_an_error_reaches_the_consumer_after_what_came_before():
  def make():
    yield 1
    raise ValueError("from the thread")

  items = ahead(make, 2)
  assert next(items) == 1
  with pytest.raises(ValueError, match="from the thread"):
    next(items)
  assert not _threads()
