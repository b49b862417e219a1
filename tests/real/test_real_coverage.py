"""What a chip's software makes of the real model: nine query heads on three of keys and values."""

from pathlib import Path

import pytest

from isthmus.progress import Watch
from isthmus.tools.coverage import execute

pytestmark = pytest.mark.real


def test_nine_heads_of_grouped_queries_have_a_fused_attention(smollm2: Path) -> None:
    report = execute(str(smollm2), Watch(quiet=True), chip="ascend-910b-313t", ranks=None, as_json=True)
    (attention,) = [need for need in report.needs if need.need == "attention" and need.use == "serving"]
    assert [one.operator for one in attention.usable] == ["npu::npu_fused_infer_attention_score"]
    assert not attention.unusable and all(one.holds for one in report.rules)
    (held,) = [one for one in report.rules if one.rule.quantity == "query_groups"]
    assert held.here == 3
