"""The long comparisons, at their smallest."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import students
from benchmarks import coco_size, detectors, importance, losses, recovery, sparse, step_cost, throughput
from benchmarks.arms import interval, markdown, replace_section, run_arm
from distill.config import load_config
from distill.data import Batch, open_index
from distill.data.shapes import CLASSES
from distill.distiller import Distiller
from distill.pruning.graph import find_groups


def test_interval_is_students():
    # mean 2, deviation 1, t = 4.303 for two degrees of freedom: 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))
    assert math.isnan(interval([1.0])[1])


def test_tables_are_markdown():
    assert markdown(["", "AP"], [["pkd", "1"]]) == "|  | AP |\n| :-- | --: |\n| pkd | 1 |\n"


def test_a_section_is_replaced_or_comes_last():
    page = "# Page\n\n## One\n\n1\n\n## Two\n\n2\n"
    assert replace_section(page, "One", "new\n") == "# Page\n\n## One\n\nnew\n\n## Two\n\n2\n"
    assert replace_section(page, "Two", "new") == "# Page\n\n## One\n\n1\n\n## Two\n\nnew\n"
    assert replace_section(page, "Three", "3") == page + "\n## Three\n\n3\n"


def test_cuts_leave_two_thirds_to_recover_in(tmp_path):
    one, gradual = (recovery.Arm(taught=True, cuts=cuts) for cuts in ("one", "gradual"))
    assert recovery.cut_between(12) == (4, 7) and recovery.cut_between(18) == (6, 10)
    when = ["pruning.start=4", "pruning.end=4", "pruning.target=0.3"]
    assert set(when) < set(recovery.overrides_of(one, 70, 12, tmp_path, 0, None))
    assert "pruning.end=7" in recovery.overrides_of(gradual, 70, 12, tmp_path, 0, None)


def test_seeds_are_compared_pair_by_pair():
    def seeds(milliseconds, *runs):
        return [{"ap": ap, "ap_right_after": at, "macs": 1e6, "latency_ms": milliseconds} for ap, at in runs]

    plain, ours = seeds(8.0, (0.30, None), (0.40, None)), seeds(4.0, (0.32, 0.1), (0.42, 0.3))
    arms = {recovery.UNPRUNED: {"removed": 0, "seeds": plain}, "ours": {"removed": 50, "seeds": ours}}
    rows = recovery.table({"teacher": {"ap": 0.5, "macs": 2e6}, "arms": arms}).splitlines()
    # 12.7 of one degree of freedom: 12.706 * 7.07 / sqrt(2) points for what differs by 10
    assert rows[3] == "| unpruned, plain | 35.0 +- 63.5 |  |  | 1M | 8.0 ms | 1.00x |"
    assert rows[4] == "| ours | 37.0 +- 63.5 | 2.0 +- 0.0 | 20.0 +- 127.1 | 1M | 4.0 ms | 2.00x |"


def test_losses_go_by_the_weights_that_their_arm_is_named_by(tmp_path):
    overrides = losses.overrides_of({"cross_kd": 0.5, "box_mimic": 1.0}, tmp_path)
    assert (
        'losses={"cross_kd": {"name": "cross_kd", "weight": 0.5}, "box_mimic": {"name": "box_mimic", "weight": 1.0}}'
        in overrides
    )
    assert "balance=gradient" in overrides and "pruning=null" in overrides
    assert losses.fits("ld", "bccd_gfl") and not losses.fits("ld", "bccd")


def test_the_teacher_of_other_heads_has_such_a_head_itself(tmp_path, monkeypatch):
    configs = {}

    def run_arm(folder, config, overrides):
        configs[folder.relative_to(tmp_path)] = load_config(losses.ROOT / config, overrides)
        return {"student": {"ap": 0.5, "ap50": 0.7}}

    monkeypatch.setattr(losses, "run_arm", run_arm)
    monkeypatch.setattr(losses, "measure_steps", lambda configs: {arm: {"seconds": 1.0} for arm in configs})
    _, config, base = losses.SETS["bccd_gfl"]
    losses.compare(tmp_path, config, base, ["plain", "ld"], seeds=2, epochs=3, cached=["ld", "cross_kd"])
    assert [str(folder) for folder in configs] == [
        "teacher", "cached/seed0", "3_epochs/plain/seed0", "3_epochs/ld/seed0",
        "cached/seed1", "3_epochs/plain/seed1", "3_epochs/ld/seed1",
    ]  # fmt: skip
    assert all(config.student.head == "gfl" for config in configs.values())
    assert configs[Path("teacher")].student.backbone == "tf_efficientnet_lite2"
    assert list(configs[Path("cached/seed1")].losses) == ["ld", "cross_kd"]
    last = configs[Path("3_epochs/ld/seed1")]
    assert (last.train.epochs, last.seed, last.teacher.cache) == (3, 1, str(tmp_path / "cache1"))


def test_a_kept_arm_is_not_taken_for_one_with_other_settings(settings, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    folder = tmp_path / "arm"
    folder.mkdir()
    resolved = load_config(config, [f"output_dir={folder}", "seed=3"])
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved.model_dump(mode="json")))
    (folder / "summary.json").write_text('{"student": {"ap": 0.5}}')
    assert run_arm(folder, str(config), ["seed=3", "data.workers=1"]) == {"student": {"ap": 0.5}}
    with pytest.raises(SystemExit, match="arm is of a run with other settings; remove it, or name another --output"):
        run_arm(folder, str(config), ["seed=4"])


def test_data_of_a_size_are_opened_and_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_size, "IMAGES", 12)
    monkeypatch.setattr(coco_size, "BOXES", 30)
    monkeypatch.setattr(coco_size, "SCORED", 4)
    coco_size.make(tmp_path)
    index = open_index(tmp_path, "train")
    assert (len(index), len(index.boxes)) == (12, 30)
    found = coco_size.score_it()
    assert list(found) == ["scoring_by_pycocotools_s", "scoring_by_faster_coco_eval_s"]
    assert coco_size.memory(["self"]) > 50


def test_what_nothing_listens_to_adds_no_loss(build_tiny, images, targets):
    unit, batches = Distiller(build_tiny()), [Batch(images, targets, [], [])]
    group = next(g for g in find_groups(unit, (64, 64)) if g.name == "student.head.class_tower.0.conv")
    with torch.no_grad():
        unit.student.head.class_logits.weight[:, 3] = 0
        unit.student.head.class_logits.weight[:, 4] = 5
    before = importance.mean_loss(unit, batches).task
    after = [importance.mean_loss(importance.without(unit, group, channel), batches).task for channel in (3, 4)]
    assert after[0] == pytest.approx(before, abs=1e-5) and abs(after[1] - before) > 1e-3
    assert importance.mean_loss(unit, batches).task == before


def test_what_was_measured_so_far_makes_the_page():
    run = {"params": 1_770_000, "macs": 100e6, "ap": 0.404, "ap50": 0.714}
    pair = {"teacher": 0.5, "plain": [0.40, 0.42], "taught": [0.42, 0.45]}
    heads = {"gfl": {"params": 1e6, "macs": 2e6, "ap": [0.4, 0.41, 0.42]}}
    pairs = {"faster_rcnn teaches dense_gfl": pair}
    text = detectors.document({"families": {"yolov5": run}, "heads": heads, "pairs": pairs}, 16, (120, 160))
    assert '| `yolov5` | `{"name": "yolov5", "size": "n"}` | 1.77M | 100.00M | 40.4 | 71.4 |' in text
    assert "| `gfl` | 1.00M | 2.00M | 41.0 +- 2.5 |" in text  # 4.303 / sqrt(3)
    assert "| 50.0 | 41.0 +- 12.7 | 43.5 +- 19.1 | 2.5 +- 6.4 |" in text  # t = 12.71: 1.27 * 10, 15, 5
    assert "yolov4` |" in text.partition("## Sizes")[2] and "`yolov7`" not in text.partition("## Which head")[0]


@pytest.mark.slow
def test_detectors_are_measured_part_by_part(monkeypatch, settings, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(detectors, "CONFIG", str(config))
    tiny = {"backbone": "test_resnet", "channels": 16, "head_depth": 1}
    monkeypatch.setattr(detectors, "FAMILIES", {"dense_gfl": tiny | {"head": "gfl"}})
    pair = detectors.Pair("teacher", tiny | {"head": "retinanet"}, 1, tiny | {"head": "gfl"}, {"pkd": {}})
    monkeypatch.setattr(detectors, "PAIRS", {"dense_retinanet teaches dense_gfl": pair})
    first = detectors.measure(tmp_path / "out", ["dense_gfl"], [], [], ["pruning=null"], 1, 2)
    assert list(first["families"]) == ["dense_gfl"] and not first["pairs"]
    results = detectors.measure(tmp_path / "out", [], [], list(detectors.PAIRS), ["pruning=null"], 1, 2)
    assert results["families"] == first["families"]
    (found,) = results["pairs"].values()
    assert len(found["plain"]) == len(found["taught"]) == 2 and 0 <= found["teacher"] <= 1
    assert results == json.loads((tmp_path / "out" / "detectors.json").read_text())
    assert "dense_retinanet teaches dense_gfl" in detectors.document(results, 1, (64, 64))


def test_spearman_compares_ranks():
    # ranks 1 2 3 and 1 3 2: 1 - 6 (0 + 1 + 1) / (3 * 8)
    assert importance.spearman([0.1, 0.2, 9.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert importance.spearman([1.0, 1.0, 1.0], [1.0, 3.0, 2.0]) == 0.0


def test_importances_are_held_against_what_channels_add():
    scores = {"random": [1.0, 2.0], "group_fisher": [3.0, 1.0]}
    costs = {"macs": [1.0, 1.0], "memory": [0.0, 0.0]}
    first = importance.Trials("a", [0, 5], [0.3, 0.1], [0.1, 0.3], costs, scores)
    scores = {"random": [3.0, 4.0], "group_fisher": [9.0, 8.0]}
    costs = {"macs": [10.0, 90.0], "memory": [1.0, 1.0]}
    second = importance.Trials("b", [1, 2], [0.9, 0.8], [0.8, 0.9], costs, scores)
    found = importance.correlate([first, second])
    assert found["random"]["within"] == pytest.approx(-1) and found["group_fisher"]["within"] == pytest.approx(1)
    # ranks 2 1 4 3 of the task, 1 2 3 4 of what is trained
    assert found["random"]["across"] == pytest.approx(1 - 6 * 4 / 60) and found["random"]["trained"] == 1
    assert found["group_fisher"]["across"] == 1 and found["group_fisher"]["trained"] == pytest.approx(1 - 6 * 4 / 60)
    # added for the MACs 0.3 0.1 0.09 0.0089, scores for them 3 1 0.9 0.089, undivided 3 1 9 8
    assert found["group_fisher"]["macs"] == 1
    assert found["group_fisher"]["undivided_macs"] == pytest.approx(1 - 6 * (4 + 4 + 4 + 4) / 60)
    # nothing costs less than 1
    assert found["group_fisher"]["memory"] == found["group_fisher"]["undivided_memory"] == 1


@pytest.mark.slow
def test_a_seed_of_importances_is_measured_once(settings, tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    folder = importance.distil(tmp_path / "out", str(config), [], epochs=2, seed=0)
    found = importance.kept_trials(folder, channels=2, batches=1, seed=0)
    assert all(len(group.channels) == 2 and set(group.scores) == set(importance.ROWS) for group in found)
    assert all(group.costs["macs"][0] > group.costs["memory"][0] > 0 for group in found)
    assert any(group.task != group.trained for group in found)
    assert any(group.scores["taylor"] != group.scores["taylor, task alone"] for group in found)
    text = importance.table([importance.correlate(found)])
    assert text.count("\n") == 2 + len(importance.ROWS) and "| `taylor`, task alone | " in text
    assert "`random`, divided" in importance.table_per([importance.correlate(found)])
    monkeypatch.setattr(importance, "try_channels", None)
    assert importance.kept_trials(folder, channels=2, batches=1, seed=0) == found


@pytest.mark.slow
def test_students_are_cut_as_they_were_trained(settings, tmp_path):
    settings |= {"teacher": None, "losses": {}, "pruning": None, "train": {"epochs": 2}}
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    folder = tmp_path / "out"
    run_arm(folder, str(config), sparse.overrides_of(0.1))
    kept = (folder / "student" / "model.safetensors").read_bytes()
    found = sparse.cut_after(folder, [30, 50])
    assert 0.45 < found["left"]["50"] <= 0.5 < found["left"]["30"] <= 0.7
    assert 0 <= found["small"] <= 1 and all(0 <= ap <= 1 for ap in (found["ap"], *found["ap_after"].values()))
    assert (folder / "student" / "model.safetensors").read_bytes() == kept


def test_sparse_students_make_a_row_a_rate():
    runs = [{"ap": ap, "small": 0.5, "ap_after": {"30": ap, "50": 0.1}, "left": {}} for ap in (0.3, 0.4)]
    rows = sparse.table({"0": runs, "0.01": runs[:1]}, [30, 50]).splitlines()
    assert rows[2:] == [
        "| none | 50%, 50% | 30.0, 40.0 | 30.0, 40.0 | 10.0, 10.0 |",
        "| 0.01 | 50% | 30.0 | 30.0 | 10.0 |",
    ]
    assert sparse.overrides_of(0)[-1] == "pruning=null"


@pytest.mark.slow
def test_losses_are_compared_and_finished_arms_kept(settings, tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    arms = ["plain", "pkd", "1 dense_sigmoid + 1 box_mimic"]
    cached = ["pkd", "dense_sigmoid", "box_mimic"]
    result = losses.compare(tmp_path / "out", str(config), [], arms, 2, 1, cached)
    assert list(result["arms"]) == arms
    for entry in result["arms"].values():
        assert len(entry["ap"]) == 2 and entry["seconds"] > 0 and entry["kept_mib"] > 0
    assert result["arms"]["pkd"]["kept_mib"] > result["arms"]["plain"]["kept_mib"]
    table = losses.table(result)
    assert table.count("\n") == 2 + 1 + 3 and "| pkd | " in table
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "losses.md").write_text("# Losses\n\n## Others\n\n1\n")
    monkeypatch.setattr(losses, "ROOT", tmp_path)
    losses.write_down(result | {"set": "scenes", "epochs": 1, "seeds": 2})
    text = (tmp_path / "docs" / "losses.md").read_text()
    assert "## Others\n\n1\n\n## Drawn scenes" in text and "1 epoch\n" in text and "2 seeds; `benchmarks" in text
    monkeypatch.undo()

    summaries = sorted((tmp_path / "out").rglob("summary.json"))
    assert len(summaries) == 1 + 2 + 3 * 2
    assert all((tmp_path / "out" / f"cache{seed}").is_dir() for seed in (0, 1))
    times = [path.stat().st_mtime_ns for path in summaries]
    again = losses.compare(tmp_path / "out", str(config), [], arms, 2, 1, cached)
    assert [path.stat().st_mtime_ns for path in summaries] == times
    assert json.dumps(again["arms"]["pkd"]["ap"]) == json.dumps(result["arms"]["pkd"]["ap"])


@pytest.mark.slow
def test_ways_to_cut_are_compared_at_equal_macs(settings, tmp_path):
    config = tmp_path / "a.yaml"
    settings["pruning"] |= {"every": 1}
    config.write_text(yaml.safe_dump(settings))
    result = recovery.compare(tmp_path / "out", str(config), [], [40], seeds=1, epochs=3)
    arms = {arm: entry["seeds"][0] for arm, entry in result["arms"].items()}
    uncut = arms.pop(recovery.UNPRUNED)
    assert list(arms) == [recovery.name_of(way, 40) for way in list(recovery.WAYS)[:4]]  # it has no first weights
    assert all(0.5 < run["macs"] / uncut["macs"] <= 0.6 and run["latency_ms"] > 0 for run in arms.values())
    ours, *_, from_the_start = arms.values()
    assert (from_the_start["macs"], from_the_start["params"]) == (ours["macs"], ours["params"])
    assert from_the_start["ap_right_after"] is None and ours["ap_right_after"] is not None
    assert "Cuts between epochs come before epochs 2 to 3, one-shot" in recovery.section("scenes", result, 1, 3)


@pytest.mark.slow
def test_a_teacher_that_is_remembered_is_not_asked(settings, build_tiny, tmp_path):
    students.save(build_tiny(class_names=list(CLASSES), channels=24), tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "pruning": None}
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    arguments = {"config": str(config), "overrides": [], "rounds": 2, "steps": 2, "output": tmp_path / "out"}
    throughput.compare(SimpleNamespace(**arguments))
    found = json.loads((tmp_path / "out/throughput.json").read_text())
    plain, online, cached = (found["arms"][name] for name in throughput.ARMS)
    assert plain["step"] == 1.0 and len(plain["rounds"]) == 2
    assert 10 * cached["asking"] < online["learning"] and cached["asking"] < online["asking"]
    assert plain["memory"] < min(online["memory"], cached["memory"])
    # 8 images, 84 cells of P3 to P5, each with 24 channels, 8 classes, 4 distances
    assert found["cache"]["bytes"] == 8 * 84 * (24 + 8 + 4) * 2


def test_bars_are_judged_round_by_round():
    """A round in which the machine was busy, here the last, has a ratio as any other has."""
    seconds = {"plain": [1.0, 2.0, 9.0], "+ fast teacher": [1.2, 2.4, 10.8], "distilled": [1.26, 2.52, 11.34]}
    seconds |= {"plain_mimic": [1.5, 3.0, 4.0], "peer": [2.0, 4.0, 1.0]}
    shares = {arm: [a / b for a, b in zip(taken, seconds["plain"])] for arm, taken in seconds.items()}
    found = list(step_cost.judge(seconds, shares, {"plain": 100, "distilled": 180}, weights=50).values())
    assert [value for value, _ in found] == pytest.approx([0.05, 1.26, 1.2, 0.75])
    assert [most for _, most in found] == [0.05, 1.35, 1.15, 1.0]
    assert step_cost.bar_row("it", (0.05, 0.05))[-1] == "met" and step_cost.bar_row("it", (1.2, 1.15))[-1] == "not met"


def test_all_arms_of_a_step_train_the_student_and_not_the_teacher():
    config = step_cost.load("configs/quickstart.yaml data.image_size=64 data.batch_size=2")
    arms, refused = step_cost.build_arms(config, ["plain_mimic", "ld"], torch.device("cpu"))
    assert refused == ["ld"]  # its heads have no distributions
    expected = {"plain", "+ teacher", "+ fast teacher", "distilled", "plain_mimic", "peer"}
    assert set(arms) == {*expected, "peer, channels_last"}
    taken = step_cost.take_turns(arms, 1, torch.device("cpu"))
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in taken.values())
    parts = step_cost.time_parts(config, torch.device("cpu"), repeats=1)
    assert {"teacher", "student, forward", "loss: feature_mimic", "backward", "AdamW", "bookkeeping"} <= set(parts)


def test_the_peer_has_the_loss_that_it_is_compared_by(build_tiny, images, targets):
    student, detector = build_tiny(), build_tiny(seed=1, channels=24)
    learner, expert = step_cost.PeerStudent(student, detector.feature_channels), step_cost.PeerTeacher(detector.eval())
    term = losses.TERMS["plain_mimic"](student, detector)
    unit = Distiller(student, {"mimic": term}).train()
    for adapter, own in zip(learner.adapters, term.adapters.values()):
        own.load_state_dict(adapter.state_dict())
    loss, _ = unit(images, targets, unit.ask({"teacher": losses.Teacher(detector)}, images, targets))
    loss.backward()
    ours = [p.grad.clone() for p in student.parameters()]
    unit.zero_grad()
    found = {}
    for n, (adapter, level) in enumerate(zip(learner.adapters, expert.levels)):
        adapter.register_forward_hook(lambda module, inputs, output, n=n: found.update({("ours", n): output}))
        level.register_forward_hook(lambda module, inputs, output, n=n: found.update({("theirs", n): output}))
    with torch.no_grad():
        expert(images)
    total = sum(learner(images, targets).values())
    total = total + sum(torch.nn.functional.mse_loss(found["ours", n], found["theirs", n]) for n in range(3))
    torch.testing.assert_close(total, loss)
    total.backward()
    for one, other in zip(ours, (p.grad for p in student.parameters())):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
