"""Gives teachers their caches: what a cache's records depend on, and what they take of the disk."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from distill.config import flatten
from distill.data import DetectionIndex
from distill.distiller import Distiller
from distill.distributed import on_main
from distill.errors import UserError
from distill.factory import Data
from distill.footprint import human_bytes
from distill.guards import fingerprint
from distill.measure import eval_mode
from distill.report import counted
from distill.schema import Config
from students import Detector
from teachers import CacheError, Teacher, TeacherCache


@torch.no_grad()
def prepare_caches(
    config: Config,
    data: Data,
    unit: Distiller,
    detectors: Mapping[str, Detector],
    warn: Callable[[str], None],
    untrained: Collection[str] = (),
) -> dict[str, TeacherCache]:
    """The cache of each teacher that has one, by name; nothing is written yet.

    Args:
        config: of the run.
        data: its images.
        unit: the student with its terms, which say what is remembered.
        detectors: the teachers, by name.
        warn: is told if a disk is full later.
        untrained: names of those whose weights are not known yet.

    Raises:
        UserError: a folder is of something else, a disk has not enough left, or a teacher has no terms.
    """
    caches = {}
    for name, detector in detectors.items():
        folder, key = config.all_teachers[name].cache, f"{config.teacher_key(name)}.cache"
        if folder is None:
            continue
        wanted = unit.reads(name, detector, data.unlabelled is not None)
        if not wanted:
            raise UserError(f"{key}: no loss goes by this teacher; leave it out, or add one to losses")
        with eval_mode(detector):  # some layers refuse a single image where maps are of one cell
            output = detector(torch.zeros(2, 3, *config.data.image_size, device=next(detector.parameters()).device))
        identity = describe(config, data, name, detector) | ({"teacher's weights": None} if name in untrained else {})
        images, views = sum(map(len, trained_on(data))), config.data.augment.views
        try:
            cache = caches[name] = TeacherCache(folder, identity, output, wanted, images, views, warn)
        except CacheError as error:
            raise UserError(f"{key}: {error}") from None
        if cache.missing_bytes > cache.free_bytes:
            raise UserError(
                f"{key}: {cost(cache)}, and {human_bytes(cache.free_bytes)} are free there; name a folder on another "
                f"disk, lower data.augment.views, or give its losses fewer levels"
            )
    return caches


def open_caches(
    config: Config, caches: Mapping[str, TeacherCache], teachers: Mapping[str, Teacher], accelerator: Accelerator
) -> None:
    """Makes the folders that are not there, and lets the teachers go by them; every process has to call it.

    Raises:
        UserError: a folder that cannot be written to.
    """

    def create(name: str, cache: TeacherCache) -> None:
        try:
            cache.create()
        except CacheError as error:
            raise UserError(f"{config.teacher_key(name)}.cache: {error}") from None

    for name, cache in caches.items():
        on_main(accelerator, partial(create, name, cache))
        cache.open()
        teachers[name].cache = cache


def cost(cache: TeacherCache) -> str:
    """What a cache takes of the disk, such as '205 images x 3 views x 1.30 MB = 799.50 MB, 0 of 615 records there'."""
    images = counted(cache.records // cache.views, "image")
    size = f"{images} x {counted(cache.views, 'view')} x {human_bytes(cache.record_bytes)}"
    total = human_bytes(cache.records * cache.record_bytes)
    return f"{cache.folder}: {size} = {total}, {cache.filled} of {counted(cache.records, 'record')} there"


def describe(config: Config, data: Data, name: str, detector: Detector) -> dict[str, Any]:
    """All that a teacher's outputs depend on, by a name for messages."""
    settings = config.all_teachers[name]
    recipe = {key: value for key, value in detector.recipe.items() if key != "weights"}  # what it started from
    structure = {"recipe": recipe, "plans": [plan.to_json() for plan in detector.plans]}
    return {
        "teacher": detector.title,
        "teacher's weights": fingerprint(detector),
        "teacher's structure": hash_of(json.dumps(structure, sort_keys=True, default=str).encode()),
        "teacher's normalization": json.dumps(detector.normalization),
        "teacher's image_size": list(settings.image_size or config.data.image_size),
        "teacher's precision": settings.precision,
        "data.image_size": list(config.data.image_size),
        "data.resize": config.data.resize,
        **flatten(config.data.augment.model_dump(exclude={"views"}), "data.augment."),
        "seed": config.seed,
        "image files": hash_of(*(x for index in trained_on(data) for x in (index.files, index.sizes))),
    }


def trained_on(data: Data) -> list[DetectionIndex]:
    """The indices of all images that are trained on, in the order of their numbers."""
    return list({id(index): index for index in (data.train.index, data.unlabelled) if index is not None}.values())


def hash_of(*contents: bytes | np.ndarray) -> str:
    """SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes())
    return digest.hexdigest()
