"""Build: maps the source folders to packages; the extension is added below."""

from setuptools import find_packages, setup

sub = find_packages("pyext")
setup(
    packages=["fusedpeft", *[f"fusedpeft.{p}" for p in sub], "fusedpeft.kernels", "fusedpeft.bench"],
    package_dir={"fusedpeft": "pyext", "fusedpeft.kernels": "kernels", "fusedpeft.bench": "bench"},
    include_package_data=True,
)
