"""The code of a run: frozen when it begins, as it would be shipped, and the same whenever it goes on."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from golf.config import ConfigError
from golf.run.folder import RunFolder


@dataclass(frozen=True)
class Program:
    """The script that runs. A bundle is its own code; else tools/bundle.py, beside the script, makes one."""

    script: Path
    bundled: bool

    def freeze(self, folder: RunFolder) -> None:
        """Write the code that runs, packed, and the readable text that it was packed from. Raises ConfigError."""
        if self.bundled:
            shutil.copyfile(self.script, folder.code)
        else:
            self.bundle("--pack", "--out", folder.code, "--readable-out", folder.readable_code)

    def bundle(self, *arguments: str | Path) -> None:
        command = [sys.executable, self.script.parent / "tools" / "bundle.py", *arguments]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise ConfigError("tools/bundle.py could not bundle the code that is to run; its message stands above")

    def check(self, folder: RunFolder) -> None:
        """Raise ConfigError unless the run in `folder` began with this code."""
        began, now = folder.code, self.script
        if not self.bundled:
            began, now = folder.readable_code, folder.path / ".code_now.py"
        if not began.exists():
            raise ConfigError(f"{folder.path} was stopped before it began: remove it, and start anew")
        if not self.bundled:
            self.bundle("--no-sizes", "--out", now)
        same = began.read_bytes() == now.read_bytes()
        if not self.bundled:
            now.unlink()
        if not same:
            raise ConfigError(f"the code is not that of {began}: go back to it, or start a new run")

    def run_tool(self, name: str, *arguments: str | Path) -> int:
        """A tool's work is not part of the code that a submission ships; without the tools a run goes without it.

        Returns the tool's exit status.
        """
        tool = self.script.parent / "tools" / name
        return subprocess.run([sys.executable, tool, *arguments]).returncode if tool.exists() else 0
