"""What others have reported on MagnaTagATune, as read in the sources: a row for each way to divide and label it."""

PAPER_SIZES = 18000, 2000, 5863  # clips that train, validate and test

ROWS = {  # by split, merge_tags, untagged and sizes, all of them with 50 tags
    ("random", True, True, *PAPER_SIZES): """\
random split, 50 merged tags; published ROC-AUC:
  the paper: validation 0.904, test 0.900; its authors' earlier networks, from their README's history: 0.877, 0.899
  amalad's port of the paper's, on a random split of its own: validation 0.9159, test 0.9094""",
    ("folder", False, True, 18709, 1825, 5329): """\
folder split, 50 tags not merged, all clips; published ROC-AUC/average precision of test:
  MARBLE's table: MusiCNN 0.903/0.378, CLMR 0.895/0.360, Jukebox 0.914/0.406, MULE 0.912/0.401, MERT-v1-330M 0.911/0.395
  MuQ's table: MERT 0.913/0.402, MusicFM 0.913/0.400, MuQ 0.914/0.403, MuQ-iter 0.914/0.401
  musicnn's own paper: 0.9067/0.3831""",
    ("folder", False, False, 15250, 1529, 4332): """\
folder split, 50 tags not merged, untagged clips left out; published ROC-AUC/average precision of test:
  Won, Ferraro, Bogdanov, Serra 2020, three undecodable clips left out too: FCN 0.9005/0.4295, Musicnn 0.9106/0.4493,
    Sample-level CNN 0.9058/0.4422, the same with squeeze-excitation 0.9103/0.4520, CRNN 0.8722/0.3625,
    self-attention 0.9077/0.4445, Harmonic CNN 0.9127/0.4611 (five reruns by a user lie within 0.0009/0.0049),
    short-chunk CNN 0.9126/0.4590, short-chunk ResNet 0.9129/0.4614""",
}


def published(checkpoint):
    """Return the row whose figures may be compared with a checkpoint's scores, or a line that there is none."""
    if checkpoint["synthetic"]:
        return "nothing published to compare with: the scores are on SYNTHETIC clips and say nothing about music"
    trained = {"merge_tags": True, "untagged": True, **checkpoint["hyperparameters"]}
    sizes = [len(checkpoint["clip_ids"][part]) for part in ("train", "validation", "test")]
    row = *(trained.get(name) for name in ("split", "merge_tags", "untagged")), *sizes
    if row not in ROWS or len(checkpoint["tag_names"]) != 50 or trained.get("start_from"):
        return "nothing published to compare with: other clips, tags or split, or fine-tuned"
    return f"comparable, on MagnaTagATune: {ROWS[row]}"
