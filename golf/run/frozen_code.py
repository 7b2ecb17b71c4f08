"""Freezes the code of a run as it would be shipped, and checks that a resumed run still has the same code."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from golf.config.config import FROZEN
from golf.config.knobs import ConfigError
from golf.run.folder import RunFolder
from golf.runtime import file_sha256


@dataclass(frozen=True)
class Program:
    """Describes the running script. A bundle is its own code; else tools/bundle.py, beside the script, makes one."""

    script: Path
    bundled: bool

    def freeze(self, folder: RunFolder) -> None:
        """Writes the running code, packed, and the readable text that it was packed from. Raises ConfigError."""
        sources = self.sources()
        if FROZEN or self.bundled:
            shutil.copyfile(self.script, folder.code)
        else:
            bundler = self.script.parent / "tools" / "bundle.py"
            command = [sys.executable, bundler, "--pack", "--no-sizes", "--out", folder.code]
            command += ["--readable-out", folder.readable_code, "--run-config", folder.config]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise ConfigError("tools/bundle.py could not bundle the code that is to run; its message stands above")
        folder.save_json(folder.sources, sources)

    def check(self, folder: RunFolder) -> None:
        """Raises ConfigError unless the run in `folder` began with this code."""
        if not folder.sources.exists():
            raise ConfigError(f"{folder.path} was stopped before it began: remove it, and start anew")
        if folder.load_json(folder.sources) != self.sources():
            raise ConfigError(
                f"the code is not that of {folder.code}: go back to it, start a new run, or go on all the same with "
                "--new-code, which makes the result invalid"
            )

    def replace_code(self, folder: RunFolder) -> None:
        """Makes this program the code of a run that another one began, and records the change."""
        if folder.load_json(folder.sources) != self.sources():
            changes = folder.code_changes_list()
            stages = list(folder.load_json(folder.stages)) if folder.stages.exists() else []
            changes.append({"from": file_sha256(folder.code), "stages": stages})
            folder.save_json(folder.code_changes, {"changes": changes})
            self.freeze(folder)

    def sources(self) -> dict[str, str]:
        """Returns SHA-256 of every file that the run's code is made from."""
        root = self.script.parent
        library = [] if self.bundled else sorted(root.glob("golf/**/*.py"))
        return {path.relative_to(root).as_posix(): file_sha256(path) for path in [self.script, *library]}

    def run_tool(self, name: str, *arguments: str | Path) -> int | None:
        """Runs a tool and returns its exit status; None where the tool is absent.

        Tools are not part of the code that a submission ships; a run without them goes on.
        """
        if FROZEN:
            return None
        tool = self.script.parent / "tools" / name
        return subprocess.run([sys.executable, tool, *arguments]).returncode if tool.exists() else None
