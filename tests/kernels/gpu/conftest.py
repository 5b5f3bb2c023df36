"""What a wrong kernel would not notice: NaN where nothing was written, counters left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from qplug_kernels.gpu import compat, workspace


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where kernels run: a GPU, or the CPU in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    assert compat.interpreted(), "Triton was imported before tests/conftest.py"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what is allocated with NaN; after the test, all counters must be zero again."""

    def poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*shape: object, **options: object) -> torch.Tensor:
            found = empty(*shape, **options)
            return found.fill_(torch.nan) if found.is_floating_point() else found

        return filled

    workspace.forget()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield
    assert not any(piece.count.any() for piece in workspace._OF_STREAM.values())
    workspace.forget()
