"""What all sections of a config are made of: bounded numbers, sizes, and a model that knows its keys."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"found {value}; a number is needed")
    return value


def _height_and_width(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError(f"found {value}; give [height, width] in pixels, or one number for a square")
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


# words such as 1e-3, which YAML does not take for a number, pass; bools and infinity, which are never meant, do not
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
Epoch = Annotated[int, Field(ge=0, strict=True)]
Pixels = Annotated[int, Field(ge=32, strict=True)]
ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(_height_and_width)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
