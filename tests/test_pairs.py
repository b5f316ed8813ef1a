"""docs/pairs.md says what the code does."""

import pytest

from benchmarks import pairs
from distill.terms import TERMS

# one of each kind of head
SOME = ("task_aligned", "gfl", "faster_rcnn", "yolov5")


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "pairs.md").read_text()


def read_cells(page):
    """(teacher, student): the letters that the table has for them."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = next(number for number, cells in enumerate(lines) if cells[0].startswith("teacher"))
    learners, rows = lines[start][1:], {cells[0]: cells[1:] for cells in lines[start + 2 :] if len(cells) > 3}
    return {(teacher, student): cell for teacher, cells in rows.items() for student, cell in zip(learners, cells)}


def compare(page, met):
    written = read_cells(page)
    assert {pair: one.cell for pair, one in met.items()} == {pair: written[pair] for pair in met}
    for one in met.values():
        for loss, reason in one.losses.items():
            assert reason == pairs.RAN or reason.startswith("losses.it."), (loss, reason)
            assert "\n" not in reason


def test_the_page_has_all_families_and_losses(page):
    cells = read_cells(page)
    teachers, learners = ({pair[n] for pair in cells} for n in (0, 1))
    assert teachers == {*pairs.MEMBERS, *pairs.FEATURES}
    assert learners == pairs.MEMBERS.keys() - {"dfine"}
    assert len(cells) == len(teachers) * len(learners)
    assert all(f"`{loss}`" in page for loss in TERMS)


def test_letters_are_those_of_what_ran():
    losses = dict.fromkeys(TERMS, "losses.it.name: refused")
    assert pairs.Met(losses).cell == "-"
    ran = losses | dict.fromkeys([*pairs.OVER_FEATURES, "pseudo_label", "dense_sigmoid"], pairs.RAN)
    assert pairs.Met(ran).cell == "FSP"
    with pytest.raises(AssertionError, match=r"only \['pkd'\] of the losses over features ran"):
        pairs.Met(losses | {"pkd": pairs.RAN}).cell  # noqa: B018


def test_some_pairs_are_as_the_page_says(page, tmp_path):
    compare(page, pairs.meet(SOME, [*SOME, "ViT features"], tmp_path))


@pytest.mark.slow
def test_all_pairs_are_as_the_page_says(page, tmp_path):
    there = pairs.available()
    compare(page, pairs.meet(there, [*there, *pairs.FEATURES], tmp_path))
