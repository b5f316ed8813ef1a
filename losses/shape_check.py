"""One wording for the mistake that every loss can be handed: tensors that do not line up."""

from torch import Tensor, nn


def require_same_shape(name: str, first: Tensor, second: Tensor) -> None:
    """Refuses two tensors that would only match by broadcasting, if at all.

    Args:
        name: the loss and its two arguments, for the message.
        first: any shape.
        second: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"{name}: shapes {tuple(first.shape)} and {tuple(second.shape)} differ; they must be equal")


def require_feature_map(name: str, features: Tensor) -> None:
    """Refuses what is not a map of at least one value: its mean would be NaN, and spoil the whole run.

    Args:
        name: the loss, for the message.
        features: (B, C, H, W).

    Raises:
        ValueError: another number of dimensions, or no elements.
    """
    if features.dim() != 4 or not features.numel():
        raise ValueError(f"{name}: a feature map has shape {tuple(features.shape)}; it must be (B, C, H, W), not empty")


def require_channels(name: str, features: Tensor, layer: nn.Conv2d) -> None:
    """Refuses a map that is not as wide as a loss with layers of its own was built for.

    Args:
        name: the loss, for the message.
        features: (B, C, H, W).
        layer: the first that the map goes through. Its weight says what it takes, also after a cut.

    Raises:
        ValueError: another number of channels.
    """
    wanted = layer.weight.shape[1]
    if features.shape[1] != wanted:
        raise ValueError(
            f"{name}: a map of shape {tuple(features.shape)} has {features.shape[1]} channels, but the loss was built "
            f"for {wanted}; they must be equal"
        )


def require_weight(name: str, weight: Tensor, values: Tensor, item_dims: int) -> None:
    """Refuses weights that are not one number an item.

    Args:
        name: the loss, for the message.
        weight: (...).
        values: (..., item), what is weighted.
        item_dims: how many dimensions an item has, 1 for a box.

    Raises:
        ValueError: `weight` has another shape than the leading dimensions of `values`.
    """
    expected = values.shape[: values.dim() - item_dims]
    if weight.shape != expected:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)} for values {tuple(values.shape)}; it must be "
            f"{tuple(expected)}, one number an item"
        )


def require_same_locations(name: str, student: Tensor, teacher: Tensor) -> None:
    """Refuses two maps that show different images or locations; their channels may differ.

    Args:
        name: the loss, for the message.
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W).

    Raises:
        ValueError: one is no feature map, or batch, height or width differ.
    """
    for features in (student, teacher):
        require_feature_map(name, features)
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"{name}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in "
            "batch, height and width; only the channels may differ"
        )


def require_location_weights(name: str, weights: Tensor, features: Tensor) -> None:
    """Refuses weights that are not one number a location.

    Args:
        name: the loss and what it calls its weights, for the message.
        weights: (B, H, W).
        features: (B, C, H, W).

    Raises:
        ValueError: any other shape.
    """
    wanted = (features.shape[0], *features.shape[2:])
    if weights.shape != wanted:
        raise ValueError(
            f"{name}: shape {tuple(weights.shape)} for features {tuple(features.shape)}; it must be {wanted}, one "
            "number a location"
        )
