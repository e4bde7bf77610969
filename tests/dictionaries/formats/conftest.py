"""The marker of tests that run other libraries in an environment of theirs."""


def pytest_configure(config):
  config.addinivalue_line(
    "markers",
    "peers: runs SAELens, dictionary_learning and sparsify with the Python "
    "that GEMMA_JAX_PEERS_PYTHON names",
  )
