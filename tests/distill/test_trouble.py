"""What goes wrong in the middle of a run is told in one line that names what to change."""

import errno
import os
import signal
import time

import pytest
import torch

from distill.data import UnreadableImageError
from distill.errors import UserError
from distill.factory import build_data
from distill.schema import Config
from distill.trouble import in_plain_words


@pytest.fixture
def config(settings):
    settings["data"] |= {"workers": 1, "batch_size": 2}
    return Config(**settings)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ("data.batch_size", "lower it from 2")),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
            ("data.batch_size", "lower it from 2", "you tried"),
        ),
        (UnreadableImageError("a.jpg: the image does not exist"), ("a.jpg: the image does not exist; mend that",)),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/results.csv"),
            ("runs/x/results.csv: No space left",),
        ),
        (RuntimeError("[...] Connection closed by peer [127.0.0.1]:1"), ("another process",)),
    ],
)
def test_what_is_said(config, error, words):
    with pytest.raises(UserError) as raised, in_plain_words(config, loader=None):
        raise error
    said = str(raised.value)
    assert "\n" not in said and f"--resume {config.output_dir}" in said
    for word in words:
        assert word in said


def test_what_nobody_can_mend_is_left_as_it_is(config):
    for error in (RuntimeError("shape"), OSError(errno.ECHILD, "no child", "x"), ValueError("no")):
        with pytest.raises(type(error)) as raised, in_plain_words(config, loader=None):
            raise error
        assert raised.value is error


def test_a_loader_process_that_dies_names_the_image(config):
    loader = build_data(config.data).train.loader
    with pytest.raises(UserError) as raised, in_plain_words(config, loader):
        iterator = iter(loader)
        next(iterator)
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(30)  # torch tells of it by a signal
    said = str(raised.value)
    assert iterator._shutdown  # or its end could wait for a lock that the dead process holds
    assert said.startswith("data.workers: a process") and "scenes/images/" in said and "\n" not in said
