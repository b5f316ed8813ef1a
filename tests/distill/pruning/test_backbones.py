import copy

import pytest
import timm
import torch

import students
from benchmarks import backbones
from distill.distiller import Distiller
from distill.measure import count_macs, count_parameters
from distill.pruning.graph import trace_channels
from students.artifact import cut
from students.plan import Plan

TRANSFORMERS = (
    "beit cait coat convit cpubone crossvit csatv2 davit deepseek_vit deit efficientformer efficientformer_v2 "
    "efficientvim efficientvit_msra eva focalnet gcvit gemma4_vit hiera hieradet_sam2 iformer levit lowformer maxxvit "
    "metaformer mlp_mixer mobilenetv5 mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit sequencer shvit "
    "swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer "
    "vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit"
)
# of a single width throughout, without maps at other strides
ISOTROPIC = "convmixer"


@pytest.mark.slow
def test_no_family_is_forgotten():
    modules = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    assert modules <= {*backbones.FAMILIES, *TRANSFORMERS.split(), ISOTROPIC}


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_half_of_a_backbone(name, tmp_path):
    try:
        detector, size = backbones.build(name)
    except ValueError as error:
        assert "\n" not in str(error)
        pytest.skip(str(error))
    unit = Distiller(detector)
    graph = trace_channels(unit, size)
    plan = backbones.plan_to_half(unit, graph, size)
    if plan is None:
        assert graph.whole  # nothing else may keep a backbone from being halved
        plan = backbones.plan_to(unit, graph, 0.0)
    uncut, foretold = count_macs(copy.deepcopy(detector).to("meta"), size), backbones.macs_after(unit, plan, size)
    cut(detector, Plan.from_json(plan.below("student.").to_json()))
    assert count_macs(detector, size) == foretold < uncut

    images = torch.rand(2, 3, *size)
    outputs = [x for levels in detector.train()(images) for x in levels]
    sum(x.square().mean() for x in outputs).backward()
    students.save(detector, tmp_path / "cut")
    again = students.load(tmp_path / "cut")
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in detector.state_dict().items()}
    assert count_parameters(again) == count_parameters(detector)
    with torch.no_grad():
        for found, wanted in zip(again(images), detector.eval()(images)):
            assert all(map(torch.equal, found, wanted))


def test_the_table_tells_what_stays():
    assert backbones.row("resnet10t")[0] == "resnet10t" and backbones.row("resnet10t")[2:] == ["", ""]
    _, least, whole, reason = backbones.row("eca_resnext26ts")
    assert least.endswith("%") and int(whole) > 8 and "a convolution runs along it" in reason
    assert backbones.row("vit_tiny_patch16_224")[1] == "refused"
