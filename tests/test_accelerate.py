"""What Accelerate is asked for by its own settings: compiled passes, accumulation, precision; a sharded teacher."""

import copy
import json
import sys

import pytest
import torch
import yaml

import students
import train
from distill.checkpoint import find_checkpoints
from distill.data.shapes import CLASSES
from distill.distiller import Distiller
from distill.distributed import compile_parts
from teachers import Teacher


@pytest.fixture
def start(settings, build_tiny, monkeypatch, tmp_path):
    """`train.py` on two steps each of two epochs, with a cut before the second."""
    students.save(build_tiny(class_names=list(CLASSES), channels=24), tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "train": {"epochs": 2}}
    settings["pruning"] |= {"start": 1, "end": 1, "every": 1}
    monkeypatch.setattr("distill.pictures.album.Album.update", lambda *arguments, **more: None)

    def start(name, **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | changes | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
        return train.main()

    return start


def losses_of(run):
    rows = train.RunFolder(run).read_results()
    return torch.tensor([[row[name] for name in ("task", "soft_label", "box", "fpn_attention")] for row in rows])


def test_compiled_parts_leave_the_pyramid_in_the_graph(build_tiny, images, targets, on_processes, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")

    def differentiate(compiled):
        detector = build_tiny().eval()
        compile_parts([detector] * compiled)
        output = detector(images)
        copied = copy.deepcopy(detector).head._compiled_call_impl  # what is averaged, traced or cut in trial
        return torch.autograd.grad(sum(detector.loss(output, targets).values()), output.features), copied

    (theirs, _), (ended,) = differentiate(False), on_processes(1, lambda: differentiate(True))
    assert ended.status == 0, ended.said
    ours, copied = ended.value
    assert copied is None
    for one, other in zip(ours, theirs):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_compiled_passes_train_alike_after_a_cut_too(start, on_processes, monkeypatch, tmp_path):
    passes, compile = [], torch.nn.Module.compile

    def compile_and_count(part, **settings):
        def backend(graph, inputs):
            passes.append(type(part).__name__)
            return graph.forward

        compile(part, **settings | {"backend": backend})

    def start_compiled():
        monkeypatch.setattr(torch.nn.Module, "compile", compile_and_count)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        return start("compiled"), passes

    assert start("eager") == 0
    (ended,) = on_processes(1, start_compiled)
    status, passes = ended.value
    assert status == 0, ended.said
    # of student and teacher, and again for what the cut has left
    assert {part: passes.count(part) >= 4 for part in ("Backbone", "FPN", "TaskAlignedHead")}, passes
    ours, theirs = losses_of(tmp_path / "compiled"), losses_of(tmp_path / "eager")
    assert ours.allclose(theirs, rtol=1e-3) and len(ours) == 2


@pytest.mark.slow
def test_compiled_backward_passes_on_two_processes(start, on_processes, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    ended = on_processes(2, lambda: start("compiled"), timeout=900)
    assert [one.value for one in ended] == [0, 0], ended[0].said + ended[1].said
    assert len(losses_of(tmp_path / "compiled")) == 2


def test_accumulated_gradients_are_those_of_a_larger_batch(start, settings, on_processes, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda norm, mode=True: torch.nn.Module.train(norm, False))
    settings |= {"teacher": None, "losses": {}, "balance": "none", "pruning": None}
    settings["student"] = settings["student"] | {"head": "gfl"}
    updates, update = [], train.EMA.update
    monkeypatch.setattr(train.EMA, "update", lambda ema, module: (updates.append(1), update(ema, module)))
    settings["data"]["batch_size"] = 2
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    (ended,) = on_processes(1, lambda: (start("accumulated"), updates))
    assert ended.value[0] == 0, ended.said
    assert len(ended.value[1]) == 4  # two an epoch, of four batches


def test_bfloat16_by_accelerates_setting(start, settings, on_processes, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen, losses = [], Distiller.task_loss

    def look(unit, output, targets):
        seen.append(output.class_logits[0].dtype)
        return losses(unit, output, targets)

    monkeypatch.setattr(Distiller, "task_loss", look)
    (ended,) = on_processes(1, lambda: (start("bfloat16"), seen))
    status, seen = ended.value
    assert status == 0, ended.said
    assert seen[-1] is torch.bfloat16  # after a cut too
    assert losses_of(tmp_path / "bfloat16").isfinite().all()


def test_the_scaler_of_float16_is_kept(start, settings, monkeypatch, tmp_path):
    # Accelerate scales on GPUs only; torch's scaler works anywhere
    build, scalers = train.build_accelerator, []

    def build_with_scaler(config):
        accelerator = build(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        accelerator.native_amp = True
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(train, "build_accelerator", build_with_scaler)
    assert start("scaled") == 0
    state = torch.load(find_checkpoints(tmp_path / "scaled/checkpoints")[-1])["scaler"]
    assert state["scale"] == 2048.0 and state["_growth_tracker"] == 1  # four steps, none of them skipped
    assert losses_of(tmp_path / "scaled").isfinite().all()


def test_a_sharded_teacher_says_the_same(start, settings, build_tiny, on_processes, images, monkeypatch, tmp_path):
    monkeypatch.setattr("teachers.shard.BLOCK", 20_000)
    settings["teacher"]["shard"] = True
    settings["losses"]["box"] = {"name": "cross_kd"}
    settings["data"]["batch_size"] = 2

    def shard_and_start():
        accelerator = train.Accelerator()
        whole, part = build_tiny(channels=24), Teacher(build_tiny(channels=24), accelerator.device, shard=True)
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in part.detector.backbone.parameters())
        alike = all(
            torch.allclose(*maps, atol=1e-5) for maps in zip(whole.eval()(images).features, part(images).features)
        )
        return held, alike, start("run")

    ended = on_processes(2, shard_and_start)
    assert [one.status for one in ended] == [0, 0], ended[0].said + ended[1].said
    whole = sum(p.numel() for p in build_tiny(channels=24).backbone.parameters())
    for one in ended:
        held, alike, status = one.value
        assert alike and status == 0 and held < 0.52 * whole
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["teacher"]["latency_ms"] is None and summary["teacher"]["macs"] > summary["student"]["macs"]
