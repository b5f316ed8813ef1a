import math

import pytest
import torch

from losses import (
    attention_guided,
    cwd,
    dense_sigmoid,
    dist,
    dkd,
    fgd_attention,
    fgd_focal,
    kd,
    localization_distillation,
    roi_classification,
)
from losses.temperature import soften


def test_soften_divides_in_float32():
    softened = soften(torch.tensor([3.0, -1.0], dtype=torch.bfloat16), 2.0)
    assert softened.dtype == torch.float32 and softened.tolist() == [1.5, -0.5]
    assert soften(torch.ones(1, dtype=torch.float64), 0.5).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    "loss",
    [
        lambda maps, rows, temperature: cwd(maps, maps, temperature),
        lambda maps, rows, temperature: fgd_attention(maps, maps, temperature),
        lambda maps, rows, temperature: fgd_focal(maps, maps, maps[:, 0], temperature),
        lambda maps, rows, temperature: attention_guided(maps, maps, maps, temperature),
        lambda maps, rows, temperature: dense_sigmoid([maps], [maps], temperature=temperature),
        lambda maps, rows, temperature: kd(rows, rows, temperature),
        lambda maps, rows, temperature: dkd(rows, rows, torch.zeros(5).long(), temperature=temperature),
        lambda maps, rows, temperature: dist(rows, rows, temperature),
        lambda maps, rows, temperature: roi_classification(rows, rows, temperature),
        lambda maps, rows, temperature: localization_distillation(
            rows[..., None], rows[..., None], rows[:, 0], temperature
        ),
    ],
)
def test_a_temperature_is_above_zero(loss, temperature):
    with pytest.raises(ValueError, match=f"^temperature: found {temperature}; it must be above 0"):
        loss(torch.ones(2, 3, 4, 5), torch.ones(5, 4), temperature)
