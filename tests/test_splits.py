"""Which clips train, validate and test: the original's, the published ones, and what the trainer does with each."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT, write_clip_info, write_dump
from get_data import ANNOTATIONS, CLIP_INFO
from lib import scores
from lib.baseline import names_only_predictions, origins_of, repeatability
from lib.checkpoint import load_checkpoint
from lib.common import InputError
from lib.splits import divide_clips, split_by_artist, split_by_folder, split_sizes
from model import MultiScaleCNN, initialize
from tags import annotations_file, clip_info_of, read_annotations, select_tags
from trainer import Settings, split_clips

RECORDED = json.loads((ROOT / "tests/original.json").read_text())
PARTS = "train", "validation", "test"


def sha(rows):
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def test_split_and_orders_are_the_originals():
    rng = np.random.RandomState(1337)
    initialize(MultiScaleCNN(50), rng)
    train, validation, test = split_clips(25863, 18000, 2000, rng)
    expected = RECORDED["split"]["sha256_int64_le"]
    assert (sha(train), sha(validation), sha(test)) == (expected["train"], expected["val"], expected["test"])
    orders = {facts["epoch"]: facts["sha256_int64_le"] for facts in RECORDED["train_order_after_epoch"]}
    for epoch in range(1, 41):
        rng.shuffle(train)
        if epoch in orders:
            assert sha(train) == orders[epoch], f"after epoch {epoch}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A dump of 30 clips, two of a track, eight of an artist, in folders 0, 9, c, d and f in turn."""
    return write_clip_info(write_dump(tmp_path_factory.mktemp("clips"), n_clips=30))


@pytest.mark.parametrize("split", ["random", "folder", "artist"])
def test_the_trainer_uses_the_split_that_was_asked_for(clips, tmp_path, call_script, split):
    options = ["--split", split, "--train-size", 10, "--validation-size", 10, "--epochs", 0, "--seed", 7]
    place = "--data", clips, "--experiments", tmp_path
    printed = call_script("trainer.py", "--device", "cpu", *place, *options).stdout
    clip_ids = load_checkpoint(tmp_path / "paper/best.pt")["clip_ids"]
    found = {part: set(ids.tolist()) for part, ids in clip_ids.items()}
    ids = np.load(clips / "ids.npy")
    if split == "random":
        rng, order = np.random.RandomState(7), np.arange(30)
        initialize(MultiScaleCNN(3), rng)
        rng.shuffle(order)
        expected = dict(zip(("validation", "test", "train"), (order[:10], order[10:20], order[20:])))
    elif split == "folder":
        part_of = {"0": "train", "9": "train", "c": "validation", "d": "test", "f": "test"}
        parts = np.array([part_of[path[0]] for path in np.load(clips / "mp3_paths.npy")])
        expected = {part: parts == part for part in PARTS}
    else:
        artists = [{(clip - 101) // 8 for clip in found[part]} for part in PARTS]
        assert all(artists) and sum(map(len, artists)) == len(set.union(*artists)) == 4
        return
    assert found == {part: set(ids[rows].tolist()) for part, rows in expected.items()}
    assert (
        f"{len(found['train'])} training, {len(found['validation'])} validation, {len(found['test'])} test" in printed
    )


def test_the_trainer_takes_a_seed_for_the_split_alone_and_leaves_out_untagged_clips(clips, tmp_path, call_script):
    options = ["--train-size", 10, "--validation-size", 10, "--epochs", 0, "--seed", 3, "--split-seed", 7]
    place = "--data", clips, "--experiments", tmp_path, "--device", "cpu"
    call_script("trainer.py", *place, *options, "--no-untagged")
    rng, order = np.random.RandomState(7), np.arange(30)
    initialize(MultiScaleCNN(50), rng)
    rng.shuffle(order)
    tagged = set(np.load(clips / "ids.npy")[np.load(clips / "tags.npy").any(axis=1)].tolist())
    assert len(tagged) == 28
    for part, rows in (("validation", order[:10]), ("test", order[10:20]), ("train", order[20:])):
        found = load_checkpoint(tmp_path / "paper/best.pt")["clip_ids"][part]
        assert set(found.tolist()) == set((rows + 101).tolist()) & tagged


class Clips(SimpleNamespace):
    """What divide_clips looks at in a dump."""

    def __len__(self):
        return len(self.ids)


@pytest.mark.parametrize("split", ["random", "folder", "artist"])
def test_a_seed_of_the_split_alone(clips, split):
    """Draws what it would for the paper's network with 50 tags; weights, order of clips and all else are the seed's."""
    dump = Clips(ids=np.load(clips / "ids.npy"), mp3_paths=np.load(clips / "mp3_paths.npy").tolist())

    def divide(seed, split_seed=None, n_tags=50):
        rng = np.random.RandomState(seed)
        initialize(MultiScaleCNN(n_tags), rng)
        settings = Settings(data=clips, split=split, split_seed=split_seed, seed=seed, train_size=14, validation_size=8)
        return divide_clips(settings, dump, np.ones((30, 1)), rng), rng.rand()

    paper, after = divide(1337)
    same, after_same = divide(1337, 1337)
    assert all(np.array_equal(rows, same[part]) for part, rows in paper.items()) and after == after_same
    orders, tails = {tuple(paper["train"])}, []
    for seed, n_tags in ((1, 50), (2, 50), (1, 3), (1337, 3)):
        found, after = divide(seed, 1337, n_tags)
        assert all(set(found[part]) == set(rows) for part, rows in paper.items())
        assert after == divide(seed, None, n_tags)[1], "epochs after the first have the seed's order too"
        orders.add(tuple(found["train"]))
        own = divide(seed, None, n_tags)[0]["train"]
        tails.append([row for row in found["train"] if row not in own])
    assert len(orders) == 5
    assert split == "folder" or any(tail != sorted(tail) for tail in tails), (
        "what is not its own training clip comes last"
    )
    if split != "folder":
        assert set(divide(1337, 1)[0]["test"]) != set(paper["test"])


def test_the_papers_sizes_on_a_smaller_data_set_keep_their_proportions(capsys):
    assert split_sizes(25863, 18000, 2000) == (18000, 2000)
    assert split_sizes(20, 8, 3) == (8, 3)
    assert capsys.readouterr().out == ""
    assert split_sizes(2586, 18000, 2000) == (1800, 200)
    assert "2,586 clips are too few for the paper's" in capsys.readouterr().out
    assert split_sizes(20001, 18000, 2000) == (13920, 1547), "4,534 clips for the test, not 1"
    assert split_sizes(3, 18000, 2000) == (1, 1)
    assert split_sizes(60, 40, 2000) == (40, 5), "20 clips as 2,000 to 5,863"
    assert split_sizes(60, 18000, 15) == (34, 15), "45 clips as 18,000 to 5,863"
    assert split_sizes(26000, 20000, 2000) == (20000, 2000)
    assert split_sizes(10000, 5000, 2000) == (5000, 2000) and split_sizes(20500, 18000, 1000) == (18000, 1000)
    for n_clips, *sizes, named in (
        (2, 18000, 2000, "the split"),
        (25863, 20000, 5863, "--train-size 20,000 and --validation-size 5,863"),
        (20, 17, 3, "--train-size 17 and --validation-size 3"),
        (60, 59, 2000, "--train-size 59"),
        (60, 18000, 59, "--validation-size 59"),
    ):
        with pytest.raises(InputError, match=f"^{named}: leaves too few of {n_clips:,} clips"):
            split_sizes(n_clips, *sizes)


def test_no_artist_is_in_two_parts_and_sizes_are_near():
    artists = np.random.RandomState(0).zipf(1.5, 2000) % 100
    parts = split_by_artist(artists, 1400, 150, np.random.RandomState(1))
    assert sorted(np.concatenate(parts)) == list(range(2000))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(artists[parts[one]]) & set(artists[parts[other]])
    assert abs(len(parts[1]) - 150) <= 5 and abs(len(parts[2]) - 450) <= 5
    equal = split_by_artist(np.arange(20) // 2, 12, 4, np.random.RandomState(1))
    assert [len(part) for part in equal] == [12, 4, 4], "an artist that just fits is taken"
    others = split_by_artist(artists, 1400, 150, np.random.RandomState(2))
    assert set(others[2]) != set(parts[2]), "the generator chooses the artists"
    by_folder = split_by_folder([f"{row % 16:x}/{row}.mp3" for row in range(99)], np.random.RandomState(1))
    for train in (parts[0], by_folder[0]):
        assert (np.diff(train) < 0).any(), "and shuffles the training clips, in the other published split too"


@pytest.fixture
def real_tables(shared, tmp_path):
    """A folder with MagnaTagATune's own two tables."""
    for known in (ANNOTATIONS, CLIP_INFO):
        table = gzip.decompress((shared / f"mtat/{known.name}.gz").read_bytes())
        assert (hashlib.md5(table).hexdigest(), len(table)) == (known.md5, known.end), "get_data.py would refuse it"
        (tmp_path / known.name).write_bytes(table)
    return tmp_path


def test_the_real_splits_have_the_published_sizes_and_leakage(real_tables):
    annotations = read_annotations(annotations_file(real_tables))
    info = clip_info_of(real_tables, annotations.ids)
    clips = Clips(ids=annotations.ids, mp3_paths=annotations.mp3_paths)

    def sizes_and_shares(split):
        """The clips of each part, and the test clips of which track, album and artist are in training too, in %."""
        settings, rng = Settings(data=real_tables, split=split), np.random.RandomState(1337)
        train, validation, test = divide_clips(settings, clips, annotations.labels, rng).values()
        assert sorted(np.concatenate([train, validation, test])) == list(range(25863))
        shares = []
        for kind in ("track", "album", "artist"):
            trained_on = {getattr(info[row], kind) for row in train}
            shares.append(round(100 * np.mean([getattr(info[row], kind) in trained_on for row in test])))
        return [len(train), len(validation), len(test)], shares

    assert sizes_and_shares("random") == ([18000, 2000, 5863], [95, 100, 100])
    assert sizes_and_shares("folder") == ([18709, 1825, 5329], [0, 0, 62])
    sizes, shares = sizes_and_shares("artist")
    assert shares == [0, 0, 0] and np.abs(np.subtract(sizes, (18000, 2000, 5863))).max() <= 20

    for merge, sizes in ((False, [15250, 1529, 4332]), (True, [15425, 1537, 4390])):
        labels, _ = select_tags(annotations.labels, annotations.tag_names, 50, merge)
        found = {}
        for untagged in (True, False):
            settings, rng = Settings(data=real_tables, split="folder", untagged=untagged), np.random.RandomState(1)
            found[untagged] = divide_clips(settings, clips, labels, rng)
        assert [len(rows) for rows in found[False].values()] == sizes
        for part, rows in found[True].items():
            assert [row for row in rows if any(labels[row])] == found[False][part].tolist()


def test_what_names_alone_predict_of_the_real_music(real_tables):
    """What a network has to beat on the paper's split and on the folders, and how rarely annotators agree."""
    annotations = read_annotations(annotations_file(real_tables))
    origins = origins_of(clip_info_of(real_tables, annotations.ids))
    rng = np.random.RandomState(1337)
    initialize(MultiScaleCNN(50), rng)
    clips, found = Clips(ids=annotations.ids, mp3_paths=annotations.mp3_paths), []
    for split, merge, untagged in (("random", True, True), ("folder", False, True), ("folder", False, False)):
        labels, names = select_tags(annotations.labels, annotations.tag_names, 50, merge)
        settings = Settings(data=real_tables, split=split, untagged=untagged)
        train, validation, test = divide_clips(settings, clips, labels, rng).values()
        predicted = names_only_predictions(labels, train, origins)
        for rows in (validation, test):
            of_tags = (scores.of_each_tag(score, labels[rows], predicted[rows]) for score in scores.SCORES.values())
            found.append([round(scores.macro(each), 3) for each in of_tags])
        if merge:
            repeated = dict(zip(names, repeatability(labels, origins["track"])))
    assert found[:2] == [[0.875, 0.365], [0.879, 0.346]], "the paper's"
    assert found[2:4] == [[0.744, 0.197], [0.748, 0.184]], "by folder"
    assert found[4:] == [[0.746, 0.229], [0.753, 0.223]], "without the clips that have none of the tags"
    assert np.mean(list(repeated.values())) == pytest.approx(0.316, abs=5e-4)
    assert [round(repeated[name], 2) for name in ("rock", "choir")] == [0.63, 0.58]
