"""What a run is made of."""

from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from distill.data import Batch
from distill.distiller import Distiller
from distill.factory import Data
from distill.interruption import Interruption
from distill.precision import Way
from distill.pruning.blocks import BlockPruner
from distill.pruning.guard import CutGuard
from distill.pruning.masks import Masks
from distill.pruning.pruner import Pruner
from distill.pruning.recalibrate import batches_needed, calibration_batches
from distill.pruning.sparsity import SparsityPenalty
from distill.report import Report
from distill.run_folder import RunFolder
from distill.schema import Config
from teachers import Teacher


@dataclass
class Run:
    """All that training needs; what the settings do not ask for is None.

    Attributes:
        unit: the student with its knowledge terms.
        teachers: by name; none in plain training.
        guard: of the cuts.
        role: of the detector that is trained: student or teacher.
        way: that its passes run in; Accelerate's mixed precision comes on top.
    """

    config: Config
    data: Data
    unit: Distiller
    teachers: dict[str, Teacher]
    pruner: Pruner | None
    blocks: BlockPruner | None
    sparsity: SparsityPenalty | None
    masks: Masks | None
    guard: CutGuard | None
    folder: RunFolder
    report: Report
    accelerator: Accelerator
    interruption: Interruption
    role: str
    way: Way

    def calibration_images(self) -> Iterator[Tensor]:
        """As many of them as statistics of channels take."""
        data = self.config.data
        for batch in self.calibration_batches(batches_needed(data.batch_size, data.image_size)):
            yield batch.images

    def calibration_batches(self, number: int = 8) -> Iterator[Batch]:
        """Training images, the same ones on every call and rank."""
        dataset, size = self.data.train.loader.dataset, self.config.data.batch_size
        return calibration_batches(dataset, size, self.accelerator.device, number)
