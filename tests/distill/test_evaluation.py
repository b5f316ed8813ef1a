import copy
import json
import os
import socket
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator

from distill.data import Batch, ImageMeta
from distill.errors import UserError
from distill.evaluation import BACKENDS, DetectionEvaluator, run_evaluation
from students import Detections, Detector

CLASSES = ["cat", "dog"]
LARGE = [0, 0, 100, 100]  # xywh here, xyxy there: the boxes of these tests begin at the origin or say so
PERFECT = pytest.approx(1.0)  # pycocotools adds an epsilon below its division


def make_ground_truth(*objects: tuple, num_images: int = 2) -> dict:
    """COCO's json form, of (image id, category id, xywh) or (image id, category id, xywh, is it a crowd) each."""
    return {
        "images": [{"id": image_id, "width": 500, "height": 500} for image_id in range(1, num_images + 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(map(float, box)),
                "area": float(box[2] * box[3]),
                "iscrowd": int(bool(crowd)),
            }
            for number, (image_id, category_id, box, *crowd) in enumerate(objects, start=1)
        ],
    }


def make_detections(*rows: tuple[list[float], float, int]) -> Detections:
    """Of (xyxy, score, label) each."""
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long()
    )


def flat(result) -> list[float | None]:
    numbers = asdict(result)
    per_class, curves = numbers.pop("per_class"), numbers.pop("precision")
    return [*numbers.values(), *per_class.values(), *(x for curve in curves.values() for x in curve or [None])]


def evaluate(ground_truth: dict, detections: dict[int, Detections]):
    """By every backend, which must all say the same."""
    results = []
    for backend in BACKENDS:
        evaluator = DetectionEvaluator(ground_truth, CLASSES, backend)
        evaluator.process(list(detections), list(detections.values()))
        results.append(evaluator.evaluate())
    for result in results:
        assert flat(result) == pytest.approx(flat(results[0]), abs=1e-12)  # one of them adds a tiny number somewhere
    return results[0]


def test_backends_agree_on_any_detections():
    assert list(BACKENDS) == ["pycocotools", "faster_coco_eval"], "pip install -e '.[test]'"
    chance = np.random.default_rng(0)
    boxes = lambda n: (chance.random((n, 2)) * 80).repeat(2, 1)[:, [0, 2, 1, 3]] + [0, 0, 30, 30]  # noqa: E731
    truth = [(image, int(chance.integers(1, 3)), [*box[:2], 30, 30]) for image in (1, 2) for box in boxes(12)]
    found = {
        image: make_detections(
            *((box.tolist(), float(np.float32(chance.random())), int(chance.integers(2))) for box in boxes(40))
        )
        for image in (1, 2)
    }
    assert 0 < evaluate(make_ground_truth(*truth), found).ap < 1


def test_perfect_detections():
    ground_truth = make_ground_truth((1, 1, [10, 20, 100, 100]), (1, 2, [200, 20, 50, 50]), (2, 1, [5, 5, 20, 10]))
    result = evaluate(
        ground_truth,
        {
            1: make_detections(([10, 20, 110, 120], 0.9, 0), ([200, 20, 250, 70], 0.8, 1)),
            2: make_detections(([5, 5, 25, 15], 0.7, 0)),
        },
    )
    assert asdict(result) == {
        "ap": PERFECT,
        "ap50": PERFECT,
        "ap75": PERFECT,
        "ap_small": PERFECT,
        "ap_medium": PERFECT,
        "ap_large": PERFECT,
        "per_class": {"cat": PERFECT, "dog": PERFECT},
        "precision": {"0.50": [1.0] * 101, "0.75": [1.0] * 101},
    }


def test_half_the_objects_found():
    result = evaluate(make_ground_truth((1, 1, LARGE), (2, 1, LARGE)), {1: make_detections((LARGE, 0.9, 0))})
    # Precision 1 up to recall 0.5: the 51 recall points 0, 0.01 ... 0.50 of 101.
    assert result.ap == pytest.approx(51 / 101)
    assert result.ap50 == pytest.approx(51 / 101)


def test_second_detection_of_an_object_is_false():
    detections = make_detections((LARGE, 0.9, 0), (LARGE, 0.8, 0), ([200, 200, 300, 300], 0.7, 0))
    result = evaluate(make_ground_truth((1, 1, LARGE), (1, 1, [200, 200, 100, 100])), {1: detections})
    # Precision 1 up to recall 0.5, then 2 of 3 are right: (51 * 1 + 50 * 2/3) / 101.
    assert result.ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_iou_thresholds():
    # 62 of the object's 100 columns: IoU 0.62, right at 0.50, 0.55 and 0.60 of the ten thresholds.
    result = evaluate(make_ground_truth((1, 1, LARGE)), {1: make_detections(([0, 0, 62, 100], 0.9, 0))})
    assert (result.ap, result.ap50, result.ap75) == (pytest.approx(0.3), PERFECT, 0.0)
    assert result.precision == {"0.50": [1.0] * 101, "0.75": [0.0] * 101}


def test_precision_at_each_recall_is_the_mean_over_the_classes():
    # A cat of two is found: precision 1 up to recall 0.5. The dog is found second: 1 of 2 is right at every recall.
    ground_truth = make_ground_truth((1, 1, LARGE), (2, 1, LARGE), (1, 2, LARGE))
    dogs = [([200, 200, 300, 300], 0.9, 1), (LARGE, 0.8, 1)]
    precision = evaluate(ground_truth, {1: make_detections((LARGE, 0.9, 0), *dogs)}).precision
    assert precision["0.50"] == [0.75] * 51 + [0.25] * 50


def test_false_positives_in_an_image_without_boxes():
    ground_truth = make_ground_truth((1, 1, LARGE))
    found, false = make_detections((LARGE, 0.5, 0)), make_detections((LARGE, 0.9, 0))
    assert evaluate(ground_truth, {1: found, 2: make_detections()}).ap == PERFECT
    assert evaluate(ground_truth, {1: found, 2: false}).ap == pytest.approx(0.5)  # 1 of 2 is right at every recall


def test_crowds_are_neither_hit_nor_miss():
    objects, crowd = [(1, 1, LARGE)], (1, 1, [200, 200, 200, 200], True)
    in_crowd = ([220, 220, 280, 280], 0.9, 0)
    detections = {1: make_detections(in_crowd, (LARGE, 0.5, 0))}
    assert evaluate(make_ground_truth(*objects, crowd), detections).ap == PERFECT
    assert evaluate(make_ground_truth(*objects), detections).ap == pytest.approx(0.5)
    # Not found, the crowd is not missed.
    assert evaluate(make_ground_truth(*objects, crowd), {1: make_detections((LARGE, 0.5, 0))}).ap == PERFECT


def test_sizes_and_classes_that_cannot_be_measured_are_none():
    ground_truth = make_ground_truth((1, 1, [0, 0, 10, 10]), (2, 1, LARGE))
    result = evaluate(ground_truth, {1: make_detections(([0, 0, 10, 10], 0.9, 0))})
    assert (result.ap_small, result.ap_medium, result.ap_large) == (PERFECT, None, 0.0)
    assert result.per_class == {"cat": pytest.approx(51 / 101), "dog": None}
    assert json.loads(json.dumps(asdict(result))) == asdict(result)

    nothing = evaluate(make_ground_truth(), {1: make_detections((LARGE, 0.9, 0))})
    assert nothing.ap is None and nothing.per_class == {"cat": None, "dog": None}
    assert nothing.precision == {"0.50": None, "0.75": None}


@pytest.mark.parametrize("detections", [{}, {1: make_detections(), 2: make_detections()}], ids=["unseen", "empty"])
def test_no_detections_at_all(detections):
    result = evaluate(make_ground_truth((1, 1, LARGE)), detections)
    assert (result.ap, result.ap50, result.ap75, result.ap_large) == (0.0, 0.0, 0.0, 0.0)
    assert result.per_class == {"cat": 0.0, "dog": None}


def test_label_is_the_position_of_the_category():
    ground_truth = make_ground_truth((1, 7, LARGE))
    ground_truth["categories"] = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert evaluate(ground_truth, {1: make_detections((LARGE, 0.9, 0))}).per_class == {"cat": PERFECT, "dog": None}
    assert evaluate(ground_truth, {1: make_detections((LARGE, 0.9, 1))}).per_class == {"cat": 0.0, "dog": None}


def test_any_ids_and_no_optional_keys():
    ground_truth = {
        "images": [{"id": "b.jpg"}, {"id": "a.jpg"}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 5, "name": "dog"}],
        # pycocotools alone would take the match with annotation 0 for no match
        "annotations": [{"id": 0, "image_id": "a.jpg", "category_id": 0, "bbox": [0, 0, 10, 10]}],
    }
    before = copy.deepcopy(ground_truth)
    result = evaluate(ground_truth, {"a.jpg": make_detections(([0, 0, 10, 10], 0.9, 0))})
    assert result.ap == result.ap_small == PERFECT
    assert ground_truth == before


def test_images_processed_twice_count_once():
    evaluator = DetectionEvaluator(make_ground_truth((1, 1, LARGE), (2, 1, LARGE)), CLASSES)
    found = make_detections((LARGE, 0.9, 0))
    evaluator.process([1, 1], [found, found])
    evaluator.process([1, 2], [found, found])
    assert evaluator.evaluate().ap == PERFECT  # the detections of image 1 three times would be false twice


def test_payloads_merge_into_one_result():
    ground_truth = make_ground_truth((1, 1, LARGE), (2, 1, LARGE), (3, 1, LARGE), num_images=3)
    found = make_detections((LARGE, 0.9, 0))
    ranks = [DetectionEvaluator(ground_truth, CLASSES) for _ in range(2)]
    ranks[0].process([1, 3], [found, make_detections()])
    ranks[1].process([2, 1], [found, found])  # the sampler filled up with image 1
    payload = ranks[0].payload() + ranks[1].payload()
    for evaluator in ranks:
        evaluator.merge(payload)
        # Two of three found at precision 1: the recall points up to 0.66 are 67.
        assert evaluator.evaluate().ap == pytest.approx(67 / 101)


def test_reset_forgets():
    evaluator = DetectionEvaluator(make_ground_truth((1, 1, LARGE)), CLASSES)
    evaluator.process([1], [make_detections((LARGE, 0.9, 0))])
    assert evaluator.evaluate().ap == PERFECT
    evaluator.reset()
    assert evaluator.evaluate().ap == 0.0


def test_nothing_is_printed(capfd):
    evaluate(make_ground_truth((1, 1, LARGE)), {1: make_detections((LARGE, 0.9, 0))})
    evaluate(make_ground_truth((1, 1, LARGE)), {})
    assert capfd.readouterr() == ("", "")


def test_mistakes_are_named():
    ground_truth = make_ground_truth()
    with pytest.raises(UserError, match=r"classes \['dog', 'cat'\] are not those of the data set, \['cat', 'dog'\]"):
        DetectionEvaluator(ground_truth, ["dog", "cat"])
    evaluator = DetectionEvaluator(ground_truth, CLASSES)
    with pytest.raises(ValueError, match="image 99 is not in the ground truth"):
        evaluator.process([99], [make_detections()])
    with pytest.raises(ValueError, match="labels from 0 to 2; there are 2 classes"):
        evaluator.process([1], [make_detections((LARGE, 0.9, 0), (LARGE, 0.9, 2))])
    with pytest.raises(ValueError, match="1 image ids, but detections of 2 images"):
        evaluator.process([1], [make_detections()] * 2)


class Oracle(Detector):
    """Reads an image's number from its pixels, and gives the detections it was told for it, in input pixels."""

    strides = feature_channels = output_layers = ()
    normalization = ((0.0,) * 3, (1.0,) * 3)

    def __init__(self, answers: dict[int, Detections]):
        super().__init__()
        self.class_names = CLASSES
        self.norm = torch.nn.BatchNorm2d(3)
        self.answers = answers
        self.seen = []
        self.image_sizes = []

    def forward(self, images):
        self.seen.append((self.training, not torch.is_grad_enabled()))
        return images

    def loss(self, output, targets):
        raise NotImplementedError

    def decode(self, output, image_sizes):
        self.image_sizes.append(image_sizes)
        detections = []
        for image, (height, width) in zip(output, image_sizes, strict=True):
            found = self.answers[int(image[0, 0, 0])]
            limit = torch.tensor([width, height, width, height])
            detections.append(Detections(found.boxes.minimum(limit), found.scores, found.labels))
        return detections


def make_batch(*metas: ImageMeta) -> Batch:
    images = torch.stack([torch.full((3, 8, 8), float(meta.image_id)) for meta in metas]) if metas else torch.empty(0)
    return Batch(images=images, targets=[], metas=list(metas), unreadable=[])


def make_meta(image_id: int, **fit) -> ImageMeta:
    whole = {"original_size": (500, 500), "scale": (1.0, 1.0), "offset": (0, 0), "valid_size": (500, 500)}
    return ImageMeta(image_id=image_id, file=f"{image_id}.jpg", **(whole | fit))


def test_run_evaluation_maps_boxes_to_the_original_image():
    ground_truth = make_ground_truth((1, 1, [20, 40, 40, 80]), (2, 2, [40, 20, 160, 180]))
    # Image 1 has 200 rows and 100 columns, at half size and padded on the right. Image 2 has 200 of both, squeezed to
    # 100 and 25, 10 columns from the left; its detection reaches beyond and is clipped to column 10 + 25.
    metas = (
        make_meta(1, original_size=(200, 100), scale=(0.5, 0.5), valid_size=(100, 50)),
        make_meta(2, original_size=(200, 200), scale=(0.125, 0.5), offset=(10, 0), valid_size=(100, 35)),
    )
    detector = Oracle({1: make_detections(([10, 20, 30, 60], 0.9, 0)), 2: make_detections(([15, 10, 90, 900], 0.8, 1))})
    evaluator = DetectionEvaluator(ground_truth, CLASSES)
    result = run_evaluation(detector, [make_batch(metas[0]), make_batch(), make_batch(metas[1])], evaluator)
    assert result.per_class == {"cat": PERFECT, "dog": PERFECT}
    assert detector.image_sizes == [[(100, 50)], [(100, 35)]]  # what is not padding; none of the empty batch
    assert evaluator.payload()[1][1][0, :4].tolist() == [40, 20, 200, 200]


def test_run_evaluation_leaves_the_detector_as_it_was_and_starts_afresh():
    detector = Oracle({1: make_detections((LARGE, 0.9, 0)), 2: make_detections((LARGE, 0.9, 0))})
    detector.train()
    detector.norm.eval()
    evaluator = DetectionEvaluator(make_ground_truth((1, 1, LARGE), (2, 1, LARGE)), CLASSES)
    assert run_evaluation(detector, [make_batch(make_meta(1), make_meta(2))], evaluator).ap == PERFECT
    assert run_evaluation(detector, [make_batch(make_meta(1))], evaluator).ap == pytest.approx(51 / 101)
    assert detector.seen == [(False, True)] * 2
    assert detector.training and not detector.norm.training


def _run_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = Accelerator(cpu=True)
    found = make_detections((LARGE, 0.9, 0))
    detector = accelerator.prepare(Oracle({1: found, 2: found, 3: make_detections()}))
    assert not isinstance(detector, Oracle)  # it has to be unwrapped to decode
    ground_truth = make_ground_truth((1, 1, LARGE), (2, 1, LARGE), (3, 1, LARGE), num_images=3)
    shares = [(1, 3), (2, 1)]  # the second rank's is filled up with image 1
    loader = [make_batch(*map(make_meta, shares[rank]))]
    result = run_evaluation(detector, loader, DetectionEvaluator(ground_truth, CLASSES), accelerator)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(asdict(result), file)
    accelerator.end_training()


def test_two_ranks_agree_on_one_result(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(_run_rank, args=(port, str(tmp_path)), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["ap"] == pytest.approx(67 / 101)  # two of three, whatever rank saw them
