"""Published figures stand beside the scores of their own split and tags, and of no others."""

import re

import pytest

from lib.published import published

FIGURES = re.compile(r"0\.\d{3,4}")
PAPERS = {"split": "random", "n_tags": 50, "merge_tags": True, "untagged": True, "start_from": None}
FOLDER = {**PAPERS, "split": "folder", "merge_tags": False}
RUNS = {
    "the paper": (PAPERS, (18000, 2000, 5863), ["0.904", "0.900", "0.877", "0.899", "0.9159", "0.9094"]),
    "MARBLE": (FOLDER, (18709, 1825, 5329), ["0.903", "0.378", "0.395", "0.401", "0.9067", "0.3831"]),
    "Won": ({**FOLDER, "untagged": False}, (15250, 1529, 4332), ["0.9005", "0.4295", "0.9129", "0.4614", "0.0049"]),
}


def printed(hyperparameters, sizes, n_tags=50, synthetic=False):
    clip_ids = {part: range(size) for part, size in zip(("train", "validation", "test"), sizes)}
    tag_names = [f"tag {tag}" for tag in range(n_tags)]
    return published(
        {"synthetic": synthetic, "clip_ids": clip_ids, "tag_names": tag_names, "hyperparameters": hyperparameters}
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_row_is_printed_beside_its_own_runs_alone(name):
    hyperparameters, sizes, figures = RUNS[name]
    found = printed({"seed": 1, **hyperparameters}, sizes)
    assert name in found and set(figures) <= set(FIGURES.findall(found))
    assert all(other == name or other not in found for other in RUNS)
    for change in (
        {"split": "artist"},
        {"merge_tags": not hyperparameters["merge_tags"]},
        {"untagged": not hyperparameters["untagged"]},
        {"start_from": "best.pt"},
    ):
        assert not FIGURES.search(printed({**hyperparameters, **change}, sizes)), change
    for part in range(3):
        others = [size - (place == part) for place, size in enumerate(sizes)]
        assert not FIGURES.search(printed(hyperparameters, others))
    assert not FIGURES.search(printed(hyperparameters, sizes, n_tags=49))
    assert "SYNTHETIC" in (demo := printed(hyperparameters, sizes, synthetic=True)) and not FIGURES.search(demo)


def test_a_checkpoint_of_an_earlier_version_has_its_row_too():
    assert "the paper" in printed({"split": "random", "n_tags": 50}, (18000, 2000, 5863))
