"""Reading files that somebody else wrote: only below one folder, only regular ones, only as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeref.interop.solution import leads_out

SHOWN = 300
"""Characters of a foreign value that a message repeats: a published blob's path has 190."""


class FibError(ValueError):
    """A file of a data set is not what the format says; one sentence: which file, what was expected, what came."""


class FibUnsupported(FibError):
    """The file is as the format says, but what it asks for can't be had here."""


def inside(root: Path, relative: str, what: str) -> Path:
    """The regular file `relative` below `root`.

    Raises FibError where the path is absolute, climbs out with '..', leads out by a link, or names no regular file.
    """
    if leads_out(relative):
        raise FibError(
            f"{what}: expected a path below the data set, got {shown(relative)}, which leads out of it; nothing was "
            "read: correct the path"
        )
    path = root / relative
    try:
        target = path.resolve()
        if not target.is_relative_to(root.resolve()):
            raise FibError(
                f"{what}: {shown(relative)} is a link that leads out of the data set, to {target}; nothing was read: "
                "put a copy in its place (huggingface-cli download --local-dir makes none)"
            )
        if not target.exists():
            raise FibError(f"{what}: no file {shown(relative)} below {root}: download the data set's blobs")
        if not target.is_file():
            raise FibError(f"{what}: expected a regular file, {shown(relative)} is none")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise FibError(f"{what}: {shown(relative)} can't be opened: {error}") from error
    return path


def shown(value: Any) -> str:
    """A foreign value as a message may repeat it: quoted, escaped, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def read_text(path: Path, what: str) -> str:
    """The file's text. Raises FibError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FibError(f"{path}: expected {what} in UTF-8: {error}") from error


def parse(text: str, where: str, what: str) -> dict[str, Any]:
    """The JSON object of a text. Raises FibError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FibError(f"{where}: expected {what} in JSON: {error}") from error
    if not isinstance(data, dict):
        raise FibError(f"{where}: expected {what} as a JSON object, got {type(data).__name__}")
    return data


def numbered_lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """('FILE line N', text) of every line that is not empty. Raises FibError where the file can't be read."""
    for number, line in enumerate(read_text(path, what).splitlines(), start=1):
        if line.strip():
            yield f"{path} line {number}", line


class Fields:
    """Takes fields out of a JSON object and collects what is wrong with them, to say it all in one message."""

    def __init__(self, where: str, what: str) -> None:
        self.where, self.what = where, what
        self.wrong: list[str] = []

    def take(self, holder: Any, name: str, kind: type, label: str = "") -> Any:
        """holder[name] if it is of that type, else the type's empty value, noted as wrong. True is no int."""
        value = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            came = "nothing" if value is None else shown(value)
            self.wrong.append(f"{label or name}: expected {_PLAIN.get(kind, kind.__name__)}, got {came}")
            return kind()
        return value

    def check(self) -> None:
        """Raise FibError where anything was wrong."""
        if self.wrong:
            raise FibError(f"{self.where} is no {self.what} that can be used: " + "; ".join(self.wrong))


_PLAIN: dict[type, str] = {str: "a string", int: "an integer", dict: "an object", list: "a list", float: "a number"}
