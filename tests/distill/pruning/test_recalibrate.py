import pytest
import torch
from torch import nn

from distill.data import DetectionDataset, build_resize, open_index
from distill.pruning.recalibrate import (
    batches_needed,
    calibration_batches,
    recalibrate_batch_norms,
    share_statistics,
)


def test_running_statistics_are_the_mean_over_batches():
    norm = nn.BatchNorm2d(1, momentum=0.1).eval()
    norm.running_mean.fill_(99.0)
    norm.num_batches_tracked.fill_(5)
    network = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    batches = [torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([0.0, 3, 6, 3]).view(4, 1, 1, 1)]
    recalibrate_batch_norms(network, batches)
    assert norm.running_mean.tolist() == [2.5]  # of 2 and 3
    assert norm.running_var.tolist() == [4.0]  # of the unbiased variances 2 and 6
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 5
    assert not any(module.training for module in network.modules())


def test_what_sees_nothing_keeps_its_statistics():
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(99.0)
    recalibrate_batch_norms(norm, [])
    assert norm.running_mean.tolist() == [99.0] and norm.num_batches_tracked == 0


def test_modes_and_weights_stay_whatever_happens():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    network[2].eval()
    weights = [p.clone() for p in network.parameters()]

    def failing():
        yield torch.rand(2, 3, 4, 4)
        raise OSError

    with pytest.raises(OSError):
        recalibrate_batch_norms(network, failing())
    assert [network[n].training for n in (1, 2)] == [True, False]
    assert network[1].momentum == 0.1
    assert all(map(torch.equal, network.parameters(), weights))


def test_batches_are_spread_evenly_and_the_same_each_time(scenes):
    dataset = DetectionDataset(open_index(scenes, "train"), build_resize((64, 64), "letterbox"))
    seen = torch.stack([torch.from_numpy(dataset[n].image) for n in range(8)]).permute(0, 3, 1, 2) / 255

    def batches(*arguments):
        found = calibration_batches(dataset, *arguments, device=torch.device("cpu"), number=2)
        return [batch.images for batch in found]

    assert [len(batch) for batch in batches(3)] == [3, 3]
    assert torch.allclose(torch.cat(batches(2)), seen[[0, 2, 4, 6]])
    assert [len(batch) for batch in batches(6)] == [6]  # two more would be a batch of their own, too small
    assert all(map(torch.equal, batches(3), batches(3)))


def test_statistics_of_a_detector_fit_its_images(build_tiny, images):
    detector = build_tiny().eval()
    recalibrate_batch_norms(detector, [images])
    seen = []
    # a copy, as a ReLU in place follows
    detector.backbone.body.conv1[1].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad():
        detector(images)
    # normalised by the statistics of these very images: zero mean, unit variance a channel
    assert torch.allclose(seen[0].mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(seen[0].std(dim=(0, 2, 3)), torch.ones(16), atol=1e-2)


def test_fewer_batches_of_large_images_are_needed():
    assert batches_needed(8, (640, 640)) == 1
    assert batches_needed(2, (640, 640)) == 4
    assert batches_needed(4, (96, 96)) == 8
    assert batches_needed(16, (2000, 2000)) == 1


def test_a_student_takes_its_averages_statistics_and_nothing_else(build_tiny):
    source, target = build_tiny(seed=0), build_tiny(seed=1)
    for name, buffer in source.named_buffers():
        if "running" in name:
            buffer.fill_(3.0)
    weights = [p.clone() for p in target.parameters()]
    share_statistics(source, target)
    found = [buffer for name, buffer in target.named_buffers() if "running" in name]
    assert found and all((buffer == 3.0).all() for buffer in found)
    assert all(map(torch.equal, target.parameters(), weights))
