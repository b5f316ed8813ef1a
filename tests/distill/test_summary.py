import pytest

from distill.summary import describe_config


@pytest.mark.parametrize(
    "when, told",
    [
        ({"start": 1, "end": 4}, "4 cuts before epochs 2 to 5"),
        ({"start": None, "end": None, "epochs": [2, 5]}, "2 cuts before epochs 3, 6"),
        ({"start": None, "end": None, "epochs": [0]}, "1 cut before epoch 1"),
    ],
)
def test_when_is_cut(when, told):
    config = {"student": {"name": "yolov5", "size": "n"}, "pruning": {"target": 0.5, "importance": "lamp", **when}}
    rows = describe_config(config)
    assert rows["Pruning"] == f"to 50% of the MACs, by lamp, ranking uniform, {told}"
    assert rows["Student"] == "yolov5, n"
