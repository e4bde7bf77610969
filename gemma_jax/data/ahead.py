"""An iterator that is computed ahead, in a thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


def ahead(make: Callable[[], Iterator[Any]], depth: int) -> Iterator[Any]:
  """Iterates in another thread, so that its work overlaps with the consumer's.

  The thread starts with the first item and has ended when the iterator has:
  at its end, by `close()`, or when nobody holds it any more.

  Args:
    make: makes the iterator, called in the thread.
    depth: how many items it may be ahead.

  Raises:
    Exception: whatever the iterator raises, at the place of the next item.
  """
  results: queue.Queue = queue.Queue(depth)
  stop = threading.Event()
  # It gets nothing that leads back to this generator, which could then never
  # be collected.
  thread = threading.Thread(
    target=_produce, args=(make, results, stop), name="ahead", daemon=True
  )
  thread.start()
  try:
    while True:
      item, error = results.get()
      if error is not None:
        raise error
      if item is None:
        return
      yield item
  finally:
    stop.set()
    # A producer that waits for room finds some, and then that it is to stop.
    with contextlib.suppress(queue.Empty):
      while True:
        results.get_nowait()
    # The garbage collector may run this in any thread.
    if thread is not threading.current_thread():
      thread.join()


def _produce(make, results: queue.Queue, stop: threading.Event) -> None:
  try:
    for item in make():
      results.put((item, None))
      if stop.is_set():
        return
  except BaseException as error:
    results.put((None, error))
  else:
    results.put((None, None))
