"""Which device a text like 'auto' or 'cuda:1' means on this machine."""

from __future__ import annotations

from moeref.spec import SpecError


def usable_device(text: str, option: str = "--device", worker: int = 0) -> str:
    """'cpu', 'cuda' or 'cuda:N': what `text` means here. Raises SpecError, which names `option`, for what is not here.

    text     'auto' takes a GPU where there is one; 'cuda' leaves the number open.
    worker   number of this process among several that share the machine's GPUs: where the number is left open, worker n
             of more than one gets GPU n modulo their count.
    """
    if text != "auto" and text != "cpu" and not text.startswith("cuda"):
        raise SpecError(f"{option} {text}: expected auto, cpu, cuda or cuda:N")
    import torch

    if text == "cpu" or (text == "auto" and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count()
    if text == "auto" or text == "cuda":
        if not count:
            raise SpecError(f"{option} {text}: this machine has 0 CUDA devices")
        return f"cuda:{worker % count}" if worker else "cuda"
    index = text.removeprefix("cuda:")
    if not index.isdigit() or int(index) >= count:
        raise SpecError(f"{option} {text}: this machine has {count} CUDA devices")
    return text
