"""Helpers of the runner's tests: candidates that behave in every bad way, and a worker that runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moeref.inputs import Inputs
from moeref.interop.runner import CandidateRun, Runner
from moeref.make import make_inputs
from moeref.spec import Problem

NAME = "small-t9-o8-iid-model_like-s0"
TEN = "logits, bias, x, x_scale, w1, w1_scale, w2, w2_scale, offset, factor"
GROUPS = "n_group, topk_group, top_k"

# One file holds them all. `chosen` does as the one whose number is the scaling factor, so that one process serves many.
FILE = f"""
import ctypes, os, sys, threading, time
import numpy
import torch
from moeref.inputs import Inputs
from moeref.reference import moe
from moeref.spec import Geometry

def right({TEN}, *, {GROUPS}):
    g = Geometry(logits.shape[1], w2.shape[0], w2.shape[1], w2.shape[2], top_k, n_group, topk_group)
    return moe(Inputs({TEN}, g)).output

def right_out({TEN}, out, *, {GROUPS}):
    out.copy_(right({TEN}, n_group=n_group, topk_group=topk_group, top_k=top_k))

def trace({TEN}, *, {GROUPS}):
    g = Geometry(logits.shape[1], w2.shape[0], w2.shape[1], w2.shape[2], top_k, n_group, topk_group)
    return moe(Inputs({TEN}, g))

def zeros(x):
    return torch.zeros(x.shape, dtype=torch.bfloat16)

def raises(*ten): raise ValueError("this is\\nmine")
def exits(*ten): sys.exit(3)
def interrupts(*ten): raise GeneratorExit
def os_exits(*ten): os._exit(7)
def segfaults(*ten): ctypes.string_at(0)
def aborts(*ten): os.abort()
def kills(*ten): os.kill(os.getpid(), 9)
def hangs(*ten): time.sleep(600)
def hangs_printing(*ten):
    while True: print("x" * 1000)
def nothing(*ten): return None
def number(*ten): return 3.5
def pair(*ten): return zeros(ten[2]), 1
def array(*ten): return numpy.zeros(ten[2].shape)
def sparse(*ten): return torch.zeros(9, 256).to_sparse()
def meta(*ten): return torch.zeros(9, 256, device="meta")
def wrong_shape(*ten): return torch.zeros(3, 5, dtype=torch.float64)
def enormous(*ten): return torch.zeros(1, dtype=torch.bfloat16).expand(1 << 20, 1 << 20)
def transposed(*ten): return torch.zeros(256, 9, dtype=torch.bfloat16).T
def with_gradient(*ten): return zeros(ten[2]).requires_grad_()
def too_few(a, b): return a
def memory(*ten): return torch.empty(1 << 60)

def prints(*ten):
    for i in range(200000): print("line", i)
    print("to stderr", file=sys.stderr)
    raise RuntimeError("after printing")

def closes(*ten):
    for fd in (1, 2):
        try: os.close(fd)
        except OSError: pass
    return zeros(ten[2])

def closes_everything(*ten):
    os.closerange(0, 1000)
    time.sleep(600)

def threads(*ten):
    for daemon in (True, False):
        threading.Thread(target=time.sleep, args=(600,), daemon=daemon).start()
    return zeros(ten[2])

def children(*ten):
    import subprocess
    child = subprocess.Popen(["sleep", "600"])
    raise RuntimeError(f"child {{child.pid}}")

def forks(*ten):
    if os.fork() == 0:
        time.sleep(600)
    os._exit(7)

def mutates({TEN}):
    bias += 1
    w1.view(torch.uint8)[3, 5, 7] ^= 1
    return zeros(x)

def mutates_nothing({TEN}):
    bias.copy_(bias.clone())
    return zeros(x)

def reshapes({TEN}):
    logits.t_(); x.resize_(1, 1)
    return torch.zeros(9, 256, dtype=torch.bfloat16)

def view({TEN}): return w2.view(torch.bfloat16)[0, :9, :]
def numpy_view({TEN}): return torch.from_numpy(x_scale.numpy().view(numpy.int16)).view(torch.bfloat16)

STATIC = {{}}
def static({TEN}):
    if 0 not in STATIC: STATIC[0] = zeros(x)
    return STATIC[0]

def late({TEN}, out):
    if 1 in STATIC: STATIC[1].fill_(5)
    STATIC[1] = out.zero_()

def ignores_out({TEN}, out): return zeros(x)

def keeps_poison({TEN}, out): out[1:] = 0

def random({TEN}): return torch.randn(x.shape).bfloat16()
random.MOEREF = {{"deterministic": True, "recipe": "requant"}}

def chosen({TEN}): return FUNCTIONS[int(factor)]({TEN})

FUNCTIONS = [value for value in list(globals().values()) if getattr(value, "__module__", "") == __name__]
"""
NAMES = re.findall(r"^def (\w+)", FILE, re.M)


@dataclass
class Case:
    inputs: Inputs
    file: Path
    worker: Runner  # runs `chosen`

    def here(self, function: str, trials: int = 1) -> CandidateRun:
        """In this process."""
        with Runner(f"{self.file}:{function}", isolate=False) as runner:
            return runner.run(self.inputs, trials=trials)

    def there(self, function: str) -> CandidateRun:
        """In the worker that most tests share."""
        return self.worker.run(replace(self.inputs, routed_scaling_factor=float(NAMES.index(function))))


@contextmanager
def case_in(file: Path) -> Iterator[Case]:
    """Candidates in this file, and a worker for them; in the end no input has changed."""
    file.write_text(FILE)
    inputs = make_inputs(Problem.parse(NAME))
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    with Runner(f"{file}:chosen", timeout=1, load_timeout=60) as worker:
        yield Case(inputs, file, worker)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
