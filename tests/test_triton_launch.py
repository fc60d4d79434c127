"""A launch goes to the kernel that was compiled for it, and to no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_fast.kernels import triton_launch
from moe_fast.kernels.triton_launch import Launcher
from moeref.make import make_inputs
from moeref.spec import Problem


class Jitted:
    """Stands in for a kernel of Triton: every call of its own compiles, and says what it was compiled for."""

    __name__ = "kernel"
    arg_names = ("x", "y", "n", "scale", "BLOCK", "PDL")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.calls.append(("compiled", grid, arguments, named))
            number = len(self.calls)
            return {
                (*grid, 1, 1)[:3]: lambda *values, stream: self.calls.append((f"as call {number}", values, stream)),
            }

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Jitted:
    monkeypatch.setattr(triton_launch, "current_stream", lambda index: 99 + index)  # a CPU's index is -1
    return Jitted()


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, dtype=dtype), torch.zeros(32, dtype=torch.int32)


CONSTANTS = {"BLOCK": 16, "PDL": False}


def test_a_like_launch_gets_addresses_in_the_kernels_order(kernel: Jitted) -> None:
    launch = Launcher(kernel)
    x, y = tensors()
    for _ in range(3):
        launch((4, 2), (x, y), (7, 0.5), CONSTANTS, num_warps=4)
    assert kernel.calls[0] == ("compiled", (4, 2), (x, y, 7, 0.5), {**CONSTANTS, "num_warps": 4})
    assert kernel.calls[1:] == [("as call 1", (x.data_ptr(), y.data_ptr(), 7, 0.5, 16, False), 98)] * 2
    other, _ = tensors()
    launch((4, 2), (other, y), (7, 0.5), CONSTANTS, num_warps=4)
    assert kernel.calls[3] == ("as call 1", (other.data_ptr(), y.data_ptr(), 7, 0.5, 16, False), 98)


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (4, 3)},
        {"grid": (4,)},
        {"numbers": (8, 0.5)},
        {"numbers": (7, 0.25)},
        {"constants": {"BLOCK": 32, "PDL": False}},
        {"constants": {"BLOCK": 16, "PDL": True}},
        {"num_warps": 8},
        {"pair": tensors(torch.bfloat16)},
    ],
    ids=["more programs", "another axis", "an integer", "a float", "a constant", "pdl", "warps", "a dtype"],
)
def test_any_difference_is_tritons_own(change: dict[str, Any], kernel: Jitted) -> None:
    launch = Launcher(kernel)
    usual: dict[str, Any] = {"grid": (4, 2), "pair": tensors(), "numbers": (7, 0.5), "constants": CONSTANTS}

    def call(grid: Any, pair: Any, numbers: Any, constants: Any, num_warps: int = 4) -> str:
        launch(grid, pair, numbers, constants, num_warps=num_warps)
        return str(kernel.calls[-1][0])

    assert [call(**usual), call(**usual)] == ["compiled", "as call 1"]
    assert [call(**{**usual, **change}), call(**{**usual, **change})] == ["compiled", "as call 3"]
    assert call(**usual) == "as call 1"


def test_tensors_at_other_addresses_are_tritons_own_every_time(kernel: Jitted) -> None:
    launch = Launcher(kernel)
    x, y = tensors()
    for pair in ((x, y), (x[1:], y), (x[1:], y), (x[4:], y)):
        launch((1,), pair, (7, 0.5), CONSTANTS)
    assert [call[0] for call in kernel.calls] == ["compiled", "compiled", "compiled", "as call 1"]


def test_under_the_interpreter_every_launch_is_tritons_own() -> None:
    class Interpreted(Jitted):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **named: self.calls.append(("interpreted",))

    kernel = Interpreted()
    launch = Launcher(kernel)
    for _ in range(2):
        launch((1,), tensors(), (7, 0.5), CONSTANTS)
    assert kernel.calls == [("interpreted",)] * 2


def test_constants_out_of_order_are_refused() -> None:
    with pytest.raises(TypeError, match=r"kernel: expected its constants in their order, \['BLOCK', 'PDL'\]"):
        Launcher(Jitted())((1,), tensors(), (7, 0.5), {"PDL": False, "BLOCK": 16})


def test_the_installed_tritons_compiled_kernel_is_launched_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real class without a driver: its launcher gets the grid, the stream, the function and our values."""
    compiler = pytest.importorskip("triton.compiler.compiler")
    real = object.__new__(compiler.CompiledKernel)
    launched: list[tuple[Any, ...]] = []
    real.module, real._module_pid, real.function, real.packed_metadata = "loaded", -1, "function", "packed"
    real.name, real.src = "kernel", None
    real._run = lambda *arguments: launched.append(arguments)
    kernel = Jitted()
    monkeypatch.setattr(Jitted, "__getitem__", lambda self, grid: lambda *arguments, **named: real)
    monkeypatch.setattr(triton_launch, "current_stream", lambda index: 99)
    launch, (x, y) = Launcher(kernel), tensors()
    for _ in range(2):
        launch((4, 2), (x, y), (7, 0.5), CONSTANTS, num_warps=4)
    (arguments,) = launched
    assert arguments[:5] == (4, 2, 1, 99, "function")
    assert arguments[-6:] == (x.data_ptr(), y.data_ptr(), 7, 0.5, 16, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [9, 100, 300])
def test_kept_launches_give_the_bytes_of_tritons_own(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other inputs, tensors that are not aligned, another offset and factor."""
    from moe_fast.kernels import combine, experts, permute, routing
    from moe_fast.pipelines import hopper_triton

    launchers = [routing.launch, permute.launch_count, permute.launch, experts.launch, combine.launch]

    def call(seed: int, shift: int = 0, factor: float = 2.5, offset: int = 8) -> torch.Tensor:
        inputs = make_inputs(Problem.parse(f"small-t{tokens}-o8-iid-model_like-s{seed}")).to("cuda")
        ten = list(inputs.args())
        hidden = torch.empty(ten[2].numel() + shift, dtype=torch.uint8, device="cuda")
        hidden[shift:] = ten[2].reshape(-1).view(torch.uint8)
        ten[2] = hidden[shift:].view(ten[2].dtype).view(ten[2].shape)
        ten[8:] = [offset, factor]
        g = inputs.geometry
        return hopper_triton.run(*ten, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)

    variants: list[dict[str, Any]] = [
        {"seed": 0}, {"seed": 1}, {"seed": 0, "shift": 8}, {"seed": 0, "offset": 0}, {"seed": 1, "factor": 2},
    ]  # fmt: skip
    kept = [[call(**variant).view(torch.int16) for variant in variants] for _ in range(2)]
    for launcher in launchers:
        monkeypatch.setattr(launcher, "_kept", Forgetful())
    own = [call(**variant).view(torch.int16) for variant in variants]
    for ours in kept:
        assert all(torch.equal(mine, his) for mine, his in zip(ours, own, strict=True))
    assert not torch.equal(own[0], own[3]), "the offset changes the output"


class Forgetful(dict[Any, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def test_helpers_are_tritons() -> None:
    triton = pytest.importorskip("triton")
    for n in range(1, 70):
        assert triton_launch.next_power_of_2(n) == triton.next_power_of_2(n)
        assert all(triton_launch.cdiv(n, b) == triton.cdiv(n, b) for b in (1, 3, 16))
    assert triton_launch.next_power_of_2(0) == 1
