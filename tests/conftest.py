"""One thread, no network, no progress bars: the tests measure behaviour, not the machine."""

import gc
import os
import shutil
import sys
import tempfile


# Before torch is imported. Forked processes hang if their parent has trained with several OpenMP threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Most tests compare with what a CPU computes, and some fork. Workers of xdist inherit it.
if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf_backdoor_tests_")  # not the user's

import datasets
import pytest
import runs
import tiny
import torch
import transformers


torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="let tests see the machine's GPU, and run those that need one")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Each `train()` collects garbage, and would go through all that was ever imported: half of a small test's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def wordpiece():
    """Tokenizer of an encoder: [CLS] text [SEP]."""
    return tiny.encoder_tokenizer()


@pytest.fixture
def chat():
    """Tokenizer of a causal LM: an end-of-sequence token and a chat template."""
    return tiny.causal_tokenizer()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with models and data for runs."""
    return runs.workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a classifier."""
    return tiny.saved("bert", tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The folder of a causal LM with a chat template."""
    return tiny.saved("llama", tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A file of reviews, whose texts are in a column of another name."""
    file = tmp_path_factory.mktemp("rows") / "reviews.csv"
    tiny.reviews(60).rename_column("text", "sentence").to_csv(file)
    return str(file)
