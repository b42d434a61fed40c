"""Runs PEFT's own tests with graphpeft in the place of PEFT, compares with PEFT, and writes a page.

    python evidence/peft_tests/run.py [--tree FOLDER] [--peft] [files of tests, as test_auto]

The tests come with PEFT's source distribution, and are kept in build/peft_tests beside a cache of tiny models that
stands for the hub. Those that PEFT passes are in scope, in two parts: in_scope.json lists
those of LoRA and the prompt methods. The many others, which take an hour, are listed in build/peft_tests by `--peft`.
`--tree` names the folder whose graphpeft is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import page
import scope

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "peft_tests"
VERSION = "0.21.2"
SOURCES = BUILD / f"peft-{VERSION}"
HUB = BUILD / "hub"
INVENTORY = BUILD / "inventory.json"
IN_SCOPE = {scope.LORA_AND_PROMPTS: HERE / "in_scope.json", scope.OTHERS: BUILD / "in_scope_others.json"}
PAGE = ROOT / "docs" / "peft_tests.md"

FILES = (
    "test_adamss_asa",
    "test_adaption_prompt",
    "test_arrow",
    "test_auto",
    "test_bdlora",
    "test_boft",
    "test_cartridge",
    "test_config",
    "test_cpt",
    "test_custom_models",
    "test_decoder_models",
    "test_deft",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_frod",
    "test_helpers",
    "test_hub_features",
    "test_initialization",
    "test_integrations",
    "test_lora_conversion",
    "test_lora_ga",
    "test_lora_intruders",
    "test_lora_variants",
    "test_lorafa",
    "test_loraplus",
    "test_low_level_api",
    "test_mapping",
    "test_mixed",
    "test_multitask_prompt_tuning",
    "test_osf",
    "test_other",
    "test_poly",
    "test_pvera",
    "test_quantization",
    "test_randlora",
    "test_riemannian_lora",
    "test_seq_classifier",
    "test_shadow",
    "test_shira",
    "test_stablediffusion",
    "test_supertuning",
    "test_target_parameters",
    "test_token_classification_qa",
    "test_torch_compile",
    "test_trainable_tokens",
    "test_tuners_utils",
    "test_unilora",
    "test_vblora",
    "test_velora",
    "test_vera",
    "test_vision_models",
    "test_xlora",
)

# Two processes, which share out the tests of all files.
TWO = ("-q", "--tb=no", "-n", "2", "--dist", "worksteal")

# Each test has two minutes. Options of PEFT's own configuration that need more packages are left out.
SETTINGS = """[pytest]
addopts = -p no:cacheprovider -p no:logging --timeout 120 --import-mode=importlib --continue-on-collection-errors
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""


def main() -> None:
    """Prepares, runs, and writes the page."""
    given = _arguments()
    _prepare()
    if given.peft:
        _find_scope(given.files)
    tests = [test for each in _in_scope().values() for test in each if _file(test) in given.files]
    _run("graphpeft", given.files, tests=tests, tree=given.tree)
    PAGE.write_text(page.page(_in_scope(), _known("graphpeft"), VERSION))
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--peft", action="store_true", help="find the scope anew, by running the tests with PEFT")
    parser.add_argument("--tree", default=str(ROOT), help="the folder whose graphpeft is tested")
    return parser.parse_args()


def _prepare() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    if not SOURCES.exists():
        wanted = ["--no-deps", "--no-binary", "peft", "--dest", str(BUILD), f"peft=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)
        with tarfile.open(BUILD / f"peft-{VERSION}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    (SOURCES / "tests" / "__init__.py").touch()
    (BUILD / "pytest.ini").write_text(SETTINGS)
    if not INVENTORY.exists():
        _python("inventory.py", INVENTORY)
    _python("hub.py", HUB)


def _python(script: str, argument: Path) -> None:
    subprocess.run([sys.executable, str(HERE / script), str(argument)], check=True, env=_environment(str(ROOT)))


def _environment(tree: str, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HOME": str(HUB),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEFT_TESTS_INVENTORY": str(INVENTORY),
        "PYTHONPATH": os.pathsep.join((tree, str(HERE), str(SOURCES))),
        **more,
    }


def _find_scope(files: list[str]) -> None:
    """Runs the tests with PEFT, and lists those that pass and are in scope."""
    rows = _run("peft", files)
    passed = {test: scope.part(test, set(row["made"])) for test, row in rows.items() if row["outcome"] == "passed"}
    tests = {part: [test for test in before if _file(test) not in files] for part, before in _in_scope().items()}
    for test, part in passed.items():
        tests[part].append(test)
    for part, each in tests.items():
        IN_SCOPE[part].write_text(json.dumps(_grouped(each), indent=0, ensure_ascii=False) + "\n")


def _run(library: str, files: list[str], *, tests: list[str] | None = None, tree: str = "") -> dict[str, Any]:
    """Runs files of tests, or some of their tests, and returns a row for each test; earlier rows of these files go."""
    folder = BUILD / library
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    only = {} if tests is None else {"PEFT_TESTS_ONLY": str(_list_of(folder, tests))}
    environment = _environment(tree or str(ROOT), PEFT_TESTS_RECORD=str(folder), **only)
    # the stand-in is loaded first, before anything imports PEFT
    plugins = [*(["stand_in"] if library == "graphpeft" else []), "offline", "recorder"]
    options = [word for name in plugins for word in ("-p", name)]
    command = [sys.executable, "-m", "pytest", "-c", str(BUILD / "pytest.ini"), "--rootdir", str(SOURCES), *options]
    paths = [f"tests/{file}.py" for file in files]
    # tests fail, so the exit status says nothing
    subprocess.run([*command, *TWO, *paths], cwd=SOURCES, env=environment, check=False)
    found = _rows(folder.glob("*.jsonl"))
    kept = {test: row for test, row in _known(library).items() if _file(test) not in files}
    _all_rows(library).write_text("".join(json.dumps(row) + "\n" for row in (kept | found).values()))
    return found


def _list_of(folder: Path, tests: list[str]) -> Path:
    path = folder / "wanted.txt"
    path.write_text("\n".join(tests))
    return path


def _known(library: str) -> dict[str, Any]:
    path = _all_rows(library)
    return _rows([path]) if path.exists() else {}


def _all_rows(library: str) -> Path:
    return BUILD / f"{library}.jsonl"


def _rows(files: Iterable[Path]) -> dict[str, Any]:
    rows = [json.loads(line) for file in sorted(files) for line in file.read_text().splitlines()]
    # a test whose teardown fails, too, has a second row, which says less
    return {row["test"]: row for row in reversed(rows)}


def _file(test: str) -> str:
    return Path(test.partition("::")[0]).stem


def _in_scope() -> dict[str, list[str]]:
    """Returns the tests in scope, by part."""
    groups = {part: json.loads(file.read_text()) if file.exists() else {} for part, file in IN_SCOPE.items()}
    return {
        part: [f"{function}{end}" for function, ends in each.items() for end in ends] for part, each in groups.items()
    }


def _grouped(tests: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for test in sorted(tests):
        function, bracket, parameters = test.partition("[")
        groups.setdefault(function, []).append(bracket + parameters)
    return groups


if __name__ == "__main__":
    main()
