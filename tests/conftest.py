"""The environment of every engine that tests start, which tests are slow, and which run side by side."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

# Before anything imports torch, which reads it then, and for the processes that tests start. What is tiny gains nothing
# from a second thread; two workers of two threads on two cores wait for each other, at ten times the cost.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # which vLLM guesses n-grams with; its threads starve torch's
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # nor a core of its own for each server
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no compilation
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PREFIX_SERVE_CACHE"] = tempfile.mkdtemp(prefix="prefix-serve-cache-")  # not the one of the user

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from helpers.progress import Progress
from helpers.slow import is_slow

if TYPE_CHECKING:  # the process that only hands out tests starts without them
    from transformers import PreTrainedTokenizerFast

atexit.register(shutil.rmtree, os.environ["PREFIX_SERVE_CACHE"], ignore_errors=True)
collect_ignore = ["wheel"]  # for an environment of its own: `make test-wheel`

# The same examples each time, and however long they take: nothing depends on a seed or on how busy the machine is. Fixtures
# are of a test, and not of an example, by intent.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


ENGINES = "integration/serving/"
COMPILER = "integration/training/test_compile.py"


class TogetherWhatShares(LoadScopeScheduling):
    """Under `-n`, keeps tests on one worker that share something slow to create.

    These are the tests of a file, of an architecture in the sweep, and all tests that share engines. Soak tests have engines
    of their own.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        if ENGINES in path and self.config.option.markexpr != "soak":
            return "engines"
        architecture = test.partition("[")[2].rstrip("]").partition("-")[0] if "test_architectures" in path else ""
        return path + architecture


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and config.getoption("dist", "no") != "no" and config.get_verbosity() <= 0:
        config.pluginmanager.register(Progress(reporter))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    # Engines first, on one worker. The other runs what needs none meanwhile; the many short tests come last, so that both
    # workers end at about the same time. torch's compiler comes first there: in a worker that had run 1,400 tests before, it
    # once ended the process without a word.
    items.sort(key=lambda item: (ENGINES not in item.nodeid, COMPILER not in item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherWhatShares:
    config.option.loadscopereorder = False
    return TogetherWhatShares(config, log)


@pytest.fixture(scope="session")
def subword_tokenizer() -> PreTrainedTokenizerFast:
    from helpers.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer that knows the words w2, w3, ... and starts every text with its <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from helpers.tiny import VOCABULARY

    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return str(folder)
