import pytest
import torch

from losses import FGD, MGD, AttentionGuided, FGDGlobal, NonLocalRelation


@pytest.mark.parametrize(
    ("module", "name", "widths"),
    [
        (MGD(2), "MGD", (3, 3)),
        (FGDGlobal(2), "FGDGlobal", (3, 3)),
        (FGD(2), "FGD", (3, 3)),
        (NonLocalRelation(2, 3), r"NonLocalRelation\(student\)", (3, 3)),
        (NonLocalRelation(3, 2), r"NonLocalRelation\(teacher\)", (3, 3)),
        (AttentionGuided(2, 4), r"AttentionGuided\(student\)", (3, 4)),
        (AttentionGuided(4, 2), r"AttentionGuided\(teacher\)", (4, 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_name_the_width_that_they_were_built_for(module, name, widths):
    maps = [torch.zeros(2, width, 4, 5) for width in widths]
    more = ([torch.zeros(0, 4)] * 2, (32, 32)) if isinstance(module, FGD) else ()
    message = (
        rf"^{name}: a map of shape \(2, 3, 4, 5\) has 3 channels, but the loss was built for 2; they must be equal$"
    )
    with pytest.raises(ValueError, match=message):
        module(*maps, *more)
