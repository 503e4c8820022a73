"""What stops a bench; its own module, so that `fusedpeft --help` need not import torch."""


class BenchMismatch(RuntimeError):
    """An implementation disagrees with float64: nothing is timed, nothing is written."""
