"""Settings of the data: where they are, how they are augmented, which go without labels."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from distill.schema.base import Count, ImageSize, Number, Section, Seed, Share


class AugmentConfig(Section):
    """Training-time augmentation; probabilities are per image, strengths are those of albumentations' ColorJitter."""

    horizontal_flip: Share = 0.5
    vertical_flip: Share = 0.0
    crop: Share = 0.0
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    zoom_out: Share = 0.0
    mosaic: Share = 0.0  # four images as one
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Share = 0.0
    views: Count | None = None  # of an image, which epochs show in turns; another one in every epoch if null


class SyntheticConfig(Section):
    """Drawn scenes, written to `data.root` on first use."""

    train: Count = 400
    val: Count = 100
    size: Annotated[int, Field(ge=42)] = 160
    seed: Seed = 0


class UnlabelledConfig(Section):
    """Images that only teachers say something about: all of a folder, or those of a data set's split."""

    root: str
    split: str | None = None  # of the data set in root; its annotations are not looked at
    ratio: Number = 0.5  # share of these in what is trained on; the rest is labelled
    score_threshold: Share = 0.3  # of a teacher's detections that stand in where a loss goes by boxes

    @field_validator("ratio")
    @classmethod
    def _mixed(cls, value: float) -> float:
        if not 0.01 <= value <= 0.99:
            raise ValueError(
                f"found {value:g}; it goes from 0.01 to 0.99 (for no labelled images say data.train=null, for no "
                "unlabelled ones data.unlabelled=null)"
            )
        return value


class DataConfig(Section):
    root: str
    train: str | None = "train"  # null trains on unlabelled images alone
    val: str = "val"
    test: str | None = None
    image_size: ImageSize
    resize: Literal["letterbox", "stretch"] = "letterbox"
    classes: list[str] | None = None
    class_map: dict[str, str | None] = {}
    unreadable: Literal["error", "skip"] = "error"
    batch_size: Count = 8
    workers: Annotated[int, Field(ge=0, strict=True)] = 2
    augment: AugmentConfig = AugmentConfig()
    unlabelled: UnlabelledConfig | None = None
    synthetic: SyntheticConfig | None = None

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "DataConfig":
        if self.train is None and self.unlabelled is None:
            raise ValueError("train is null and there are no unlabelled images; name a split, such as data.train=train")
        return self
