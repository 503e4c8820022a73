"""Which files are GPU kernels, what each depends on, and the hash of it all."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def kernel_files(root: Path) -> list[Path]:
    """Files that define a GPU kernel: kernels/*.py with a `_…_kernel` of Triton, csrc/cuda/*.cu."""
    found = []
    for path in sorted((root / "kernels").glob("*.py")):
        if any(_is_kernel(node) for node in ast.parse(path.read_text()).body):
            found.append(path)
    for path in sorted((root / "csrc" / "cuda").glob("**/*.cu")):
        if "__global__" in path.read_text():
            found.append(path)
    return found


def _is_kernel(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(d) for d in node.decorator_list)
    )


def _local_imports(path: Path, root: Path) -> set[Path]:
    if path.suffix == ".py":
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module == "fusedpeft.kernels":
                    names |= {alias.name for alias in node.names}
                elif node.module.startswith("fusedpeft.kernels."):
                    names.add(node.module.rsplit(".", 1)[1])
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("fusedpeft.kernels."):
                        names.add(alias.name.rsplit(".", 1)[1])
        candidates = [root / "kernels" / f"{name}.py" for name in names]
        return {p for p in candidates if p.is_file()}
    found = set()
    for name in _INCLUDE.findall(path.read_text()):
        for folder in (path.parent, root / "csrc", root / "csrc" / "cuda"):
            if (folder / name).is_file():
                found.add((folder / name).resolve())
                break
    return found


def closure(path: Path, root: Path) -> list[Path]:
    """The file and every file of the project that it includes or imports, at any depth."""
    seen, todo = set(), [path.resolve()]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += _local_imports(here, root.resolve())
    return sorted(seen)


def source_hash(path: Path, root: Path) -> str:
    """SHA-256 over the file and what it depends on: a retuned table changes its kernel too."""
    digest = hashlib.sha256()
    for part in closure(path, root):
        digest.update(str(part.relative_to(root.resolve())).encode() + b"\0")
        digest.update(part.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def code_hash(op: str, root: Path) -> str:
    """SHA-256 of what ahead-of-time compilation of `op` depends on: its kernels, tables and specs,
    as syntax trees, so that a comment or a docstring changes nothing."""
    starts = (root / "kernels" / f"{op}_{end}.py" for end in ("aot", "tables"))
    parts = sorted({part for start in starts for part in closure(start, root)})
    digest = hashlib.sha256()
    for part in parts:
        if part.name == "aot.py":  # the tool, and the list of the ops
            continue
        tree = ast.parse(part.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]):
                del body[0]
        digest.update(part.name.encode() + b"\0" + ast.dump(tree).encode() + b"\0")
    return digest.hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


def hashes(root: Path) -> dict[str, str]:
    """Repository path of each kernel file -> its hash now."""
    return {str(p.relative_to(root)): source_hash(p, root) for p in kernel_files(root)}


def covers(stem: str, root: Path) -> set[str]:
    """The kernel files that test_<stem>.py, or the rows in <stem>.json, speak for.

    By name: kernels/<stem>.py and the kernels it imports, and csrc/cuda/<stem>.cu where no Triton
    file has that name. An ending `_gpu` says nothing; `_cuda` means the .cu file.
    """
    name = stem.removesuffix("_gpu").removesuffix("_cuda")
    kernels = {p.resolve() for p in kernel_files(root)}
    triton, cuda = root / "kernels" / f"{name}.py", root / "csrc" / "cuda" / f"{name}.cu"
    start = triton if triton.is_file() and not stem.endswith("_cuda") else cuda
    if not start.is_file():
        return set()
    return {str(p.relative_to(root.resolve())) for p in closure(start, root) if p in kernels}
