"""Freezes the code of a run as it would be shipped, and checks that a resumed run still has the same code."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
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

    def freeze(self, folder: RunFolder, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Writes the running code, packed, and the readable text that it was packed from. Raises ConfigError.

        Packing takes seconds of one core, in which `meanwhile` is done.
        """
        sources = self.sources()
        if FROZEN or self.bundled:
            shutil.copyfile(self.script, folder.code)
            meanwhile()
        else:
            bundler = self.script.parent / "tools" / "bundle.py"
            command = [sys.executable, bundler, "--pack", "--no-sizes", "--out", folder.code]
            command += ["--readable-out", folder.readable_code, "--run-config", folder.config]
            packing = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            meanwhile()
            if packing.wait():
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

    def start_tracker(self, folder: RunFolder, kind: str) -> None:
        """Starts tools/track.py, which follows the run and ends with it. Raises ConfigError where it can't."""
        if not find_spec(kind):
            raise ConfigError(f"track={kind}: {kind} is not installed: pip install -r requirements-track.txt")
        tool = self.script.parent / "tools" / "track.py"
        if not tool.exists():
            raise ConfigError(f"track={kind} needs {tool}, which is not there: set track=off")
        command = [sys.executable, tool, folder.path, "--to", kind, "--follow", "--process", str(os.getpid())]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def run_tool(self, name: str, *arguments: str | Path) -> int | None:
        """Runs a tool and returns its exit status; None where the tool is absent.

        Tools are not part of the code that a submission ships; a run without them goes on.
        """
        if FROZEN:
            return None
        tool = self.script.parent / "tools" / name
        return subprocess.run([sys.executable, tool, *arguments]).returncode if tool.exists() else None
