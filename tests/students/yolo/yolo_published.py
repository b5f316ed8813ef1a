"""The networks as their authors list them: numbered layers, each with where its input comes from.

A reference of its own for wiring, names and numbers: nothing here is built from the package's parts.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# by layer: kind and arguments, then @ and the layer that it reads where that is not the one before.
# C: channels, kernel, stride; C3: channels, number, n for no shortcut; P: halving by pooling; S: pooling of that size;
# U: twice the size; J: join these layers; D: detect on these
V5 = """
C 64 6 2 | C 128 3 2 | C3 128 3 | C 256 3 2 | C3 256 6 | C 512 3 2 | C3 512 9 | C 1024 3 2 | C3 1024 3 | SPPF 1024
C 512 1 1 | U | J -1 6 | C3 512 3 n | C 256 1 1 | U | J -1 4 | C3 256 3 n
C 256 3 2 | J -1 14 | C3 512 3 n | C 512 3 2 | J -1 10 | C3 1024 3 n | D 17 20 23
"""
V7 = """
C 32 3 1 | C 64 3 2 | C 64 3 1 | C 128 3 2
C 64 1 1 | C 64 1 1 @-2 | C 64 3 1 | C 64 3 1 | C 64 3 1 | C 64 3 1 | J -1 -3 -5 -6 | C 256 1 1
P | C 128 1 1 | C 128 1 1 @-3 | C 128 3 2 | J -1 -3
C 128 1 1 | C 128 1 1 @-2 | C 128 3 1 | C 128 3 1 | C 128 3 1 | C 128 3 1 | J -1 -3 -5 -6 | C 512 1 1
P | C 256 1 1 | C 256 1 1 @-3 | C 256 3 2 | J -1 -3
C 256 1 1 | C 256 1 1 @-2 | C 256 3 1 | C 256 3 1 | C 256 3 1 | C 256 3 1 | J -1 -3 -5 -6 | C 1024 1 1
P | C 512 1 1 | C 512 1 1 @-3 | C 512 3 2 | J -1 -3
C 256 1 1 | C 256 1 1 @-2 | C 256 3 1 | C 256 3 1 | C 256 3 1 | C 256 3 1 | J -1 -3 -5 -6 | C 1024 1 1
SPPCSPC 512 | C 256 1 1 | U | C 256 1 1 @37 | J -1 -2
C 256 1 1 | C 256 1 1 @-2 | C 128 3 1 | C 128 3 1 | C 128 3 1 | C 128 3 1 | J -1 -2 -3 -4 -5 -6 | C 256 1 1
C 128 1 1 | U | C 128 1 1 @24 | J -1 -2
C 128 1 1 | C 128 1 1 @-2 | C 64 3 1 | C 64 3 1 | C 64 3 1 | C 64 3 1 | J -1 -2 -3 -4 -5 -6 | C 128 1 1
P | C 128 1 1 | C 128 1 1 @-3 | C 128 3 2 | J -1 -3 63
C 256 1 1 | C 256 1 1 @-2 | C 128 3 1 | C 128 3 1 | C 128 3 1 | C 128 3 1 | J -1 -2 -3 -4 -5 -6 | C 256 1 1
P | C 256 1 1 | C 256 1 1 @-3 | C 256 3 2 | J -1 -3 51
C 512 1 1 | C 512 1 1 @-2 | C 256 3 1 | C 256 3 1 | C 256 3 1 | C 256 3 1 | J -1 -2 -3 -4 -5 -6 | C 512 1 1
Rep 256 @75 | Rep 512 @88 | Rep 1024 @101 | D 102 103 104
"""
TINY = """
C 32 3 2 | C 64 3 2 | C 32 1 1 | C 32 1 1 @-2 | C 32 3 1 | C 32 3 1 | J -1 -2 -3 -4 | C 64 1 1
P | C 64 1 1 | C 64 1 1 @-2 | C 64 3 1 | C 64 3 1 | J -1 -2 -3 -4 | C 128 1 1
P | C 128 1 1 | C 128 1 1 @-2 | C 128 3 1 | C 128 3 1 | J -1 -2 -3 -4 | C 256 1 1
P | C 256 1 1 | C 256 1 1 @-2 | C 256 3 1 | C 256 3 1 | J -1 -2 -3 -4 | C 512 1 1
C 256 1 1 | C 256 1 1 @-2 | S 5 | S 9 @-2 | S 13 @-3 | J -1 -2 -3 -4 | C 256 1 1 | J -1 -7 | C 256 1 1
C 128 1 1 | U | C 128 1 1 @21 | J -1 -2 | C 64 1 1 | C 64 1 1 @-2 | C 64 3 1 | C 64 3 1 | J -1 -2 -3 -4 | C 128 1 1
C 64 1 1 | U | C 64 1 1 @14 | J -1 -2 | C 32 1 1 | C 32 1 1 @-2 | C 32 3 1 | C 32 3 1 | J -1 -2 -3 -4 | C 64 1 1
C 128 3 2 | J -1 47 | C 64 1 1 | C 64 1 1 @-2 | C 64 3 1 | C 64 3 1 | J -1 -2 -3 -4 | C 128 1 1
C 256 3 2 | J -1 37 | C 128 1 1 | C 128 1 1 @-2 | C 128 3 1 | C 128 3 1 | J -1 -2 -3 -4 | C 256 1 1
C 128 3 1 @57 | C 256 3 1 @65 | C 512 3 1 @73 | D 74 75 76
"""
NETWORKS = {"yolov5": V5, "yolov7": V7, "yolov7_tiny": TINY}


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


class Conv(nn.Module):
    def __init__(self, before, channels, kernel=1, stride=1, act=None):
        super().__init__()
        self.conv = nn.Conv2d(before, channels, kernel, stride, 2 if kernel == 6 else kernel // 2, bias=False)
        self.bn = norm(channels)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels, shortcut):
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(channels, channels), Conv(channels, channels, 3), shortcut

    def forward(self, x):
        return x * self.add + self.cv2(self.cv1(x))


class C3(nn.Module):
    def __init__(self, before, channels, number, shortcut):
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2, self.cv3 = Conv(before, half), Conv(before, half), Conv(channels, channels)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(number)))

    def forward(self, x):
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class SPPF(nn.Module):
    def __init__(self, before, channels):
        super().__init__()
        self.cv1, self.cv2 = Conv(before, before // 2), Conv(before * 2, channels)

    def forward(self, x):
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], 1))


class SPPCSPC(nn.Module):
    def __init__(self, before, c):
        super().__init__()
        self.cv1, self.cv2, self.cv3, self.cv4 = Conv(before, c), Conv(before, c), Conv(c, c, 3), Conv(c, c)
        self.cv5, self.cv6, self.cv7 = Conv(4 * c, c), Conv(c, c, 3), Conv(2 * c, c)

    def forward(self, x):
        y = self.cv4(self.cv3(self.cv1(x)))
        y = self.cv6(self.cv5(torch.cat([y, *(F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13))], 1)))
        return self.cv7(torch.cat([y, self.cv2(x)], 1))


class RepConv(nn.Module):
    def __init__(self, before, channels):
        super().__init__()
        self.rbr_dense = nn.Sequential(nn.Conv2d(before, channels, 3, 1, 1, bias=False), norm(channels))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(before, channels, 1, bias=False), norm(channels))

    def forward(self, x):
        return F.silu(self.rbr_dense(x) + self.rbr_1x1(x))


class Implicit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.implicit = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.5)


class Detect(nn.Module):
    def __init__(self, before, num_classes, implicit):
        super().__init__()
        rows = 3 * (5 + num_classes)
        self.m = nn.ModuleList(nn.Conv2d(c, rows, 1) for c in before)
        self.register_buffer("anchors", torch.rand(3, 3, 2) * 5)  # in strides
        if implicit:
            self.register_buffer("anchor_grid", torch.rand(3, 1, 3, 1, 1, 2))
            self.ia = nn.ModuleList(Implicit(c) for c in before)
            self.im = nn.ModuleList(Implicit(rows) for _ in before)

    def forward(self, maps):
        if hasattr(self, "ia"):
            return [im.implicit * m(x + ia.implicit) for x, m, ia, im in zip(maps, self.m, self.ia, self.im)]
        return [m(x) for x, m in zip(maps, self.m)]


class Model(nn.Module):
    """A whole network; what it gives are the raw outputs of its detection layer, (B, 3 * (5 + K), H, W) a level."""

    def __init__(self, family, width, depth, num_classes, names):
        super().__init__()
        self.names, self.wiring, layers, widths = names, [], [], [3]
        act = nn.LeakyReLU(0.1) if family == "yolov7_tiny" else nn.SiLU()
        entries = [entry for line in NETWORKS[family].strip().splitlines() for entry in line.split(" | ")]
        for number, entry in enumerate(entries):
            text, _, source = entry.partition(" @")
            kind, *given = text.split()
            sources = [int(n) for n in given] if kind in "JD" else [int(source or -1)]
            sources = [n if n >= 0 else number + n for n in sources]
            before = [widths[n + 1] for n in sources]
            after = before[0]
            if kind in ("C", "C3", "SPPF", "SPPCSPC", "Rep"):
                after = math.ceil(int(given[0]) * width / 8) * 8
            if kind == "C":
                layer = Conv(before[0], after, int(given[1]), int(given[2]), act)
            elif kind == "C3":
                layer = C3(before[0], after, max(1, round(int(given[1]) * depth)), "n" not in given)
            elif kind in ("SPPF", "SPPCSPC", "Rep"):
                layer = {"SPPF": SPPF, "SPPCSPC": SPPCSPC, "Rep": RepConv}[kind](before[0], after)
            elif kind == "D":
                layer = Detect(before, num_classes, implicit=family != "yolov5")
            elif kind == "P":
                layer = nn.MaxPool2d(2, 2)
            elif kind == "S":
                layer = nn.MaxPool2d(int(given[0]), 1, int(given[0]) // 2)
            else:
                layer, after = (nn.Upsample(scale_factor=2), after) if kind == "U" else (nn.Identity(), sum(before))
            self.wiring.append((kind, sources))
            layers.append(layer)
            widths.append(after)
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        maps = [x]
        for (kind, sources), layer in zip(self.wiring, self.model):
            read = [maps[n + 1] for n in sources]
            maps.append(layer(torch.cat(read, 1) if kind == "J" else read if kind == "D" else read[0]))
        return maps[-1]
