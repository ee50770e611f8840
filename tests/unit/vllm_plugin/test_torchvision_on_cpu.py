"""A torchvision whose operators do not load is importable; one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_plugin import torchvision_on_cpu

# What torchvision's import does, as far as operators are concerned.
INIT = "from . import extension\nfrom torchvision import _meta_registrations\n"
EXTENSION = "import torch\n{load}\ndef _has_ops():\n    return {has_ops}\n"
META = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, threshold: dets)
"""
LOAD = """
for name in ("nms", "qnms"):
    torch.library.define("torchvision::" + name, "(Tensor dets, Tensor scores, float threshold) -> Tensor")
"""


def run(folder: Path, code: str, *, has_ops: bool) -> subprocess.CompletedProcess[str]:
    """Runs code beside a torchvision with or without its operators."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "extension.py").write_text(EXTENSION.format(load=LOAD if has_ops else "", has_ops=has_ops))
    (package / "_meta_registrations.py").write_text(META)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    """Without `site`, which would run this environment's own `.pth` file."""
    import torch

    root = Path(__file__).parents[3]
    return {"PYTHONPATH": f"{root}:{Path(torch.__file__).parents[1]}"}


@pytest.mark.parametrize("has_ops", [True, False])
def test_torchvision_imports(tmp_path: Path, has_ops: bool) -> None:
    code = "import vllm_plugin.torchvision_on_cpu, torchvision, torch; print(torch.ops.torchvision.nms.default._schema)"
    done = run(tmp_path, code, has_ops=has_ops)
    assert done.returncode == 0, done.stderr
    assert ("iou_threshold" in done.stdout) == (not has_ops)


def test_without_it_torchvision_fails(tmp_path: Path) -> None:
    done = run(tmp_path, "import torchvision", has_ops=False)
    assert "operator torchvision::nms does not exist" in done.stderr


def test_every_process_of_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    torchvision_on_cpu.main()
    written = tmp_path / "torchvision_on_cpu.pth"
    assert str(written) in capsys.readouterr().out
    finder = torchvision_on_cpu.BeforeOperatorsAreDescribed.__name__
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); assert 'vllm_plugin' not in sys.modules; "
        f"sys.exit(sum(type(each).__name__ == {finder!r} for each in sys.meta_path))"
    )
    # The second environment no longer has this package.
    for paths, imported in ((environment(), 1), ({}, 0)):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], env=paths, cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (imported, "")
