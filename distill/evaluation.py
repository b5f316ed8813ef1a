"""What a detector is worth: COCO average precision, measured by pycocotools, or by faster-coco-eval where it is."""

import contextlib
import io
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    import faster_coco_eval
except ImportError:  # the [fast] extra
    faster_coco_eval = None

from distill.data import Batch, to_original
from distill.distributed import share_buffers
from distill.errors import UserError
from distill.factory import Split
from distill.measure import eval_mode
from students import Detections, Detector

# what compares detections with ground truth; all give the same numbers, later ones faster
BACKENDS = {"pycocotools": (COCO, COCOeval)}
if faster_coco_eval is not None:
    BACKENDS["faster_coco_eval"] = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


@dataclass(frozen=True)
class EvaluationResult:
    """COCO average precision in [0, 1], over IoU 0.50 to 0.95 unless said otherwise; `dataclasses.asdict` fits JSON.

    None stands for "cannot be measured": no object of that class or size is in the ground truth.

    Attributes:
        ap: mean over classes and IoU thresholds.
        ap50: at IoU 0.50.
        ap75: at IoU 0.75.
        ap_small: of objects with an area below 32^2 pixels of the original image.
        ap_medium: of objects between.
        ap_large: of objects with an area above 96^2 pixels.
        per_class: `ap` of each class by name.
        precision: at IoU '0.50' and '0.75', at recalls of 0, 0.01, ... 1: mean over the classes; None where nothing can
            be measured.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]
    precision: dict[str, list[float] | None]


class DetectionEvaluator:
    """Collects the detections of a data set, then compares them with its ground truth.

    All images of the ground truth count, at most their 100 best detections a class; an image that was never processed
    counts as one without detections. Of an image that was processed twice, the last detections count, once.

    Args:
        ground_truth: COCO's json form: `images`, `annotations`, `categories`. Label i is the category at position i,
            whatever its id; image ids may be anything hashable.
        class_names: the names that the detector's labels stand for.
        backend: a key of `BACKENDS`; the fastest that is installed if None.

    Raises:
        UserError: `class_names` are not the categories' names, in their order.
    """

    def __init__(self, ground_truth: dict, class_names: Sequence[str], backend: str | None = None):
        categories = [category["name"] for category in ground_truth["categories"]]
        if list(class_names) != categories:
            raise UserError(
                f"evaluation: the detector's classes {list(class_names)} are not those of the data set, {categories}; "
                "they must be the same, in the same order"
            )
        self.class_names = categories
        self._positions = {image["id"]: position for position, image in enumerate(ground_truth["images"])}
        self._table, self._comparison = BACKENDS[backend or list(BACKENDS)[-1]]
        self._ground_truth = self._index(_renumber(ground_truth, self._positions))
        self._detections: dict[Hashable, np.ndarray] = {}

    def reset(self) -> None:
        """Forgets all detections."""
        self._detections = {}

    def process(self, image_ids: Sequence[Hashable], detections: Sequence[Detections]) -> None:
        """Adds the detections of some images.

        Args:
            image_ids: one an image, as in the ground truth.
            detections: one an image; their boxes are in pixels of the *original* image, unlike a detector's.

        Raises:
            ValueError: the two differ in length, or the ground truth has no such image or label.
        """
        if len(image_ids) != len(detections):
            raise ValueError(f"process: {len(image_ids)} image ids, but detections of {len(detections)} images")
        for image_id, found in zip(image_ids, detections):
            if image_id not in self._positions:
                raise ValueError(f"process: image {image_id!r} is not in the ground truth")
            columns = [found.boxes.float(), found.scores.float()[:, None], found.labels.float()[:, None]]
            rows = torch.cat(columns, dim=1).cpu().numpy()  # (n, 6): x1, y1, x2, y2, score, label
            labels = rows[:, 5]
            if len(rows) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
                raise ValueError(
                    f"process: image {image_id!r} has labels from {labels.min():.0f} to {labels.max():.0f}; "
                    f"there are {len(self.class_names)} classes, from 0"
                )
            self._detections[image_id] = rows

    def payload(self) -> list[tuple[Hashable, np.ndarray]]:
        """Everything processed so far, one (image id, rows) an image; what ranks exchange with `gather_object`."""
        return list(self._detections.items())

    def merge(self, payload: list[tuple[Hashable, np.ndarray]]) -> None:
        """Adds other evaluators' payloads, joined into one list; an image that is in several counts once."""
        self._detections.update(payload)

    def evaluate(self) -> EvaluationResult:
        """Average precision of all detections so far."""
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._comparison(self._ground_truth, self._load_detections(), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU threshold, recall, class, object size, detections an image); the last entry of the last one is 100.
        precision = evaluation.eval["precision"][..., -1]
        return EvaluationResult(
            ap=_mean(precision[..., 0]),
            ap50=_mean(precision[0, ..., 0]),
            ap75=_mean(precision[5, ..., 0]),
            ap_small=_mean(precision[..., 1]),
            ap_medium=_mean(precision[..., 2]),
            ap_large=_mean(precision[..., 3]),
            per_class={name: _mean(precision[:, :, label, 0]) for label, name in enumerate(self.class_names)},
            precision={"0.50": _curve(precision[0, ..., 0]), "0.75": _curve(precision[5, ..., 0])},
        )

    def _load_detections(self) -> COCO:
        tables = [
            np.concatenate([np.full((len(rows), 1), self._positions[image_id]), rows.astype(np.float64)], axis=1)
            for image_id, rows in self._detections.items()
            if len(rows)
        ]
        if not tables:  # pycocotools cannot load an empty table
            return self._index({**self._ground_truth.dataset, "annotations": []})
        table = np.concatenate(tables)  # (N, 7): image, x1, y1, x2, y2, score, label
        table[:, 3:5] -= table[:, 1:3]  # COCO's boxes are x, y, width, height
        return self._ground_truth.loadRes(table)

    def _index(self, dataset: dict) -> COCO:
        coco = self._table()
        coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def detect(detector: Detector, batch: Batch) -> list[Detections]:
    """What a detector finds on each image of a batch, with boxes in pixels of the *original* image.

    Every submodule's train or eval mode is left as it was.

    Args:
        detector: runs on the device of its weights.
        batch: at least one image, as the evaluation transform fits it.
    """
    device = next(detector.parameters(), torch.empty(0)).device  # an exported one has no parameters
    with eval_mode(detector), torch.no_grad():  # sharded weights cannot be gathered in inference mode
        output = detector(batch.images.to(device, non_blocking=True))
        detections = detector.decode(output, [meta.valid_size for meta in batch.metas])
        return [replace(found, boxes=to_original(found.boxes, meta)) for found, meta in zip(detections, batch.metas)]


def run_evaluation(
    detector: Detector,
    loader: Iterable[Batch],
    evaluator: DetectionEvaluator,
    accelerator: Accelerator | None = None,
) -> EvaluationResult:
    """Evaluates `detector` on the images of `loader`; every submodule's train or eval mode is left as it was.

    Args:
        detector: may be wrapped by `accelerator`; it runs on the device of its weights.
        loader: batches of the data set whose ground truth `evaluator` holds. In a distributed run each rank sees its
            share of them.
        evaluator: reset first; holds all ranks' detections afterwards.
        accelerator: needed in a distributed run only. All ranks must call, and all return the same result.
    """
    if accelerator is not None:
        detector = accelerator.unwrap_model(detector)
    evaluator.reset()
    for batch in loader:
        if batch.metas:  # else none of its images could be read
            evaluator.process([meta.image_id for meta in batch.metas], detect(detector, batch))
    if accelerator is not None:
        evaluator.merge(gather_object(evaluator.payload()))
    return evaluator.evaluate()


def evaluation(split: Split, accelerator: Accelerator) -> Callable[[Detector], EvaluationResult]:
    """A function that says what a detector is worth on a split."""
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    loader = accelerator.prepare(split.loader)

    def evaluate(detector: Detector) -> EvaluationResult:
        share_buffers(accelerator, detector)
        return run_evaluation(detector, loader, evaluator, accelerator)

    return evaluate


def _renumber(ground_truth: dict, positions: dict[Hashable, int]) -> dict:
    """A copy whose image and category ids are positions; pycocotools writes to its input, and sorts by these ids.

    Annotation ids count from 1, because pycocotools takes a match with annotation 0 for no match.
    """
    labels = {category["id"]: label for label, category in enumerate(ground_truth["categories"])}
    return {
        "images": [{"id": position} for position in positions.values()],
        "categories": [{"id": label} for label in labels.values()],
        "annotations": [
            {
                "id": number,
                "image_id": positions[annotation["image_id"]],
                "category_id": labels[annotation["category_id"]],
                "bbox": annotation["bbox"],
                "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
                "iscrowd": annotation.get("iscrowd", 0),
            }
            for number, annotation in enumerate(ground_truth["annotations"], start=1)
        ],
    }


def _mean(precision: np.ndarray) -> float | None:
    """Mean over what could be measured; pycocotools marks the rest with -1."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else None


def _curve(precision: np.ndarray) -> list[float] | None:
    """Mean over the classes that could be measured, of (recall, class), to four digits."""
    measured = precision[:, (precision > -1).all(axis=0)]
    return measured.mean(axis=1).round(4).tolist() if measured.size else None
