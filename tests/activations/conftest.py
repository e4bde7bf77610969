"""A tiny model, and where stores are written: a path, memory, an S3 server."""

import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from gemma_jax import models
from gemma_jax.activations import layout

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def model(one_device):
  """A random Gemma 2, on one device."""
  return models.load_model("random:gemma2-tiny", mesh=one_device)


@pytest.fixture
def small(monkeypatch):
  """Shards of 64 rows and chunks of 16, so that few rows are many shards."""
  monkeypatch.setattr(layout, "SHARD_ROWS", 64)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 16)


@pytest.fixture(scope="session")
def bucket():
  """The URL of an empty bucket of a server that speaks S3."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
  port = url.rpartition(":")[2]
  server = subprocess.Popen(
    [sys.executable, "-m", "moto.server", "-p", port],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    _wait_for(url, server)
    make = urllib.request.Request(f"{url}/bucket", method="PUT")
    urllib.request.urlopen(make, timeout=10).close()
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("AWS_ENDPOINT_URL", url)
      patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
      patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
      # Nobody's own settings, and no search for them on the network.
      patch.setenv("AWS_CONFIG_FILE", os.devnull)
      patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
      patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
      yield "s3://bucket"
  finally:
    server.kill()
    server.wait()


def _wait_for(url: str, server: subprocess.Popen) -> None:
  until = time.monotonic() + 60
  while True:
    try:
      urllib.request.urlopen(url, timeout=10).close()
      return
    except OSError:
      if server.poll() is not None or time.monotonic() > until:
        raise
      time.sleep(0.05)


@pytest.fixture(params=["path", "memory", "s3"])
def place(request, tmp_path):
  """Where a store may be made, in each of the ways of saying so."""
  if request.param == "path":
    return str(tmp_path / "store")
  if request.param == "memory":
    return f"memory://tests/{next(_NUMBERS)}"
  return f"{request.getfixturevalue('bucket')}/tests/{next(_NUMBERS)}"
