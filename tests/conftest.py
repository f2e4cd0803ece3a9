"""Settings that every test runs under: fixed thread count, no network, no display."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2

# Before torch is imported, and inherited by the processes that tests start.
os.environ.update(OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS), HF_HUB_OFFLINE="1",
                  HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
sys.path.insert(0, str(ROOT / "tools"))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fixed_threads():
    "A test that changes the number of threads changes it for itself only"
    torch.set_num_threads(THREADS)


@pytest.fixture
def root(): return ROOT
