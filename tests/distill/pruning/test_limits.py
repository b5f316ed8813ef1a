import pytest

from distill.pruning.graph import ChannelGroup, Member
from distill.pruning.limits import Limits, layers_of

GROUP = ChannelGroup(
    "student.b.0.conv",
    40,
    tuple(
        Member(name, dim, (), ())
        for name, dim in [
            ("student.b.0.conv.weight", 0),
            ("student.b.0.norm.weight", 0),
            ("student.b.0.norm.running_mean", 0),
            ("student.b.0.shortcut.weight", 0),
            ("student.b.1.conv.weight", 1),
            ("terms.mimic.adapter.weight", 1),
        ]
    ),
)


def test_a_width_belongs_to_the_layers_that_give_it():
    assert layers_of(GROUP) == ["b.0.conv", "b.0.shortcut"]


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, (8, 64)),
        ({"floor": 0.25}, (16, 64)),
        ({"keep": ["b.0.*"]}, (40, 40)),
        ({"keep": ["b.1.*"]}, (8, 64)),  # a reader of these channels, not the layer that gives them
        ({"limits": {"*.shortcut": (0.3, 0.8)}}, (20, 51)),
        ({"limits": {"*.shortcut": (0.3, 0.8), "b.0.*": (0.1, 0.5)}, "floor": 0.2}, (20, 32)),
        ({"limits": {"b.*": (0.0, 0.3)}, "floor": 0.5}, (32, 32)),  # the floor wins
        ({"limits": {"b.*": (0.9, 1.0)}}, (40, 64)),  # no more than there are
    ],
)
def test_fewest_and_most_channels_of_an_uncut_width_of_64(settings, bounds):
    assert Limits(**settings).of(GROUP, uncut_width=64, step=8) == bounds


def test_caps_come_down_with_the_cuts():
    limits = Limits(limits={"b.*": (0.0, 0.5)})
    assert [limits.of(GROUP, 64, 8, done)[1] for done in (0.0, 0.5, 1.0)] == [64, 48, 32]


def test_patterns_that_match_nothing_are_refused():
    Limits(keep=["b.*"], limits={"*conv": (0, 1)}).check([GROUP])
    with pytest.raises(ValueError, match=r"^keep: 'b.0.covn' matches none of the 2 layers .*, such as b.0.conv$"):
        Limits(keep=["b.*", "b.0.covn"]).check([GROUP])
    with pytest.raises(ValueError, match=r"^limits: 'b.1.conv' matches none"):
        Limits(limits={"b.1.conv": (0, 1)}).check([GROUP])
