"""Build: maps the source folders to packages and compiles `fusedpeft._C` with ninja.

The CPU half is always built; the CUDA half as FUSEDPEFT_CUDA says: `auto` (where nvcc is found),
`1` (required), `0` (left out). FUSEDPEFT_CUDA_ARCHS lists its architectures, default
`80;86;89;90a`; PTX of the last one, without its letter, serves later GPUs. CXX, NVCC, CXXFLAGS and
MAX_JOBS are honoured. `fusedpeft doctor` shows what was built.

The extension links neither libtorch nor libgomp nor a shared CUDA runtime, so that one build serves
every torch: tensors cross as integers, the OpenMP symbols resolve to the libgomp that `import
torch` has loaded (a second one would fight it for the cores), and cudart is linked statically.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = "80;86;89;90a"
WARNINGS = "-Wall -Wextra"
CXXFLAGS = f"-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden {WARNINGS}"
NVCCFLAGS = "-std=c++17 -O3 -cudart static -Xptxas -warn-spills"
RULES = """\
builddir = {objects}
rule cxx
  command = {cxx} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $in
rule cuda
  command = {cuda} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $in
rule link
  command = {link} -shared $in -o $out
  description = link $out
"""


def fail(message: str) -> NoReturn:
    """Stops the build with one line: pip and setup.py print it without a traceback."""
    raise SystemExit(f"fusedpeft: {message}")


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip()


def find_cxx() -> tuple[str, str]:
    """(path, version line) of the C++ compiler: CXX, else g++."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        fail(f"expected a C++ compiler, found no {name!r}; install g++ or set CXX")
    version = first_line(path, "--version")
    if "clang" in version:
        fail(f"expected GCC, got {version!r}: its OpenMP is not the libgomp that torch has loaded")
    return path, version


def find_nvcc() -> tuple[str, str] | None:
    """(path, version) of nvcc: NVCC, PATH, CUDA_HOME, /usr/local/cuda; None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{h}/bin" for h in homes if h)]
    path = shutil.which(os.environ.get("NVCC") or "nvcc", path=os.pathsep.join(places))
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    version = re.search(r"\bV(\d[\d.]*)", done.stdout)
    if version is None:
        fail(f"expected nvcc, but `{path} --version` says {(done.stdout + done.stderr)[:200]!r}")
    return path, version[1]


def cuda_choice() -> tuple[str, str, list[str]] | None:
    """(nvcc, version, architectures) as FUSEDPEFT_CUDA says, or None; prints what it chose."""
    wish = os.environ.get("FUSEDPEFT_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        fail(f"FUSEDPEFT_CUDA: expected auto, 0 or 1, got {wish!r}")
    nvcc = None if wish == "0" else find_nvcc()
    if nvcc is None and wish == "1":
        fail("FUSEDPEFT_CUDA=1: found no nvcc; put it on PATH, or set NVCC or CUDA_HOME")
    if nvcc is None:
        why = "FUSEDPEFT_CUDA=0" if wish == "0" else "found no nvcc"
        print(f"fusedpeft: CPU half only ({why})", flush=True)
        return None
    archs = re.split(r"[;,\s]+", os.environ.get("FUSEDPEFT_CUDA_ARCHS") or DEFAULT_ARCHS)
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            fail(f"FUSEDPEFT_CUDA_ARCHS: expected a list as {DEFAULT_ARCHS}, got {arch!r}")
    path, version = nvcc
    print(f"fusedpeft: CPU and CUDA halves ({path} {version}, {';'.join(archs)} + PTX)", flush=True)
    return path, version, archs


def gencode(archs: list[str]) -> str:
    """nvcc's flags: machine code of each architecture, and PTX of the last for later ones."""
    last = archs[-1].rstrip("af")
    pairs = [(a, f"sm_{a}") for a in archs] + [(last, f"compute_{last}")]
    return " ".join(f"-gencode=arch=compute_{a},code={code}" for a, code in pairs)


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    path = shutil.which("ninja", path=os.pathsep.join([BIN_DIR, os.environ.get("PATH", "")]))
    return path or fail("expected ninja; pip install ninja")


def info_header(compiler: str, nvcc: str | None, archs: str | None) -> str:
    """What `native.build_info()` reports."""

    def text(value: str | None) -> str:
        return "nullptr" if value is None else '"' + re.sub(r'["\\]', "", value) + '"'

    return (
        f"#define FUSEDPEFT_CUDA {int(nvcc is not None)}\n"
        f"#define FUSEDPEFT_CUDA_ARCHS {text(archs)}\n"
        f"#define FUSEDPEFT_NVCC {text(nvcc)}\n"
        f"#define FUSEDPEFT_COMPILER {text(compiler)}\n"
    )


def write_if_changed(path: Path, content: str) -> None:
    if not path.is_file() or path.read_text() != content:
        path.write_text(content)


class NinjaBuild(build_ext):
    """Objects in parallel, each again only when its sources, headers or flags changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cxx, compiler = find_cxx()
        cuda = cuda_choice()
        # A place of its own: pip's temporary folders would build everything again each time.
        objects = Path("build", "_C" + sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so"))
        objects.mkdir(parents=True, exist_ok=True)
        nvcc, version, archs = cuda or (None, None, None)
        listed = f"{';'.join(archs)}+PTX" if archs else None
        write_if_changed(objects / "build_info.h", info_header(compiler, version, listed))

        places = [shlex.quote(p) for p in (pybind11.get_include(), sysconfig.get_path("include"))]
        include = " ".join(["-Icsrc", f"-I{objects}", *(f"-isystem {p}" for p in places)])
        compile_cuda, link = "false", cxx
        if cuda:
            host = "-fPIC,-fvisibility=hidden," + WARNINGS.replace(" ", ",")
            compile_cuda = f"{nvcc} -ccbin {cxx} {NVCCFLAGS} -Xcompiler={host} {gencode(archs)}"
            # nvcc as the linker knows where its own static runtime lies.
            link = f"{nvcc} -ccbin {cxx} -cudart static"
        lines = [
            RULES.format(
                objects=objects,
                cxx=f"{cxx} {CXXFLAGS} {os.environ.get('CXXFLAGS', '')} {include}",
                cuda=f"{compile_cuda} {include}",
                link=link,
            )
        ]
        rules = {".cpp": "cxx", ".cu": "cuda"} if cuda else {".cpp": "cxx"}
        made = []
        for source in map(Path, ext.sources):
            if source.suffix in rules:
                made.append(f"{objects / '_'.join(source.parts)}.o")
                lines.append(f"build {made[-1]}: {rules[source.suffix]} {source}")
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        linked = objects / out.name
        lines.append(f"build {linked}: link {' '.join(made)}\n")
        (objects / "build.ninja").write_text("\n".join(lines))

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run([find_ninja(), "-f", str(objects / "build.ninja"), *jobs])
        if done.returncode:
            fail("compiling fusedpeft._C failed; the compiler's message is above")
        self.copy_file(str(linked), str(out))


places = {"fusedpeft": "pyext", "fusedpeft.kernels": "kernels", "fusedpeft.bench": "bench"}
sources = ["csrc/bindings.cpp"]
sources += sorted(str(p) for half in ("cpu/*.cpp", "cuda/*.cu") for p in Path("csrc").glob(half))
setup(
    packages=[*places, *(f"fusedpeft.{p}" for p in find_packages("pyext"))],
    package_dir=places,
    include_package_data=True,
    ext_modules=[Extension("fusedpeft._C", sources)],
    cmdclass={"build_ext": NinjaBuild},
)
