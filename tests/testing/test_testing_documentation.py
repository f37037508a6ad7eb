"""The example of docs/codecs.md is run as it stands there, and the table of laws there is that of the kit."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.testing import checks
from tests.testing.toys import Warm

TEXT = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text("utf-8")


def test_the_codec_of_the_documentation_passes_as_it_is_tested_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "documented.py"
    file.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)), "utf-8")
    spec = importlib.util.spec_from_file_location("documented", file)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "documented", module)
    spec.loader.exec_module(module)
    (mark,) = module.test_block_mean.pytestmark
    assert mark.name == "parametrize" and len(mark.args[1]) > 50
    for check in mark.args[1]:
        module.test_block_mean(check)


def test_the_table_of_laws_is_complete() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert documented == {check.law for check in checks(Warm())}
