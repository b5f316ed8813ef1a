import torch

import students
from distill.compression.weight_sharing import cluster, share_weights, take_apart
from distill.distiller import Distiller


def test_clusters_of_a_line():
    weight = torch.tensor([[0.0, 0.2, 1.0], [5.0, 5.2, 0.1]])
    values, indices = cluster(weight, 2)  # begun at 0 and 5.2: 0, 0.2, 1.0, 0.1 are nearer to the first
    torch.testing.assert_close(values, torch.tensor([0.325, 5.1]))
    assert indices.tolist() == [[0, 0, 0], [1, 1, 0]]


def test_a_value_that_nobody_is_near_stays():
    values, indices = cluster(torch.tensor([0.0, 0.0, 3.0]), 4)
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0] and indices.tolist() == [0, 0, 3]


def test_gradients_are_summed_by_value(build_tiny, images, targets):
    plain, shared = build_tiny().eval(), build_tiny().eval()
    names = share_weights(shared, bits=2)
    assert names and "head.class_logits" not in names
    name = names[-1]
    layer = shared.get_submodule(name)
    assert len(layer.weight.unique()) <= 4
    for other in names:  # the plain one with the same values
        with torch.no_grad():
            plain.get_submodule(other).weight.copy_(shared.get_submodule(other).weight)
    for detector in (plain, shared):
        Distiller(detector)(images, targets)[0].backward()
    (codebook,) = layer.parametrizations["weight"]
    expected = torch.zeros(4).index_add_(0, codebook.indices.flatten(), plain.get_submodule(name).weight.grad.flatten())
    torch.testing.assert_close(layer.parametrizations["weight"].original.grad, expected, rtol=1e-3, atol=1e-6)


def test_from_sharing_to_a_folder_and_back(build_tiny, images, tmp_path):
    detector = build_tiny().eval()
    whole = tmp_path / "whole"
    students.save(detector, whole)
    keys = list(detector.state_dict())
    share_weights(detector, bits=3)
    expected = detector(images)
    shared = take_apart(detector)
    assert list(detector.state_dict()).sort() == keys.sort() and len(shared) > 5
    students.save(detector, tmp_path / "shared", {"image_size": [64, 64]}, shared)
    loaded = students.load(tmp_path / "shared")
    for ours, theirs in zip(loaded(images), expected):
        assert all(map(torch.equal, ours, theirs))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, tmp_path / "shared")]
    assert sizes[1] < 0.5 * sizes[0]  # tiny ones are mostly names and norms
