"""What a teacher detects, in the form of ground truth."""

from torch import Tensor

from students import DenseOutput, Detector


def label_images(
    detector: Detector, output: DenseOutput, image_size: tuple[int, int], score_threshold: float
) -> list[dict[str, Tensor]]:
    """A target an image, see `Detector.loss`: `boxes`, `labels`, and as `scores` how sure the teacher is of each.

    Args:
        detector: the teacher.
        output: what it made of the images.
        image_size: height and width of the batch, pixels.
        score_threshold: lower detections are left out.
    """
    targets = []
    for found in detector.decode(output, [image_size] * len(output.features[0])):
        keep = found.scores >= score_threshold
        targets.append({"boxes": found.boxes[keep], "labels": found.labels[keep], "scores": found.scores[keep]})
    return targets
