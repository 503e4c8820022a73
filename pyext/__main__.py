"""`python -m fusedpeft`."""

from fusedpeft.cli import main

main()
