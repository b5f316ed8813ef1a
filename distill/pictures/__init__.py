"""What a run looks like: charts and sheets as PNGs, and a page that holds them all."""

from distill.pictures.album import Album
from distill.pictures.folder import PICTURES, draw_run

__all__ = ["PICTURES", "Album", "draw_run"]
