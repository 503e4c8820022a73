"""fusedpeft: parameter-efficient fine-tuning at the cost of the frozen model."""

__version__ = "0.1.0"
