"""How far each of timm's convolutional families can be cut, and what of it stays whole and why.

    python benchmarks/backbones.py

Builds a detector on the smallest member of every family, follows its channels and cuts every group to 8 channels;
nothing is trained. Writes docs/backbones.md.
"""

import argparse
import copy
import sys
from collections import Counter
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import students
from benchmarks.arms import ROOT, markdown
from distill.distiller import Distiller
from distill.measure import count_macs
from distill.pruning.budget import make_plan
from distill.pruning.graph import ChannelGraph, trace_channels
from students.plan import Plan, apply_plan, named_tensors

# by timm's module, the smallest member of each family that it builds; test networks are left out
FAMILIES = {
    "byoanet": "botnet26t_256 halonet26t lambda_resnet26t",
    "byobnet": "bat_resnext26ts eca_resnext26ts gcresnext26ts gernet_s mobileone_s0 repvgg_a0 resnet32ts seresnext26ts",
    "convnext": "convnext_atto convnextv2_atto",
    "cspnet": "cs3darknet_focus_s cs3darknet_s cs3edgenet_x cs3se_edgenet_x cspdarknet53 cspresnet50 cspresnext50 "
    "darknet17 sedarknet21",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla34 dla46x_c dla60_res2net dla60_res2next",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientnet": "efficientnet_b0 efficientnet_b0_g8_gn efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 "
    "fbnetc_100 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_035 semnasnet_050 "
    "spnasnet_100 tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s tinynet_e",
    "efficientvit_mit": "efficientvit_b0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnet_tiny hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_base",
    "mambaout": "mambaout_femto",
    "mobilenetv3": "fbnetv3_b lcnet_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium",
    "nasnet": "nasnetalarge",
    "nfnet": "dm_nfnet_f0 eca_nfnet_l0 nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 nfnet_l0",
    "pnasnet": "pnasnet5large",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetv_040 regnetx_002 regnety_002 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_48w_2s res2next50",
    "resnest": "resnest14d",
    "resnet": "ecaresnet26t resnet10t resnet18 resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d seresnet18 "
    "seresnext26d_32x4d",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s050",
    "tresnet": "tresnet_m",
    "vgg": "vgg11 vgg11_bn",
    "vovnet": "eca_vovnet39b ese_vovnet19b_slim_dw vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41 xception41p",
}
BACKBONES = [name for members in FAMILIES.values() for name in members.split()]
SIZES = (128, 256)  # the smallest that the network runs at is taken: channels do not depend on it


def build(name: str) -> tuple[students.Detector, tuple[int, int]]:
    """A small detector on a backbone, and an image size that it runs at.

    Raises:
        ValueError: what the user of this backbone is told.
    """
    settings = {"class_names": ["a"], "backbone": name, "channels": 32, "head_depth": 1}
    try:
        detector = students.build("dense", **settings, levels=(3, 4, 5))
    except ValueError:  # some have no map at stride 8
        detector = students.build("dense", **settings, levels=(4, 5))
    skeleton = copy.deepcopy(detector).to("meta")
    size = next((size for size in SIZES if _runs(skeleton, size)), None)
    if size is None:
        raise ValueError(f"{name} runs neither at {SIZES[0]} nor at {SIZES[1]} px")
    return detector, (size, size)


def _runs(detector: students.Detector, size: int) -> bool:
    try:
        count_macs(detector, (size, size))
    except (RuntimeError, AssertionError):
        return False
    return True


def plan_to(unit: Distiller, graph: ChannelGraph, share: float, round_to: int = 8) -> Plan:
    """The plan that leaves every group a share of its channels, in multiples, chosen without regard to their worth."""
    counts = []
    for group in graph.groups:
        step = group.step(round_to)
        counts.append(min(group.width, max(1, round(share * group.width / step)) * step))
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(group.width, generator=generator) for group in graph.groups]
    return make_plan(graph.groups, scores, counts, named_tensors(unit))


def macs_after(unit: Distiller, plan: Plan, image_size: tuple[int, int]) -> int:
    trial = copy.deepcopy(unit.student).to("meta")
    apply_plan([(trial, plan.below("student."))])
    return count_macs(trial, image_size)


def plan_to_half(unit: Distiller, graph: ChannelGraph, image_size: tuple[int, int]) -> Plan | None:
    """The mildest of 16 plans that leaves no more than half of the MACs; None where there is none."""
    uncut = count_macs(copy.deepcopy(unit.student).to("meta"), image_size)
    plans = (plan_to(unit, graph, share / 16) for share in range(15, -1, -1))
    return next((plan for plan in plans if 2 * macs_after(unit, plan, image_size) <= uncut), None)


def row(name: str) -> list[str]:
    """Backbone, MACs left at the least, layers that stay whole, and the most frequent reason."""
    try:
        detector, image_size = build(name)
        unit = Distiller(detector)
        graph = trace_channels(unit, image_size)
    except ValueError as error:
        return [name, "refused", "", str(error)]
    least = macs_after(unit, plan_to(unit, graph, 0.0), image_size) / count_macs(detector, image_size)
    reasons = Counter(graph.whole.values())
    reason = reasons.most_common(1)[0][0].replace("student.backbone.body.", "") if reasons else ""
    return [name, f"{least:.0%}", str(len(graph.whole) or ""), reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "backbones.md")
    parser.add_argument(
        "names", nargs="*", default=BACKBONES, metavar="NAME", help="timm models, instead of one a family"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names:
        rows.append(row(name))
        print(*rows[-1], sep="  ", flush=True)
    table = markdown(["backbone", "MACs left at the least", "layers left whole", "mostly because"], rows)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(INTRODUCTION + table)


INTRODUCTION = """# What can be cut

The smallest member of every convolutional family of timm, as the backbone of a detector with a pyramid and a head of 32
channels, every group of channels cut to 8; written by `python benchmarks/backbones.py`. A layer is left whole where its
channels run through something that cannot be followed, or through code that counts on their number; the prediction
layers, which always stay, are not counted. Transformers are left out: most give no maps at strides 8, 16 and 32, or
only at an image size of their own, and what their attention heads tie together stays whole.

"""

if __name__ == "__main__":
    main()
