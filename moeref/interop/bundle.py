"""A replay bundle: one problem's inputs, what a candidate and the reference answered, and a script that compares.

The folder can be copied anywhere: its script needs torch and safetensors' file alone, not moeref.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeref.inputs import FIELDS, Inputs
from moeref.spec import SpecError

SCRIPT = '''"""Run a candidate on this bundle: python replay.py [FILE.py:FUNCTION]. Needs torch alone."""
import importlib.util, json, pathlib, struct, sys
import torch

HERE = pathlib.Path(__file__).parent
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
raw = (HERE / "tensors.safetensors").read_bytes()
size = struct.unpack("<Q", raw[:8])[0]
header = {k: v for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"}
tensors = {}
for name, entry in header.items():
    start, stop = (8 + size + offset for offset in entry["data_offsets"])
    octets = torch.frombuffer(bytearray(raw[start:stop]), dtype=torch.uint8) if stop > start else torch.empty(0)
    tensors[name] = octets.view(KINDS[entry["dtype"]]).reshape(entry["shape"])
about = json.loads((HERE / "about.json").read_text())
output = tensors.get("candidate_output")
if len(sys.argv) > 1:
    file, function = sys.argv[1].rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("candidate", file)
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    output = getattr(module, function)(*(tensors.get(name, about["scalars"].get(name)) for name in about["arguments"]))
reference = tensors["reference_output"].float()
error = (output.float() - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-30)
print(about["problem"], "rows off by more than 5 percent:", (~(error <= 0.05)).nonzero().flatten().tolist())
'''
"""Reads safetensors by hand: eight bytes of length, a JSON header, the tensors' bytes."""


def write_bundle(
    folder: Path, problem: str, candidate: str, inputs: Inputs, outputs: Sequence[Any], reference: torch.Tensor
) -> list[Path]:
    """Write tensors.safetensors, about.json and replay.py into `folder`, made if need be; the paths.

    inputs: on the CPU. outputs: what the candidate returned, call by call; those that are tensors are kept.
    reference: [T, H] bfloat16. Raises SpecError where the folder holds something else already.
    """
    names = ("tensors.safetensors", "about.json", "replay.py")
    if folder.exists() and (not folder.is_dir() or any(one.name not in names for one in folder.iterdir())):
        raise SpecError(f"--bundle {folder}: expected a new or empty folder, found other files in it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in inputs.tensors().items()}
    tensors["reference_output"] = reference.contiguous()
    kept = [one for one in outputs if isinstance(one, torch.Tensor)]
    for count, one in enumerate(kept):
        tensors["candidate_output" if not count else f"candidate_output_{count + 1}"] = one.cpu().contiguous()
    about = {
        "problem": problem,
        "candidate": candidate,
        "arguments": list(FIELDS),
        "scalars": {name: getattr(inputs, name) for name in FIELDS[8:]},
        "geometry": inputs.geometry.code,
        "environment": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        },
    }
    paths = [folder / name for name in names]
    save_file(tensors, paths[0])
    paths[1].write_text(json.dumps(about, indent=1) + "\n")
    paths[2].write_text(SCRIPT)
    return paths
