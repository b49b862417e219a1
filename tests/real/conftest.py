"""The real model. Without it these tests are skipped, but for `make real`, which puts it there first."""

from pathlib import Path

import pytest

from tests.support.real_model import is_available, real_checkpoint


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16."""
    if not is_available():
        pytest.skip("the real model is not here: run `make real`")
    return real_checkpoint()
