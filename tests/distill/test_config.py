import inspect
import re

import pytest
import yaml

from distill.config import check_config, load_config, override, read_yaml, trains_alike
from distill.errors import UserError
from distill.schema import DETECTORS
from students import FAMILIES


def refused(settings, message):
    with pytest.raises(UserError, match=f"^here: {re.escape(message)}$"):
        check_config(settings, "here")


@pytest.fixture
def write(tmp_path, settings):
    def write(text=None):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(settings) if text is None else text)
        return path

    return write


def test_overrides_reach_any_depth(write):
    config = load_config(
        write(),
        [
            "student.backbone=resnet18",
            "train.optimizer.lr=1e-4",  # a string to YAML 1.1, a number to us
            "data.image_size=[48, 64]",
            "data.augment.crop_scale=[0.4, 1.0]",
            "losses.feature_mimic.weight=0.5",
            "pruning=null",
            "data.class_map={disc: null}",
        ],
    )
    assert config.student.backbone == "resnet18"
    assert config.train.optimizer.lr == 1e-4
    assert config.data.image_size == (48, 64)
    assert config.data.augment.crop_scale == (0.4, 1.0)
    assert config.losses["feature_mimic"].weight == 0.5 and config.losses["feature_mimic"].name == "pkd"
    assert config.pruning is None
    assert config.data.class_map == {"disc": None}
    assert load_config(write()).data.image_size == (64, 64)


def test_an_override_changes_one_of_two_that_share_a_section(write):
    path = write("teachers:\n  big: &one {path: a}\n  small: *one\n")
    assert override(read_yaml(path), ["teachers.small.path=b"]) == {
        "teachers": {"big": {"path": "a"}, "small": {"path": "b"}}
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "'epochs': an override is written key=value, such as train.epochs=20"),
        ("=3", "'=3': an override is written key=value, such as train.epochs=20"),
        ("data.classes=[a", "data.classes: '[a' is not a YAML value; quote it"),
        ("losses={a: {name: cwd}, a: {name: pkd}}", "losses: a stands here twice"),
        ("output_dir.x=1", "output_dir.x: output_dir is a single value and has no keys below it"),
    ],
)
def test_overrides_that_are_none(write, override, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_config(write(), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.bakbone=resnet18", "student.bakbone: no such key; did you mean student.backbone?"),
        (
            "train.optimizer.learning=1",
            "train.optimizer.learning: no such key; allowed: lr, backbone_lr, weight_decay, ",
        ),
        ("losses.soft_label.betta=1", "losses.soft_label.betta: no such key; did you mean losses.soft_label.beta?"),
        (
            "teacher.detector.chanels=8",
            "teacher.detector.chanels: no such key; did you mean teacher.detector.channels?",
        ),
        ("loses={}", "loses: no such key; did you mean losses?"),
        (
            "train.epochs=many",
            "train.epochs: input should be a valid integer; found 'many'",
        ),
        ("train.epochs=0", "train.epochs: input should be greater than or equal to 1; found 0"),
        ("train.epochs=2.5", "train.epochs: input should be a valid integer"),
        ("data.image_size=[96]", "data.image_size: found [96]; give [height, width] in pixels, or one number"),
        ("data.image_size=0", "data.image_size: input should be greater than or equal to 32; found 0"),
        ("seed=-1", "seed: input should be greater than or equal to 0; found -1"),
        ("pruning.target=1.5", "pruning.target: input should be less than 1; found 1.5"),
        ("student.neck=fpm", "student.neck: 'fpm' is not allowed; choose 'fpn' or 'pan'; did you mean fpn?"),
        (
            "student=resnet18",
            "student: found 'resnet18'; a section is needed, with keys of its own such as in configs/*.yaml",
        ),
        (
            "losses.feature_mimic.schedule=cosine",
            "losses.feature_mimic.schedule: found 'cosine'; a section is needed, with keys of its own: shape, final, ",
        ),
        ("inherit=neck", "inherit: found 'neck'; a list is needed, such as [neck]"),
        ("losses.feature_mimic.levels=[P3,P3]", "losses.feature_mimic.levels: found [P3, P3]; name each once"),
        ("losses.it={name: CWD}", "losses.it: name 'CWD' is not allowed, did you mean cwd; choose"),
        ("losses.it={name: dense_sigmoid, beta: 0.5}", "losses.it.beta: found 0.5; between 0 and 1 the gradient"),
        ("losses.it={name: pkd, weight: 101}", "losses.it.weight: found 101; with balance: gradient that is how many"),
        (
            "student.name=retinaned",
            "student: name 'retinaned' is not allowed, did you mean retinanet; choose name: 'dense', 'fcos', ",
        ),
        ("student={name: fcos, chanels: 64}", "student.chanels: no such key; did you mean student.channels?"),
        ("student={name: ssd300, backbone: vgg16}", "student.backbone: no such key; allowed: weights, "),
        (
            "teacher.detector={name: faster_rcnn, version: 3}",
            "teacher.detector.version: 3 is not allowed; choose 1 or 2",
        ),
        (
            "losses.soft_label.name=dense_sigmoit",
            "losses.soft_label: name 'dense_sigmoit' is not allowed, did you mean dense_sigmoid; "
            "choose name: 'dense_sigmoid', ",
        ),
        ("losses.more={weight: 1}", "losses.more.name: is missing; choose 'dense_sigmoid', "),
        ("losses.more=pkd", "losses.more: "),
        (
            "losses.feature_mimic.adapter=conv5",
            "losses.feature_mimic.adapter: 'conv5' is not allowed; choose ",
        ),
        ("losses.soft_label.adapter=conv1", "losses.soft_label.adapter: no such key; "),
        (
            "teacher.image_size=[64, 128]",
            "teacher.image_size: [64, 128] and data.image_size, [64, 64], are of unlike shape; give a multiple, such ",
        ),
        ("teacher.image_size=[64]", "teacher.image_size: found [64]; give [height, width] in pixels, or one number"),
        ("teacher=null", "losses are given but no teacher; add a teacher section, or remove losses"),
        (
            "teacher.class_map={a: b}",
            "teacher: class_map is for a teacher from a path or with published weights; any other has the data's",
        ),
        (
            "teacher.cache=bank",
            "teacher.cache: remembers views that come again, and every epoch has others; give data.augme",
        ),
        (
            "teacher={itself: original, cache: bank}",
            "teacher: cache: the teacher is the student itself, which changes, so",
        ),
        (
            "teacher={path: x, shard: true, cache: bank}",
            "teacher: cache: the teacher is sharded, and asked by all proce",
        ),
        ("data.augment.views=0", "data.augment.views: input should be greater than or equal to 1; found 0"),
        ("teachers.big={path: x}", "teacher and teachers are both given; name them all under teachers (teacher=null)"),
        ("losses.box.teacher=big", "losses.box.teacher: found 'big'; there is teacher"),
        (
            "data.unlabelled={ratio: 0.5}",
            "data.unlabelled.root: is missing; add it, or give data.unlabelled.root=VALUE",
        ),
        ("data.unlabelled={root: x, ratio: 0}", "data.unlabelled.ratio: found 0; it goes from 0.01 to 0.99"),
        ("data.train=null", "data: train is null and there are no unlabelled images; name a split"),
        (
            "teacher.train=null",
            "teacher: train is missing, and dense with weights: none detects nothing yet; give train to train it first",
        ),
        ("pruning.end=0", "pruning: end (0) lies before start (1); cuts go from start to end"),
        ("student.channels=true", "student.channels: input should be a valid integer; found True"),
        ("train.optimizer.lr=true", "train.optimizer.lr: found True; a number is needed"),
        ("train.optimizer.lr=.inf", "train.optimizer.lr: input should be a finite number; found inf"),
        ("data.image_size=true", "data.image_size: "),
        ("losses.task={name: pkd}", "losses.task: a column of results.csv has this name already; give it another"),
        ("losses.ap50={name: pkd}", "losses.ap50: a column of results.csv has this name already"),
        ("pruning={target: 0.5, epochs: [1], per: macs}", "pruning: per changes little where ranking is uniform; say"),
        (
            "pruning={target: 0.5, epochs: [1], greedy: true, importance: lamp}",
            "pruning: greedy changes nothing for la",
        ),
        ("pruning={target: 0.5, epochs: [1], runtime: onnx}", "pruning: runtime is where latency is measured, but bud"),
        (
            "pruning={blocks: {count: 1, epochs: [1]}, guard: {ap: 0.3}}",
            "pruning: guard keeps the best student within a",
        ),
        ("pruning={target: 0.5, epochs: [1], guard: {recovery: 1}}", "pruning.guard: give ap, the least on the val sp"),
        ("widths_of=runs/a/student", "widths_of starts with a student that is cut already; leave it or pruning out"),
        ("pruning={target: 0.5, epochs: []}", "pruning: epochs is empty; give the epochs to cut before, such as [2, "),
        ("pruning={target: 0.5, epochs: [1], start: 1}", "pruning: epochs says when to cut already; leave out start"),
        ("pruning={target: 0.5, start: 1}", "pruning: give start and end, or epochs such as [2, 5]; they say when"),
        ("pruning={target: 0.5, epochs: [2, 5]}", "pruning.epochs is [2, 5], but train.epochs is 5, counted from 0"),
        ("pruning={target: 0.5, epochs: [1], sensitivity: a.csv}", "pruning: ranking: sensitivity and sensitivity: F"),
        ("pruning={target: 0.5, epochs: [1], limits: {a: [1, 0.5]}}", "pruning: limits: 'a' keeps at least 1 but at "),
        (
            "pruning={keep: [a]}",
            "pruning: target is missing; give the share of the student that is left, or blocks, ma",
        ),
        (
            "pruning={start: 1, masks: {sparsity: 0.5, epochs: [1]}}",
            "pruning: start, end, every and epochs say when ch",
        ),
        (
            "pruning={target: 0.5, epochs: [1, 2], schedule: constant}",
            "pruning: schedule: constant takes all at once; ",
        ),
        (
            "pruning={target: 0.5, epochs: [1], method: soft}",
            "pruning: method: soft needs times to set channels to 0 b",
        ),
        (
            "pruning={target: 0.5, epochs: [1, 3], method: soft, masks: {sparsity: 0.5, epochs: [2]}}",
            "pruning: masks begin at 2, before soft pruning ends at 3, and would hold what it lets come back",
        ),
        (
            "pruning={target: 0.5, epochs: [1], round_to: 6, masks: {kind: '2:4', epochs: [2]}}",
            "pruning: round_to: 6 leaves widths that masks.kind, 2:4, does not divide; give a multiple of 4",
        ),
        (
            "pruning={target: 0.5, epochs: [1], ranking: sensitivity, sensitivity: a, blocks: {count: 1, epochs: [1]}}",
            "pruning: ranking: sensitivity goes by a scan with all blocks; leave blocks out, or rank otherwise",
        ),
        (
            "pruning={masks: {kind: filters, sparsity: 0.5, epochs: [1]}}",
            "pruning.masks: kind: found 'filters'; it is w",
        ),
        (
            "pruning={masks: {kind: '4:4', epochs: [1]}}",
            "pruning.masks: kind: found '4:4'; it is weights, kernels, or ",
        ),
        (
            "pruning={masks: {kind: '2:4', sparsity: 0.5, epochs: [1]}}",
            "pruning.masks: 2:4 says how much goes of every",
        ),
        (
            "pruning={masks: {epochs: [1]}}",
            "pruning.masks: sparsity is missing; give the share that is 0 in the end, such",
        ),
        (
            "pruning={masks: {sparsity: 0.5, epochs: [5]}}",
            "pruning.masks.epochs is [5], but train.epochs is 5, counted f",
        ),
        (
            "pruning={masks: {sparsity: 0.5}}",
            "pruning.masks: give start and end, or epochs such as [2, 5]; they say when",
        ),
        (
            "pruning={blocks: {count: 1, start: 2, end: 5}}",
            "pruning.blocks.end is 5, but train.epochs is 5, counted fro",
        ),
        (
            "pruning={sparsity: {final: 0.5}}",
            "pruning.sparsity: weights, scales and groups are all 0; give one a rate, s",
        ),
        (
            "pruning={sparsity: {weights: 1, spare_shortcuts: true}}",
            "pruning.sparsity: spare_shortcuts is about scales",
        ),
        (
            "pruning={target: 0.5, epochs: [0], sparsity: {scales: 1}}",
            "pruning: sparsity lasts until the last cut, before epoch 0; cut later, or give sparsity.end",
        ),
        (
            "teacher={path: x, shard: true, precision: auto}",
            "teacher: precision: auto tries a teacher as a whole, and shard is for one that fits no device",
        ),
        ("losses={a: {name: pkd, levels: []}}", "losses.a.levels: found []; name some, such as [P3, P4], or leave it "),
        ("losses={a.b: {name: pkd}}", "losses.a.b: cannot be the name of a module; give letters, digits, - and _"),
        ("losses={train: {name: pkd}}", "losses.train: cannot be the name of a module; give letters, digits, - and _"),
        (
            "losses={a: {name: pkd, schedule: {stop_epoch: 0}}}",
            "losses.a.schedule.stop_epoch: found 0, but the loss begins with epoch 0, counted from 0, so that it would "
            "never count; give 1 or more",
        ),
        (
            "losses={a: {name: pkd, weight: 1e39}}",
            "losses.a.weight: input should be less than or equal to 1000000000; f",
        ),
        ("losses={a: {name: dist}}", "losses.a: name 'dist' is not allowed (losses.dist is for tensors only); choose"),
        ("losses={a: {name: query}}", "losses.a: name 'query' is not allowed (losses.query_distillation is for tens"),
        ("pruning.end=5", "pruning.end is 5, but train.epochs is 5, counted from 0, so nothing would be left"),
    ],
)
def test_wrong_keys_and_values(write, override, message):
    path = write()
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {re.escape(message)}") as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named_and_others_counted(settings):
    del settings["output_dir"]
    refused(settings, "output_dir: is missing; add it, or give output_dir=VALUE on the command line")
    del settings["student"]["backbone"]
    refused(settings, "output_dir: is missing; add it, or give output_dir=VALUE on the command line (1 more)")
    settings["student"]["bakbone"] = "resnet18"
    refused(settings, "student.bakbone: no such key; did you mean student.backbone? (2 more)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", ", line 1: is not valid YAML"),
        ("a: 1\nb: : 2", ", line 2: is not valid YAML"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", ", line 4: is not valid YAML (b stands here twice)"),
        ("- a\n- b", ": holds no settings; a config is a YAML mapping"),
        ("", ": holds no settings"),
    ],
)
def test_files_that_are_no_config(write, text, message):
    path = write(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path) + message)}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_exist_comes_with_a_near_one(write, tmp_path):
    write()
    with pytest.raises(UserError, match=rf"b\.yaml: no such config file; .* did you mean {tmp_path}/a\.yaml\?$"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["2:4", "'2:4'", "1:32", "weights"])
def test_kinds_of_masks_as_they_are_written(write, text):
    config = load_config(
        write(), [f"pruning={{masks: {{kind: {text}, epochs: [1]{', sparsity: 0.5' * (text == 'weights')}}}}}"]
    )
    assert config.pruning.masks.kind == text.strip("'")
    assert config.pruning.masks.divisor == {"2:4": 4, "1:32": 32, "weights": 1}[text.strip("'")]
    assert config.pruning.cut_epochs == [] and config.pruning.last_cut is None


def test_a_detector_is_dense_unless_it_says_otherwise(write):
    assert load_config(write()).student.name == "dense"
    config = load_config(write(), ["student={name: mask_rcnn, backbone: resnet18}"])
    assert (config.student.name, config.student.version) == ("mask_rcnn", 1)
    assert config.teacher.detector.name == "dense"


def test_settings_of_detectors_are_arguments_of_their_families():
    for model in DETECTORS:
        for name in model.model_fields["name"].annotation.__args__:
            arguments = inspect.signature(FAMILIES[name]).parameters
            for field, info in model.model_fields.items():
                if field != "name" and not info.is_required():
                    default = arguments[field].default
                    assert (list(default) if isinstance(default, tuple) else default) == info.default, (name, field)
    assert {name for model in DETECTORS for name in model.model_fields["name"].annotation.__args__} == set(FAMILIES)


def test_every_shipped_config_is_valid_and_says_what_it_is(repository):
    paths = sorted((repository / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        config = load_config(path)
        assert check_config(config.model_dump(mode="json"), "dumped") == config
        assert path.read_text().startswith("# "), path


def test_a_loss_that_ends_before_its_teacher_is_there(settings):
    settings |= {"teacher": "original", "losses": {"a": {"name": "pkd", "schedule": {"stop_epoch": 2}}}}
    check_config(settings, "here")  # the first cut is before epoch 1
    settings["losses"]["a"]["schedule"]["stop_epoch"] = 1
    with pytest.raises(UserError, match=r"losses.a.schedule.stop_epoch: found 1, but the loss begins with epoch 1"):
        check_config(settings, "here")
    settings |= {"pruning": {"sparsity": {"scales": 1e-3}}}
    with pytest.raises(UserError, match="teacher: original is the student before its first cut, and nothing cuts"):
        check_config(settings, "here")


def test_values_survive_the_run_folder(settings):
    settings["data"] |= {"class_map": {"disc": None, "ring": "hoop"}, "augment": {"crop_scale": [0.3, 0.9]}}
    config = check_config(settings, "here")
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert check_config(again, "there") == config


def test_defaults_are_those_of_the_recipe():
    config = check_config(
        {"output_dir": "x", "data": {"root": "y", "image_size": 64}, "student": {"backbone": "z"}}, "here"
    )
    assert (config.train.epochs, config.data.batch_size, config.student.channels) == (12, 8, 96)
    assert (config.train.optimizer.lr, config.train.optimizer.ema, config.seed) == (1e-3, 0.998, 0)
    assert config.teacher is None and config.pruning is None and config.losses == {}


def test_runs_that_come_to_the_same_end(settings):
    def alike(one, other):
        return trains_alike(*(check_config(settings | changes, "here") for changes in (one, other)))

    assert alike({"output_dir": "a", "tracking": []}, {"output_dir": "b", "overwrite": True})
    assert not alike({"seed": 0}, {"seed": 1})
    assert alike({}, {"guards": {"dominating_term": "warn", "every": 3}})
    assert not alike({}, {"guards": {"dominating_term": "skip"}})
    assert not alike({"balance": "gradient"}, {"balance": "none"})
    plain = {"teacher": None, "losses": {}}
    assert alike(plain | {"balance": "gradient"}, plain | {"balance": "none", "guards": {"dominating_term": "skip"}})


def test_a_loss_of_a_recipe_is_left_out_by_null(write):
    assert set(load_config(write(), ["losses.soft_label=null"]).losses) == {"box", "feature_mimic", "fpn_attention"}
    assert load_config(write(), ["losses=null", "teacher=null"]).losses == {}


def test_without_labelled_images_there_is_nothing_to_balance_with(settings):
    settings["data"] |= {"train": None, "unlabelled": {"root": "x"}}
    settings["teacher"] = {"path": "y"}
    del settings["balance"]
    assert check_config(settings, "here").balance == "none"
    del settings["data"]["train"]
    assert check_config(settings, "here").balance == "gradient"


def test_gradients_that_no_loss_would_give_are_not_gone_by(settings):
    settings["data"] |= {"train": None, "unlabelled": {"root": "x"}}
    settings |= {"teacher": {"path": "y"}, "balance": "none"}
    assert settings["pruning"]["importance"] == "taylor"
    check_config(settings, "here")
    settings["pruning"]["knowledge"] = False
    with pytest.raises(UserError, match=r"pruning.knowledge: .* taylor would find no gradient; say true, or choose"):
        check_config(settings, "here")
    settings["pruning"]["importance"] = "group_l2"
    check_config(settings, "here")
    settings["pruning"] |= {"importance": "group_fisher", "knowledge": True}
    with pytest.raises(UserError, match=r"pruning.importance: group_fisher goes by gradients, .* its only teacher"):
        check_config(settings | {"teacher": "original"}, "here")
