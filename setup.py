"""What pyproject.toml can not say: the golden files of the root go into the package when a wheel is built."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithGoldenFiles(build_py):
    """Copies golden/ to moeref/golden/recorded/ of a wheel; an editable install reads the checkout's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "moeref" / "golden" / "recorded"
            shutil.copytree(Path(__file__).parent / "golden", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": WithGoldenFiles})
