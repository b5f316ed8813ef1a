import json
import re

import pytest
import torch
from accelerate import Accelerator

from distill.combiner import Combiner, WeightSchedule
from distill.data import Batch
from distill.distiller import Distiller
from distill.errors import UserError
from distill.guards import (
    check_losses,
    check_terms,
    check_unchanged,
    find_objects,
    fingerprint,
    tell_blind,
    tell_left_out,
)
from distill.terms import AttentionTransferTerm, FGDTerm, KnowledgeTerm, MGDTerm, PKDTerm, PseudoLabelTerm
from teachers import Teacher


class Silent(KnowledgeTerm):
    """Counts, and teaches nothing."""

    def forward(self, student, teacher, targets, image_size):
        return student.features[0].detach().sum()


class Broken(KnowledgeTerm):
    def forward(self, student, teacher, targets, image_size):
        return student.features[0].sum() * float("nan")


@pytest.fixture
def batch(images, targets):
    return Batch(images, targets, [], [])


@pytest.fixture
def make(build_tiny):
    """A unit with one term, and its teacher."""

    def make(kind, weight=1.0, **settings):
        student, teacher = build_tiny(), build_tiny(seed=1, channels=24)
        unit = Distiller(student, {"it": kind(student, teacher)}, Combiner({"it": weight}), **settings)
        return unit.train(), {"teacher": Teacher(teacher)}

    return make


def test_a_term_that_teaches_passes_and_nothing_changes(make, batch):
    unit, teachers = make(MGDTerm, 1e-4)
    unit.student.neck.eval()
    before, untouched = fingerprint(unit), fingerprint(teachers["teacher"].detector)
    torch.manual_seed(5)
    check_terms(unit, teachers, batch, dominates=100.0)
    drawn = torch.rand(1)
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert fingerprint(unit) == before and unit.training and not unit.student.neck.training
    assert all(p.grad is None for p in unit.parameters())
    check_unchanged(teachers, {"teacher": untouched})


def test_a_term_without_gradient_is_named(make, batch):
    unit, teachers = make(Silent)
    with pytest.raises(UserError, match=r"losses.it: gives the student no gradient, so it teaches nothing"):
        check_terms(unit, teachers, batch, 100.0)
    unit.combiner.weights["it"] = 0.0
    check_terms(unit, teachers, batch, 100.0)  # what counts nothing is nobody's problem
    unit, teachers = make(Broken)
    with pytest.raises(UserError, match=r"losses.it: gives the student a gradient that is no number"):
        check_terms(unit, teachers, batch, 100.0)


def test_a_term_that_is_left_out_as_no_number_is_not_taken_for_silent(make, batch):
    unit, teachers = make(Broken, skip_bad=True)
    with pytest.raises(UserError, match=r"losses.it: gives the student a loss that is no number, so"):
        check_terms(unit, teachers, batch, 100.0)
    assert not unit.skipped


def test_a_teacher_that_detects_nothing_is_told(make, batch):
    unit, teachers = make(PseudoLabelTerm)
    unit.terms["it"].score_threshold = 0.0
    assert tell_blind(unit, teachers, [batch]) == []
    unit.terms["it"].score_threshold = 0.99
    (line,) = tell_blind(unit, teachers, [batch, batch])
    assert line.startswith("losses.it: teacher detects nothing with a score of 0.99 or more on 4 training images")
    unit.combiner.weights["it"] = 0.0
    assert tell_blind(unit, teachers, [batch]) == []


def test_so_is_one_that_labels_what_nobody_has_labelled(make, batch):
    unit, teachers = make(FGDTerm, score_threshold=0.99)
    assert tell_blind(unit, teachers, [batch]) == []  # all are labelled
    half = batch._replace(targets=[batch.targets[0], None])
    (line,) = tell_blind(unit, teachers, [half, half])
    assert "detects nothing with a score of 0.99 or more on 2 unlabelled images, so" in line
    assert "; lower data.unlabelled.score_threshold, or " in line
    unit.score_threshold = 0.0
    assert tell_blind(unit, teachers, [half]) == []


def test_a_term_that_dominates_is_named_with_a_weight_that_fits(make, batch):
    unit, teachers = make(PKDTerm, 1e6)
    found = check_terms(unit, teachers, batch, 100.0)
    line = found["it"]
    assert list(found) == ["it"]
    assert re.match(r"losses.it: its gradient is [\d.e+]+ times the task's, .* below ", line)
    fitting = float(line.partition("below ")[2].partition(",")[0])
    unit.combiner.weights["it"] = 0.9 * fitting
    assert check_terms(unit, teachers, batch, 100.0) == {}
    # as a share of the task's gradient it is what it says
    unit.combiner = Combiner({"it": 0.5}, balance="gradient")
    assert check_terms(unit, teachers, batch, 100.0) == {}


@pytest.mark.parametrize("schedule", [WeightSchedule(warmup_epochs=1), WeightSchedule("linear", warmup_epochs=9)])
def test_a_warm_up_hides_nothing(make, batch, schedule):
    unit, teachers = make(PKDTerm, 1e7)
    unit.combiner.schedules["it"], unit.combiner.epochs = schedule, 10
    assert unit.combiner.weight("it") == 0
    assert list(check_terms(unit, teachers, batch, 100.0)) == ["it"]
    assert unit.combiner.weight("it") == 0
    unit, teachers = make(Silent)
    unit.combiner.schedules["it"], unit.combiner.epochs = schedule, 10
    with pytest.raises(UserError, match=r"losses.it: gives the student no gradient"):
        check_terms(unit, teachers, batch, 100.0)
    unit.combiner.schedules["it"], unit.combiner.epoch = WeightSchedule(stop_epoch=2), 2.0
    check_terms(unit, teachers, batch, 100.0)
    unit.combiner.epoch = 0.0
    unit.silence(["teacher"])
    check_terms(unit, teachers, batch, 100.0)


def test_a_teacher_that_learns_is_named(make, batch):
    unit, teachers = make(AttentionTransferTerm)
    untouched = fingerprint(teachers["teacher"].detector)
    next(teachers["teacher"].detector.parameters()).requires_grad_(True)
    with pytest.raises(UserError, match=r"teacher: backbone.* takes part in training"):
        check_terms(unit, teachers, batch, 1e9)
    with torch.no_grad():
        next(b for b in teachers["teacher"].detector.buffers() if b.is_floating_point()).add_(1e-3)
    with pytest.raises(UserError, match="teacher: its weights or batch-norm statistics changed"):
        check_unchanged(teachers, {"teacher": untouched})


def test_the_loss_that_went_wrong_first_is_named(make, batch, tmp_path):
    unit, teachers = make(Broken)
    lessons = unit.ask(teachers, batch.images, batch.targets)
    accelerator, file = Accelerator(), tmp_path / "it.json"
    seen = [(6, ["a.jpg"]), (7, ["b.jpg", "c.jpg"]), (8, ["d.jpg"])]
    unit.combiner.weights["it"] = 0.0
    unit(batch.images, batch.targets, lessons)
    check_losses(unit, accelerator, seen, file)
    unit.combiner.weights["it"], unit.combiner.step = 1.0, 7
    unit(batch.images, batch.targets, lessons)
    unit.combiner.step = 8
    unit(batch.images * float("nan"), batch.targets, lessons)  # by now everything is
    with pytest.raises(UserError, match=r"losses: it became NaN or infinite in step 8 .* on b.jpg, c.jpg") as said:
        check_losses(unit, accelerator, seen, file)
    assert "lower losses.it.weight" in str(said.value) and str(file) in str(said.value)
    assert json.loads(file.read_text()) == {"losses": ["it"], "step": 7, "epoch": 1, "images": ["b.jpg", "c.jpg"]}
    file.unlink()
    check_losses(unit, accelerator, seen, file)
    assert not file.exists()


class Steep(KnowledgeTerm):
    """A number, with a gradient that is none: that of a root at 0."""

    def forward(self, student, teacher, targets, image_size):
        return (student.features[0].sum() * 0.0).sqrt()


def test_a_gradient_that_is_no_number_is_told_before_all_losses_are(make, batch, tmp_path):
    unit, teachers = make(Steep)
    accelerator, file = Accelerator(), tmp_path / "it.json"
    lessons = unit.ask(teachers, batch.images, batch.targets)
    unit.combiner.step = 4
    loss, _ = unit(batch.images, batch.targets, lessons)
    loss.backward()
    unit.combiner.see_gradient(torch.nn.utils.clip_grad_norm_(unit.parameters(), 1.0))
    unit.combiner.step = 5
    unit(batch.images * float("nan"), batch.targets, lessons)
    told = r"losses: all were numbers, but the gradient became NaN .* in step 5 .* such as losses\.it\.weight=0: train"
    with pytest.raises(UserError, match=told):
        check_losses(unit, accelerator, [(4, ["a.jpg"]), (5, ["b.jpg"])], file)
    assert json.loads(file.read_text())["images"] == ["a.jpg"]

    unit.combiner = Combiner({"it": 1.0}, balance="gradient").train()  # which measures each term's gradient
    unit(batch.images, batch.targets, lessons)
    assert unit.combiner.bad_losses() == (0, ["it"])


def test_a_broken_term_can_be_left_out_of_a_step(make, batch, build_tiny):
    unit, teachers = make(Broken, skip_bad=True)
    total, parts = unit(batch.images, batch.targets, unit.ask(teachers, batch.images, batch.targets))
    assert parts["it"] == 0 and total == parts["task"] and total.isfinite()
    assert unit.skipped == {"it": 1}
    assert unit.combiner.bad_losses() == (0, [])


def test_a_term_that_only_its_weight_makes_infinite_is_left_out_too(make, batch):
    unit, teachers = make(PKDTerm, 3e38, skip_bad=True)  # float32 ends at 3.4e38
    total, parts = unit(batch.images, batch.targets, unit.ask(teachers, batch.images, batch.targets))
    assert parts["it"] == 0 and total == parts["task"] and unit.skipped == {"it": 1}


def test_what_was_left_out_is_told_with_its_images(make, tmp_path):
    unit, _ = make(Broken)
    accelerator, file = Accelerator(), tmp_path / "it.json"
    assert tell_left_out(unit, accelerator, [], file) == [] and not file.exists()
    left_out = [(7, "it", ["c.jpg"]), (4, "it", ["a.jpg", "b.jpg"]), (5, "other", ["d.jpg"])]
    first, second = tell_left_out(unit, accelerator, left_out, file)
    assert first.startswith("losses.it: was no number and was left out 2 times in this epoch")
    assert first.endswith(f"first in step 5 on a.jpg, b.jpg, see {file}")
    assert second.startswith("losses.other: was no number and was left out 1 times") and "step 6 on d.jpg" in second
    assert json.loads(file.read_text()) == {"losses": ["it"], "step": 4, "epoch": 1, "images": ["a.jpg", "b.jpg"]}


def test_batches_without_objects_are_passed_over(make, batch, images, targets):
    unit, teachers = make(PKDTerm)
    empty, blind = batch._replace(targets=[targets[1]] * 2), batch._replace(targets=[None, None])
    half = batch._replace(targets=[targets[1], None])
    assert find_objects(unit, teachers, [empty, half, batch]) is batch
    assert find_objects(unit, teachers, [empty, half]) is None
    unit.score_threshold = 1.0
    assert find_objects(unit, teachers, [blind, batch]) is batch
    torch.nn.init.constant_(teachers["teacher"].detector.head.class_logits.bias, 1.0)
    unit.score_threshold = 0.5
    assert find_objects(unit, teachers, [blind, batch]) is blind
