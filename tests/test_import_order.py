"""Arrows point down: a module imports only modules of lower layers or of its own package, and nothing heavy early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Layer by layer, lowest first. A name stands for the module or package moeref.NAME and what lies in it; the longest
# name that fits counts. Modules of one layer do not import each other, unless they lie in one package.
LAYERS = [
    ["spec"],
    ["workloads", "draw", "quant", "inputs"],
    ["suites", "routings", "values", "reference"],
    ["make"],
    ["judge", "reference_cost"],
    ["diagnose", "interop"],
    ["testing.strategies"],
    ["verify"],
    ["ranks", "verify_data_set", "explain"],
    ["golden", "bench"],
    ["report", "testing"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Third-party packages, and the modules that may import them at all, at the top or in a function.
ONLY_IN = {
    "hypothesis": ("testing",),
    "pytest": ("testing",),
    "typer": ("cli", "commands"),
    "rich": ("commands", "report"),
    "jinja2": ("report",),
    "matplotlib": ("report",),
    "safetensors": ("golden", "interop"),
    "flashinfer_bench": ("interop",),
    "flashinfer": (),
    "sglang": (),
    "triton": (),
    "moe_fast": (),
}

# No torch when these are imported: names, tables and the command line answer at once.
WITHOUT_TORCH = ["spec", "workloads", "suites", "draw", "routings", "values", "interop.candidates", "cli"]


def modules() -> dict[str, Path]:
    """Every module of moeref by its name without the leading 'moeref.'; a package by its own name."""
    found = {}
    for path in sorted((ROOT / "moeref").rglob("*.py")):
        parts = path.relative_to(ROOT / "moeref").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imported(path: Path, package: str) -> set[str]:
    """Full names of all modules that a file imports, wherever in it: at the top, in functions, for type checking.

    `from moeref.judge import verdict` may mean a module or a name: both moeref.judge and moeref.judge.verdict.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import; moeref imports by full name"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_name(module: str) -> str | None:
    """The longest name of the table that the module is or lies in."""
    fitting = [name for name in LAYER if module == name or module.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("module", modules())
def test_arrows_point_down(module: str) -> None:
    own = layer_name(module)
    assert own is not None, f"moeref.{module} is in no layer: add it to LAYERS where it belongs"
    known = modules()
    for name in imported(known[module], module):
        target = name.removeprefix("moeref.")
        if target == name or target not in known:
            continue
        other = layer_name(target)
        assert other is not None, f"moeref.{target} is in no layer"
        same_package = target.split(".")[0] == module.split(".")[0] and LAYER[other] <= LAYER[own]
        assert LAYER[other] < LAYER[own] or same_package, f"moeref.{module} must not import moeref.{target}"


@pytest.mark.parametrize("module", modules())
def test_third_party_packages_are_imported_only_where_they_are_used(module: str) -> None:
    for name in imported(modules()[module], module):
        allowed = ONLY_IN.get(name.split(".")[0])
        if allowed is not None:
            assert any(module == place or module.startswith(f"{place}.") for place in allowed), (
                f"moeref.{module} must not import {name}"
            )


def test_spec_needs_the_standard_library_only() -> None:
    for module in ("spec", "workloads", "suites"):
        for name in imported(modules()[module], module):
            first = name.split(".")[0]
            assert first in sys.stdlib_module_names or first == "moeref", f"moeref.{module} imports {name}"


def loaded_by(code: str) -> set[str]:
    """Top-level names in sys.modules after running code in a new interpreter."""
    script = f"import sys\n{code}\nprint('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("LOADED", 1)[1].split())


def test_names_tables_and_the_command_line_load_no_torch() -> None:
    loaded = loaded_by("".join(f"import moeref.{name}\n" for name in WITHOUT_TORCH))
    assert not loaded & {"torch", "triton", "hypothesis", "flashinfer", "sglang", "moe_fast"}


def test_help_loads_no_torch() -> None:
    loaded = loaded_by(
        "from moeref.cli import main\nsys.argv = ['moeref', '--help']\ntry:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert "moeref" in loaded and "torch" not in loaded


def test_the_core_and_the_judge_load_nothing_optional() -> None:
    core = ["make", "reference", "judge.verdict", "verify"]
    loaded = loaded_by("".join(f"import moeref.{name}\n" for name in core))
    assert "torch" in loaded
    assert not loaded & {"hypothesis", "pytest", "flashinfer", "sglang", "moe_fast", "typer", "rich", "jinja2"}
