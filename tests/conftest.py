"""What tests share: a tiny teacher with its tokenizer, the toy task, a CPU accelerator, fixed seeds."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test waits for a network
os.environ.setdefault("XDISTIL_HEADLESS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # kernels as well: threads of two processes would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import random_teacher  # noqa: E402

from xdistil import data, models  # noqa: E402
from xdistil.devices import open_accelerator  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Files that run notebooks come first: begun last, they would keep one process while the others have nothing."""
    slow = {item.path for item in items if item.get_closest_marker("notebook")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def toy(root) -> Path:
    """A task of two languages: 60 train, 16 dev, 24 test and 84 transfer sentences."""
    return root / "tests" / "data" / "toy"


@pytest.fixture(scope="session")
def shared(root) -> Path:
    """Real data and weights beside the repository."""
    folder = root.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def labels(toy) -> list[str]:
    return data.read_labels(toy / "labels.tsv")


@pytest.fixture(scope="session")
def sentences(toy, labels) -> data.Sentences:
    return data.read_tagged(toy / "train.tsv", labels)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, sentences, labels) -> Path:
    """A BERT of 4 layers, width 48 and 4 heads with a WordPiece tokenizer."""
    torch.manual_seed(0)
    words = {word for sentence in sentences.words for word in sentence}
    return random_teacher(words, labels, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tokenizer(teacher_folder):
    return models.load_tokenizer(teacher_folder)


@pytest.fixture
def teacher(teacher_folder, labels):
    """The tiny teacher with eager attention, in eval mode."""
    model = models.load_classifier(teacher_folder, labels, "pt_teacher_checkpoint").eval()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="session")
def examples(sentences, tokenizer, labels) -> data.Examples:
    return data.encode(sentences, tokenizer, 32, labels)


@pytest.fixture
def accelerator():
    return open_accelerator("cpu", "float32", quiet=True)
