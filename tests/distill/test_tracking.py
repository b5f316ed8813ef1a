import pytest
from accelerate.tracking import GeneralTracker, on_main_process

import train
from distill import tracking
from distill.config import check_config, flatten
from distill.errors import UserError
from distill.run_folder import RunFolder


def test_flatten():
    settings = {"a": {"b": {"c": 1}, "d": None}, "e": [3, 4], "f": True, "g": 0.5, "h": "x"}
    assert flatten(settings) == {"a.b.c": 1, "a.d": "None", "e": "[3, 4]", "f": True, "g": 0.5, "h": "x"}


def test_a_tracker_that_is_not_installed_is_one_line(settings, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    config = check_config(settings | {"tracking": ["trackio"]}, "a.yaml")
    with pytest.raises(UserError, match=r"^tracking: trackio is not installed; pip install trackio, or leave it out"):
        tracking.build_accelerator(config)


def test_a_tracker_that_is_unknown(settings):
    with pytest.raises(UserError, match=r"^a.yaml: tracking: 'tensorbord' is not allowed; choose 'tensorboard', "):
        check_config(settings | {"tracking": ["tensorbord"]}, "a.yaml")


class Recorder(GeneralTracker):
    """Keeps what it is sent."""

    name = "tensorboard"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings, self.rows, self.pictures, self.finished = {}, {}, {}, 0

    tracker = property(lambda self: self)

    @on_main_process
    def store_init_configuration(self, values):
        self.settings = values

    @on_main_process
    def log(self, values, step=None, **keywords):
        self.rows[step] = values

    @on_main_process
    def log_images(self, values, step=None, **keywords):
        self.pictures = {name: (picture.shape, step) for name, picture in values.items()}

    def finish(self):
        self.finished += 1


def test_trackers_get_the_rows_of_the_results(settings, monkeypatch):
    recorders = []

    def accelerator(config):
        recorders.append(Recorder())
        return tracking.Accelerator(log_with=[recorders[-1]])

    monkeypatch.setattr(train, "build_accelerator", accelerator)
    settings |= {"tracking": ["tensorboard"], "pruning": None}
    settings["train"]["epochs"] = 2
    train.train(check_config(settings, "a.yaml"))
    of_student, of_teacher = recorders  # a teacher that is trained first is a run of its own
    assert list(of_student.rows) == [1, 2] and list(of_teacher.rows) == [1]
    rows = RunFolder(settings["output_dir"]).read_results()
    for row in rows:
        sent = of_student.rows[row["epoch"]]
        assert sent == {key: pytest.approx(value) for key, value in row.items() if value is not None}
    assert {"task", "soft_label", "macs", "ap", "lr"} <= set(of_student.rows[1])
    assert of_student.settings["train.epochs"] == 2 and of_student.settings["teacher.detector.channels"] == 24
    assert of_student.pictures["batch"][0][0] == 1 and of_student.pictures["batch"][1] == 2
    assert of_student.finished == of_teacher.finished == 1
