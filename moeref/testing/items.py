"""How a question to the Session becomes an item of pytest: its device, its outcome, the command that runs it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from moeref.interop.candidates import CandidateError
from moeref.interop.devices import usable_device
from moeref.judge.verdict import ERROR, INCONCLUSIVE, PASS, UNSUPPORTED
from moeref.testing.plugin import MARKERS, OPTIONS, PLUGIN, PREFIX, SUITE
from moeref.testing.session import Result, Session

Ask = Callable[[Session], Result]
"""What an item asks."""

Judge = Callable[[Ask], None]
"""The fixture `judge`: makes the answer the item's outcome."""


def device_of(config: pytest.Config) -> str:
    """This process's device: under xdist each worker has its own GPU."""
    worker = getattr(config, "workerinput", {}).get("workerid", "gw0")
    return usable_device(config.getoption("moe_device"), "--moe-device", int(worker.removeprefix("gw")))


def judge_item(item: pytest.Item, session: Session, ask: Ask) -> None:
    """The answer as this item's outcome, with its figures as JUnit properties."""
    gpu_required = bool(item.config.getoption("--require-gpu"))
    device = session.options.device
    check = next(marker for marker in MARKERS if item.get_closest_marker(marker))
    recorded: dict[str, object] = {
        "check": check.removeprefix(PREFIX),
        "candidate": session.candidate,
        "device": device,
    }
    if gpu_required and device == "cpu":
        result = Result(ERROR, "--require-gpu: this machine has no CUDA device, nothing was run")
    else:
        try:
            result = ask(session)
        except CandidateError as error:
            result = Result(ERROR, str(error))
    recorded |= {"status": result.status, **result.properties}
    item.user_properties += [(PREFIX + name, value) for name, value in recorded.items()]
    conclude(result, item, gpu_required)


def conclude(result: Result, item: pytest.Item, gpu_required: bool) -> None:
    """Pass, fail or skip. INCONCLUSIVE is a skip to JUnit, which has no fourth outcome; the terminal tells it apart."""
    if result.status == PASS:
        return
    if result.status == INCONCLUSIVE or (result.status == UNSUPPORTED and not gpu_required):
        raise pytest.skip.Exception(result.text, _use_item_location=True)
    lines = [result.text.replace("--timeout sets", "--moe-timeout sets")]
    if result.status == UNSUPPORTED:
        lines = [f"UNSUPPORTED, a failure under --require-gpu: {result.text}"]
    if result.repeat:
        lines.append(f"repeat: {result.repeat}")
    lines.append(f"in pytest: {again(item)}")
    if result.details:
        item.add_report_section("call", "candidate's traceback", result.details)
    pytest.fail("\n".join(lines), pytrace=False)


def again(item: pytest.Item) -> str:
    """The command that runs this item alone."""
    config = item.config
    words = ["pytest"]
    if not any(getattr(plugin, "__name__", "") == PLUGIN for plugin, _ in config.pluginmanager.list_plugin_distinfo()):
        words += ["-p", PLUGIN]
    for name, default in OPTIONS.items():
        value = config.getoption(f"moe_{name}")
        if value != default:
            words += [f"--moe-{name}", str(value)]
    if config.getoption("moe_all"):
        words.append("--moe-all")
    if config.getoption("--require-gpu"):
        words.append("--require-gpu")
    words += ["--pyargs", f"{SUITE}.{item.path.stem}::{item.name}"]
    return shlex.join(words)
