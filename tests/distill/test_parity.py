import pytest
import torch

from distill.parity import compare_detections, compare_tensors
from students import Detections


def found(*rows):
    table = torch.tensor([[*box, score, label] for box, score, label in rows]).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_levels_count_as_one_output():
    ours = (torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3))
    theirs = (torch.tensor([[0.0, 0.5]]), torch.tensor([[-0.75, 0.0]]), torch.tensor([0.0, 0, 2]))
    result = compare_tensors(("class_logits_8", "class_logits_16", "box_distances_8"), ours, theirs)
    assert result.largest == {"class_logits": 0.75, "box_distances": 2.0}


def test_detections_are_matched_whatever_their_order():
    a, b, c = [0.0, 0, 10, 10], [5.0, 5, 20, 20], [40.0, 40, 50, 50]
    near_a = [0.0, 0.25, 10, 10]
    ours = found((a, 0.5, 0), (b, 0.4999, 0), (c, 0.3, 1))
    theirs = found((b, 0.5, 0), (near_a, 0.4375, 0), (c, 0.3, 0))  # the last is of another class
    result = compare_detections([ours, found()], [theirs, found((a, 0.2, 0))])
    assert result.largest == {"boxes": 0.25, "scores": pytest.approx(0.0625)}
    assert result.unmatched == 2 + 1
    assert str(result) == "boxes 2.5e-01 px, scores 6.2e-02; 3 detections of one of the two alone"
