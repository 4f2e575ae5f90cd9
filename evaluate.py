"""Score a trained checkpoint on its validation and test clips, or tag your own music with it.

Writes results.json, tables and pictures beside the checkpoint, or into --output. With --against, compares it with
another experiment's on the test clips of both. With --tag, prints the most likely tags of each audio file instead.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.common import ROOT, Count, InputError, Seed, number, optional_picture, require_writable, run
from lib.common import whole_file, write_table

import numpy as np
import tyro

from lib import scores
from lib.baseline import band_features, baseline_predictions
from lib.checkpoint import load_checkpoint, load_network, n_test_clips_seen
from lib.dump import Dump
from lib.library import ELSEWHERE, tag_files
from lib.loader import Loader, predict
from lib.parallel import choose_device, started_with_others
from lib.scores import format_score
from lib.tagger import Tagger  # noqa: F401 - re-exported
from tags import clip_info_of, select_tags


@dataclass(frozen=True)
class Settings:
    # what to evaluate
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # the experiment whose best.pt is evaluated
    checkpoint: Path | None = None  # another checkpoint, instead of the experiment's best.pt
    output: Path | None = None  # folder for tables and pictures, instead of the checkpoint's
    data: Path = ROOT / "data"  # folder with the dump
    other_data: bool = False  # score the dump even if the checkpoint was trained on another
    against: str = ""  # another experiment, to compare with instead of scoring
    baseline: bool = True  # also score a baseline, a logistic regression on mel-band loudness

    # scores
    resamples: number(int, 1, 10_000) = 1000  # of the bootstrap behind the 95% intervals
    seed: Seed = 1337  # of the bootstrap
    batch_size: number(int, 1, 10_000) = 32  # clips per forward pass
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["checkpoint", "float32", "bfloat16", "float64"] = "checkpoint"  # the one it was trained in

    # your own music
    tag: tuple[Path, ...] | None = None  # audio files and folders of them to tag, instead of scoring
    top: Count = 5  # how many tags to print for each file
    json: bool = False  # print one JSON object, file -> tag -> probability
    taggram: bool = False  # draw each file's spectrogram and its tags over time
    csv: Path | None = None  # write a table instead, one row per file as it is tagged; resumes


EVALUATED = ("validation", "test")  # parts of the split
ENOUGH_CLIPS = 30  # to score those that share no track with training
WORTH_A_LISTEN = 10  # clips per tag in each direction


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if started_with_others():
        raise InputError("evaluate.py: runs in one process; start it with python instead of torchrun")
    path = settings.checkpoint or settings.experiments / settings.name / "best.pt"
    if settings.tag is not None or settings.csv or settings.json or settings.taggram:
        return tag_files(settings, path)
    ours = Evaluation(settings, path)
    print(end=ours.dump.note_on_table())
    require_writable(ours.output, ELSEWHERE)
    if settings.against:
        return compare(ours, Evaluation(settings, settings.experiments / settings.against / "best.pt"))

    bands = band_features(*ours.dump.verify())
    predicted = {part: ours.predict(ours.rows[part]) for part in EVALUATED}
    baseline = baseline_predictions(bands, ours.labels, ours.rows["train"]) if settings.baseline else None
    results = {
        "checkpoint": str(path),
        "data": str(settings.data),
        "other_data": ours.checkpoint["dump"] != ours.dump.fingerprint,
        "synthetic": ours.dump.synthetic,
        "intervals": ours.intervals,
    }
    for part, probabilities in predicted.items():
        results[part] = score_part(ours, ours.rows[part], probabilities, baseline)
    print_results(results, ours.checkpoint)  # before writing: a full disk must not lose them
    write_results(ours, results, predicted)


class Evaluation:
    """A checkpoint and the dump to score it on; `rows` are the dump's rows of each part of the checkpoint's split.

    `labels` (clips, tags) are those of the checkpoint's tags, `groups` (clips,) the units that the bootstrap
    draws, `info` the clips' origins if there is a table of them. Raises InputError if dump and checkpoint don't match.
    """

    def __init__(self, settings, path):
        self.settings, self.device = settings, choose_device(settings.device)
        self.output = settings.output or path.parent
        self.checkpoint, self.dump = load_checkpoint(path), Dump(settings.data)
        self.labels, self.rows = clips_of(self.checkpoint, self.dump, settings.other_data)
        has_info = (settings.data / "clip_info_final.csv").exists()
        self.info = clip_info_of(settings.data, self.dump.ids) if has_info else None
        self.groups = np.array([str(clip.track) for clip in self.info]) if has_info else self.dump.ids
        self.intervals = f"95%, {settings.resamples:,} resamples over {'tracks' if has_info else 'clips'}"

    def predict(self, rows):
        """Return the probabilities of the checkpoint's tags for the dump's `rows`: (rows, tags)."""
        net, precision = load_network(self.checkpoint, self.device, self.settings.precision)
        loader = Loader(self.dump, self.labels, self.checkpoint["normalization"], self.device, precision)
        return predict(net, loader, rows, self.settings.batch_size)

    def scores(self, rows, probabilities):
        """Return the lib.scores.Scores of predictions for the dump's `rows`."""
        resampling = self.groups[rows], self.settings.resamples, self.settings.seed
        return scores.scores_of(self.labels[rows], probabilities, *resampling)


def clips_of(checkpoint, dump, other_data):
    """Return (labels, rows): the dump's labels for the checkpoint's tags, and its rows of each part of the split.

    Raises InputError if the dump lacks one of the clips or tags, or was made with a different front end; and, unless
    `other_data`, if the checkpoint was trained on another dump.
    """
    if checkpoint["front_end"] != dump.front_end:
        raise InputError(f"{dump.data}: made with a different front end from the checkpoint's; remake the spectrograms")
    merge = checkpoint["hyperparameters"].get("merge_tags", True)
    labels, names = select_tags(dump.labels, dump.tag_names, len(dump.tag_names), merge)
    missing = [name for name in checkpoint["tag_names"] if name not in names]
    if missing:
        raise InputError(f"{dump.data}: has no tag {', '.join(missing)}; point --data at the checkpoint's data")
    rows = {}
    for part, ids in checkpoint["clip_ids"].items():
        rows[part] = np.flatnonzero(np.isin(dump.ids, ids.numpy()))
        if n_absent := len(ids) - len(rows[part]):
            raise InputError(f"{dump.data}: lacks {n_absent:,} of the checkpoint's {part} clips")
    if checkpoint["dump"] != dump.fingerprint and not other_data:
        raise InputError(f"{dump.data}: not the dump that the checkpoint was trained on; --other-data scores it anyway")
    return labels[:, [names.index(name) for name in checkpoint["tag_names"]]], rows


def score_part(evaluation, rows, probabilities, baseline):
    """Return the scores of predictions for the dump's `rows`, as in results.json; `baseline` has those for all rows."""
    labels, tag_names = evaluation.labels[rows], evaluation.checkpoint["tag_names"]
    ours = evaluation.scores(rows, probabilities)
    result = {
        "clips": len(rows),
        **ours.macro(),
        "clip_roc_auc": scores.macro(scores.clip_roc_auc(labels, probabilities)),
        "precision_at": {k: scores.macro(scores.precision_at(k, labels, probabilities)) for k in (1, 3, 5)},
        "one_class": [name for name, score in zip(tag_names, ours.per_tag[0]) if np.isnan(score)],
        "baseline": None,
        "tags": per_tag_rows(tag_names, labels, ours),
        "leakage": leakage(evaluation, rows, probabilities) if evaluation.info else None,
    }
    if baseline is not None:
        theirs = evaluation.scores(rows, baseline[rows])
        result["baseline"] = {**theirs.macro(), "network_minus_baseline": ours.minus(theirs).macro()}
    return result


def per_tag_rows(tag_names, labels, found):
    """Return a row of `found` scores for each tag, in the checkpoint's order."""
    columns = {"tag": tag_names, "positives": labels.sum(axis=0, dtype=int), "prevalence": labels.mean(axis=0)}
    for name, values, resampled in zip(scores.SCORES, *found):
        low, high = scores.interval(resampled)
        columns |= {name: values, f"{name}_low": low, f"{name}_high": high}
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()))
    return [dict(zip(columns, row)) for row in rows]


def leakage(evaluation, rows, probabilities):
    """Return the shares of `rows` whose track, album or artist is also in training, and the score on other tracks."""
    shared = {}
    for kind in ("track", "album", "artist"):
        origins = [getattr(clip, kind) for clip in evaluation.info]
        trained_on = {origins[row] for row in evaluation.rows["train"]}
        shared[kind] = np.array([origins[row] in trained_on for row in rows])
    fresh = ~shared["track"]
    enough = fresh.sum() >= ENOUGH_CLIPS
    per_tag = scores.roc_auc(evaluation.labels[rows][fresh], probabilities[fresh]) if enough else np.nan
    shares = {f"share_of_{kind}": float(clips.mean()) for kind, clips in shared.items()}
    return {**shares, "clips_of_other_tracks": int(fresh.sum()), "roc_auc_of_other_tracks": scores.macro(per_tag)}


def write_results(evaluation, results, predicted):
    """Write the scores, the predictions and the pictures."""
    folder, dump, tag_names = evaluation.output, evaluation.dump, evaluation.checkpoint["tag_names"]
    write_json(folder / "results.json", results)
    rows = [{"part": part, **row} for part in EVALUATED for row in results[part]["tags"]]
    write_table(folder / "per_tag.csv", [rows[0], *(row.values() for row in rows)])
    clips = {part: [(dump.ids[row], dump.mp3_paths[row]) for row in evaluation.rows[part]] for part in EVALUATED}
    for part, probabilities in predicted.items():
        rows = [(*clip, *(f"{value:.9g}" for value in values)) for clip, values in zip(clips[part], probabilities)]
        write_table(folder / f"predictions_{part}.csv", [("clip_id", "mp3_path", *tag_names), *rows])
    test = tag_names, evaluation.labels[evaluation.rows["test"]], predicted["test"]
    write_table(folder / "worth_a_listen.csv", worth_a_listen(clips["test"], *test))
    with optional_picture(folder):
        from lib import figures  # matplotlib takes a while to import

        figures.per_tag_roc_auc(folder / "per_tag.png", results["test"]["tags"], synthetic=dump.synthetic)
        figures.tag_correlations(folder / "correlations.png", *test, synthetic=dump.synthetic)


def worth_a_listen(clips, tag_names, labels, probabilities):
    """Yield a table of the clips on which annotators and network disagree most, per tag and direction."""
    yield "tag", "annotators", "network", "clip_id", "mp3_path"
    for name, label, values in zip(tag_names, labels.T, probabilities.T):
        for annotated in (0, 1):
            candidates = np.flatnonzero(label == annotated)
            most = np.argsort(-np.abs(values[candidates] - annotated), kind="stable")[:WORTH_A_LISTEN]
            for clip in candidates[most]:
                yield name, annotated, f"{values[clip]:.4f}", *clips[clip]


def write_json(path, results):
    """Write `results` with null in place of NaN, which JSON does not have."""
    with whole_file(path, "w", encoding="utf-8") as file:
        json.dump(json.loads(json.dumps(results), parse_constant={"NaN": None}.__getitem__), file, indent=1)


def print_results(results, checkpoint):
    print(f"{'test clips':<22}{'positives':>16}  {'ROC-AUC':<22}{'average precision':<22}")
    for row in sorted(results["test"]["tags"], key=lambda row: -np.nan_to_num(row["roc_auc"], nan=-1)):
        share = f"{row['positives']:,} ({row['prevalence']:.1%})"
        print(f"{row['tag']:<22}{share:>16}  {bracketed(row, 'roc_auc'):<22}{bracketed(row, 'average_precision'):<22}")
    for part in EVALUATED:
        print_part(part, results[part])
    print(f"\nbrackets: {results['intervals']}")
    print(scores.compare_with_paper(checkpoint))
    if results["other_data"]:
        print(f"note: {results['data']} is not the checkpoint's dump (--other-data)")


def bracketed(row, score):
    if np.isnan(row[score]):
        return "one class only"
    return f"{row[score]:.3f} [{row[f'{score}_low']:.3f}, {row[f'{score}_high']:.3f}]"


def format_interval(score):
    return f"{format_score(score['value'])} [{format_score(score['low'])}, {format_score(score['high'])}]"


def print_part(part, result):
    precision = ", ".join(f"{format_score(value)} at {k}" for k, value in result["precision_at"].items())
    print(f"\n{part}, {result['clips']:,} clips")
    print(f"  ROC-AUC            {format_interval(result['roc_auc'])}  macro over tags")
    print(f"  average precision  {format_interval(result['average_precision'])}  macro over tags")
    print(f"  within a clip      ROC-AUC {format_score(result['clip_roc_auc'])}; precision {precision}")
    if result["one_class"]:
        print(f"  left out           {', '.join(result['one_class'])}: only one class among these clips")
    if leakage := result["leakage"]:
        shares = ", ".join(f"{kind} {leakage[f'share_of_{kind}']:.1%}" for kind in ("track", "album", "artist"))
        auc = format_score(leakage["roc_auc_of_other_tracks"])
        print(f"  also in training   {shares} of the clips")
        print(f"  other tracks only  ROC-AUC {auc} ({leakage['clips_of_other_tracks']:,} clips)")
    if baseline := result["baseline"]:
        roc_auc, precision = format_interval(baseline["roc_auc"]), format_interval(baseline["average_precision"])
        gain = baseline["network_minus_baseline"]["roc_auc"]
        undecided = gain["low"] <= 0  # False where the scores are undefined
        verdict = ": not clearly better than a logistic regression on mel bands' loudness" if undecided else ""
        print(f"  baseline           ROC-AUC {roc_auc}, average precision {precision}")
        print(f"  network - baseline ROC-AUC {format_interval(gain)}{verdict}")


def compare(ours, theirs):
    """Print, write and draw how Evaluation `ours` differs from `theirs`, that of --against, on the test clips of both.

    Raises InputError if one checkpoint has seen test clips of the other, if they share none, or if their tags differ.
    """
    name, against = str(ours.settings.checkpoint or ours.settings.name), ours.settings.against
    one, other, rows = ours.checkpoint, theirs.checkpoint, np.intersect1d(ours.rows["test"], theirs.rows["test"])
    if n_seen := n_test_clips_seen(one, other) + n_test_clips_seen(other, one):
        seen = f"{n_seen:,} test clips of one were used to train or select the other"
        raise InputError(f"{name}, {against}: {seen}; use one split for both")
    if not len(rows) or one["tag_names"] != other["tag_names"] or np.any(ours.labels != theirs.labels):
        raise InputError(f"{name}, {against}: have no test clips in common, or different tags")
    ours.dump.verify(rows)
    difference = ours.scores(rows, ours.predict(rows)).minus(theirs.scores(rows, theirs.predict(rows)))
    result = {
        "name": name,
        "against": against,
        "clips": len(rows),
        "intervals": ours.intervals,
        **difference.macro(),
        "tags": per_tag_rows(one["tag_names"], ours.labels[rows], difference),
    }
    print_comparison(result)
    write_json(ours.output / "comparison.json", result)
    with optional_picture(picture := ours.output / "comparison.png"):
        from lib.figures import tag_differences  # matplotlib takes a while to import

        tag_differences(picture, result["tags"], f"{name} - {against}", synthetic=ours.dump.synthetic)


def print_comparison(result):
    name, against = result["name"], result["against"]
    print(f"{name} - {against}, {result['clips']:,} test clips of both")
    print(f"  ROC-AUC            {format_interval(result['roc_auc'])}  macro over {len(result['tags'])} tags")
    print(f"  average precision  {format_interval(result['average_precision'])}")
    for row in sorted(result["tags"], key=lambda row: -np.nan_to_num(row["roc_auc"])):
        if row["roc_auc_low"] > 0 or row["roc_auc_high"] < 0:
            print(f"  {row['tag']:<22} {bracketed(row, 'roc_auc')}  ROC-AUC, differs clearly")
    print(f"brackets: {result['intervals']}, the same for both")
    better = name if result["roc_auc"]["low"] > 0 else against if result["roc_auc"]["high"] < 0 else None
    print(f"{better} is better" if better else f"these clips cannot tell which of {name} and {against} is better")


if __name__ == "__main__":
    run(main, "the same command starts over")
