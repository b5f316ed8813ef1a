"""What machines do in the middle of a run, in words that say what to change."""

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from distill.data import UnreadableImageError, being_read
from distill.errors import UserError
from distill.run_folder import RunFolder
from distill.schema import Config
from teachers import CacheError

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}


@contextmanager
def in_plain_words(config: Config, loader: DataLoader) -> Iterator[None]:
    """Raises a UserError for memory that is full, a disk that refuses, a loader or another process that died.

    Args:
        config: the run's settings.
        loader: of its training images.
    """
    resume = _resume(config)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(config, error) from error
    except (EOFError, ConnectionError) as error:  # on the way from a loader's process to this one
        raise _loader_died(config, loader) from error
    except UnreadableImageError as error:
        raise UserError(f"{error}; mend that, and {resume}") from error
    except CacheError as error:
        raise UserError(f"cache: {error}; {resume}") from error
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        # one that was open already is not named; the log is such a file
        where = error.filename or f"output_dir: {config.output_dir}"
        raise UserError(f"{where}: {error.strerror}; mend that, and {resume}") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise _loader_died(config, loader) from error
        if "DefaultCPUAllocator" in str(error):  # there is no class of it
            raise _out_of_memory(config, error) from error
        if is_of_peer(error):
            raise UserError(f"another process of this run ended, and this one cannot go on alone; {resume}") from error
        raise


def is_of_peer(error: RuntimeError) -> bool:
    """Whether it tells that another process is there no longer."""
    of_gloo = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in of_gloo)


def _out_of_memory(config: Config, error: RuntimeError) -> UserError:
    return UserError(
        f"data.batch_size: a step does not fit into the device's memory ({_first_line(error)}); lower it from "
        f"{config.data.batch_size}, or data.image_size from {list(config.data.image_size)}, with more gradient "
        f"accumulation in its place, and {_resume(config)}"
    )


def _loader_died(config: Config, loader: DataLoader) -> UserError:
    abandon_loaders()
    files = ", ".join(being_read(loader)) or "an unknown image"
    return UserError(
        f"data.workers: a process that loads images died while these were read: {files}; look at the files, or lower "
        f"data.workers from {config.data.workers} if memory is short, and {_resume(config)}"
    )


def abandon_loaders() -> None:
    """Ends all processes that load images, at once: a dead one may hold a lock that a tidy end would wait for."""
    for thing in gc.get_objects():
        if type(thing) is _MultiProcessingDataLoaderIter:
            thing._shutdown = True
            for worker in thing._workers:
                worker.kill()


def _resume(config: Config) -> str:
    return f"go on from the last checkpoint: train.py --resume {RunFolder(config.output_dir).outermost}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
