"""Signatures of other libraries' functions, from the installed packages, or as recorded in tests/signatures.json.

`python tests/real_signatures.py NAME...` prints the record's entries of dotted names, for the packages installed here.
A package that can't be imported without a GPU is read by its source.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from pathlib import Path

RECORD = Path(__file__).with_name("signatures.json")

DISTRIBUTIONS = {
    "flashinfer": ("flashinfer-python",),
    "sgl_kernel": ("sglang-kernel", "sgl-kernel"),
    "sglang": ("sglang",),
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
}
"""Top-level module -> distributions that may hold it."""


def version_of(dotted: str) -> str | None:
    """The installed distribution and version that a dotted name belongs to; None where it is not installed."""
    module = dotted.split(".")[0]
    if importlib.util.find_spec(module) is None:
        return None
    for name in DISTRIBUTIONS[module]:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{module}, version unknown"


def installed(dotted: str) -> inspect.Signature | None:
    """The signature of an installed function, by importing it, else from its source; None where it has none such."""
    module, _, name = dotted.rpartition(".")
    try:
        return inspect.signature(getattr(importlib.import_module(module), name))
    except Exception:  # whatever an import without a GPU raises
        return from_source(module, name)


def from_source(module: str, name: str) -> inspect.Signature | None:
    """The signature of the def `name` in the module's own file, for a package in its top files; None without one."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    own = package.joinpath(*rest)
    files = [own.with_suffix(".py")] if rest else [package / "__init__.py", *sorted(package.glob("*.py"))]
    for file in files:
        found = _definition(file, name) if file.is_file() else None
        if found is not None:
            return found
    return None


def _definition(file: Path, name: str) -> inspect.Signature | None:
    text = file.read_text(encoding="utf-8")
    if f"def {name}(" not in text:
        return None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
            node.args.kw_defaults = [d and ast.Constant(None) for d in node.args.kw_defaults]
            return parse(f"({ast.unparse(node.args)})")
    return None


def parse(text: str) -> inspect.Signature:
    """'(a, b=None, *, c)' -> a Signature."""
    scope: dict[str, object] = {}
    exec(f"def function{text}: ...", scope)
    return inspect.signature(scope["function"])  # type: ignore[arg-type]


def bare(signature: inspect.Signature) -> str:
    """A signature's text without annotations, every default None: what the record holds."""
    plain = [
        parameter.replace(
            annotation=parameter.empty, default=parameter.empty if parameter.default is parameter.empty else None
        )
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def recorded() -> dict[str, dict[str, str]]:
    """Dotted name -> {"of": distribution and version, "signature"}."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


if __name__ == "__main__":
    entries = {}
    for wanted in sys.argv[1:]:
        signature = installed(wanted) if version_of(wanted) else None
        if signature is not None:
            entries[wanted] = {"of": version_of(wanted), "signature": bare(signature)}
    print(json.dumps(entries, indent=1))
