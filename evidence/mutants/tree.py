"""A copy of the package and its tests, in which faults are planted and tests are run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mutant import Mutant

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ("graphpeft", "tests")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
LIBRARIES = ["torch._dynamo", "transformers.models.llama.modeling_llama", "peft", "torchao"]
"""What most tests import. A server imports it once, and is forked for each run."""


class TestsError(RuntimeError):
    """Pytest didn't run the tests that it was given."""


class Tree:
    """A copy of the project. Only the package and the tests are copied; all else is linked.

    Args:
        folder: An empty folder for the copy.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder / "project"
        self._noted, self._printed = folder / "noted.txt", folder / "printed.txt"
        self._root.mkdir()
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, self._root / path.name)  # with the compiled files, which fit the copied times
            elif not path.name.startswith(".") and path.name != "build":
                (self._root / path.name).symlink_to(path)
        os.environ.update(ENVIRONMENT)  # before the server starts, which passes its own on
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(LIBRARIES)

    @contextlib.contextmanager
    def faulty(self, mutant: Mutant) -> Iterator[None]:
        """Lets the package have a fault inside the context."""
        file = self._root / "graphpeft" / mutant.file
        source, times = file.read_text(encoding="utf-8"), file.stat()
        file.write_text(mutant.applied_to(source), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(source, encoding="utf-8")
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            # Python may have compiled the faulty source; examples that hypothesis found would help the next fault
            for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
                compiled.unlink()
            shutil.rmtree(self._root / ".hypothesis", ignore_errors=True)

    def collected(self, expression: str) -> list[str]:
        """Returns the ids of the tests that an expression of markers selects."""
        if self._pytest(["--collect-only", "-m", expression], seconds=1800):
            raise TestsError(self._printed.read_text(encoding="utf-8")[-2000:])
        return [line for line in self._printed.read_text(encoding="utf-8").splitlines() if "::" in line]

    def first_failure(self, arguments: Sequence[str], expression: str, seconds: float) -> str | None:
        """Returns the id of the first test that fails, or that doesn't end in time; None if all pass.

        Args:
            arguments: What pytest is given: ids of tests, files, options.
            expression: The expression of markers that selects among these.
            seconds: How long they may take together.

        Raises:
            TestsError: If the arguments name no tests.
        """
        code = self._pytest(["-x", "-m", expression, *arguments], seconds)
        if code is None:
            running = self._last("started")
            # only a test that doesn't end by itself is to blame
            if running is None or [*arguments] == [running]:
                return running
            return self.first_failure([running], expression, seconds)
        failed = self._last("failed")
        if failed is None and code not in (0, _NO_TESTS):
            raise TestsError(self._printed.read_text(encoding="utf-8")[-2000:])
        return failed

    def _last(self, word: str) -> str | None:
        lines = self._noted.read_text(encoding="utf-8").splitlines()
        return next((line.removeprefix(f"{word} ") for line in reversed(lines) if line.startswith(f"{word} ")), None)

    def _pytest(self, arguments: Sequence[str], seconds: float) -> int | None:
        """Runs pytest in a process of its own, and returns its exit code; None if it didn't end in time."""
        self._noted.write_text("", encoding="utf-8")
        given = (self._root, self._noted, self._printed, arguments)
        process = self._processes.Process(target=_run_pytest, args=given)
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        return code


_NO_TESTS = 5
"""Pytest's exit code if the expression selects none of the tests."""


def _run_pytest(root: Path, noted: Path, printed: Path, arguments: Sequence[str]) -> None:
    """Runs pytest in this process, which imports the package from `root`."""
    os.chdir(root)
    os.environ["TESTS_NOTED_IN"] = str(noted)
    os.environ["PYTHONPATH"] = str(root)  # for processes that tests start
    sys.path[:0] = [str(root), str(HERE)]
    with printed.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    # the server has imported libraries that have plugins of pytest, too
    options = ["-q", "-p", "no:cacheprovider", "-p", "first_failure", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(pytest.main([*options, *arguments]))
