"""Every family: quantized while loading, right, saved, reloaded, generating, and how much of it was quantized."""

import pytest

from mono_quant_hf import MonoQuantConfig

from .families import FAMILIES
from .matrix import Row, measure, table

ROWS: list[Row] = []
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@EACH
def test_family(family, tmp_path):
    row = measure(family, tmp_path)
    ROWS.append(row)
    assert 1e-5 < row.by_float < 0.5, (
        "the outputs do not show that the weights were quantized, or are garbage"
    )
    assert row.by_hand < 1e-3
    assert row.by_hand < row.by_float / 10
    assert row.reloaded and row.generated in (True, None)
    if not family.left_in_float:
        assert row.share >= 0.9
        return
    assert row.share < 0.9, "the row need no longer say why"
    assert family.left_in_float in {decision.reason for decision in row.decisions}


@EACH
def test_with_embeddings_and_symmetric(family, tmp_path):
    row = measure(family, tmp_path, MonoQuantConfig(symmetric=True, quantize_embeddings=True))
    assert 1e-5 < row.by_float < 0.6 and row.by_hand < 2e-3
    assert row.reloaded and row.generated in (True, None)


def test_the_table_has_a_line_for_every_row():
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and all(line.count("|") == 9 for line in lines)
