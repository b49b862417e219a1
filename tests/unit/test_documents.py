"""Attention within documents against the same with a mask, in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model import documents as module
from isthmus.model.documents import Documents, attention
from tests.support.plain import document_mask


@st.composite
def packed_rows(draw):
    """Document numbers [B, T]: runs of documents from the left of each row, padding at its end."""
    width = draw(st.integers(3, 70))
    rows, number = [], 0
    for _ in range(draw(st.integers(1, 4))):
        row: list[int] = []
        for length in draw(st.lists(st.integers(1, width), max_size=4)):
            if len(row) + length <= width:
                row += [number] * length
                number += 1
        rows.append(row + [-1] * (width - len(row)))
    return torch.tensor(rows)


def inputs(document, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (10, 10, 6)
    return [
        torch.randn(*document.shape, heads, n, dtype=torch.float64, generator=generator).requires_grad_() for n in sizes
    ]


@pytest.mark.parametrize("longest_explicit", [256, 0])
@given(packed_rows(), st.integers(1, 3), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_documents_attend_to_themselves_alone(longest_explicit, document, heads, seed):
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(module, "LONG", longest_explicit)
    ours, theirs = inputs(document, heads, seed), inputs(document, heads, seed)
    real = (document >= 0)[..., None, None]
    with monkeypatch.context():
        result = Documents.of(document, heads).attend(*ours, 0.3) * real
    query, key, value = (part.transpose(1, 2) for part in theirs)
    scores = query @ key.transpose(-1, -2) * 0.3 + document_mask(document).double()
    expected = (scores.softmax(-1) @ value).transpose(1, 2) * real
    torch.testing.assert_close(result, expected)
    direction = torch.randn(result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (result * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
    monkeypatch.undo()


def test_a_fused_kernel_and_its_filling_equal_the_formula():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 40, 12), torch.randn(2, 3, 40, 12), torch.randn(2, 3, 40, 5)
    causal = torch.full((40, 40), float("-inf")).triu(1)
    expected = (query @ key.transpose(-1, -2) * 0.2 + causal).softmax(-1) @ value
    torch.testing.assert_close(attention(query, key, value, None, 0.2), expected)
    torch.testing.assert_close(attention(query, key, value, causal, 0.2), expected)
