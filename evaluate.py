"""Score a trained checkpoint on its validation and test clips, or tag your own music with it.

Writes results.json, per_tag.csv and pictures beside the checkpoint. With --tag, prints the most likely tags of each
audio file instead. From Python: Tagger("experiments/paper/best.pt")("song.mp3") gives {tag: probability}.
"""

import lib  # noqa: F401 - first: Ctrl-C during the slow imports below

import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from lib import scores
from lib.audio import HOP_LENGTH, SAMPLE_RATE, log_mel, promised_seconds
from lib.checkpoint import load_checkpoint
from lib.common import ROOT, InputError, Range, reason, run, settings_from_command_line, whole_file
from lib.dump import Dump
from lib.feeder import Feeder, load_ahead, predict
from lib.parallel import autocast, choose_device
from lib.scores import format_score
from lib.tagger import Tagger, audio_files, network_in_precision, silence_decoders, taggram, windows
from tags import clip_info_of, select_tags


@dataclass(frozen=True)
class Settings:
    # what to evaluate
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # the experiment whose best.pt is evaluated
    checkpoint: Path | None = None  # another checkpoint, instead of the experiment's best.pt
    data: Path = ROOT / "data"  # folder with the dump
    other_data: bool = False  # score the dump although it is not the one that the checkpoint was trained on

    # scores
    resamples: Annotated[int, Range(1, 10_000)] = 1000  # of the bootstrap behind the 95% intervals
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1337  # of the bootstrap
    batch_size: Annotated[int, Range(1, 10_000)] = 32  # clips at a time
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["checkpoint", "float32", "bfloat16", "float64"] = "checkpoint"  # the one it was trained in

    # your own music
    tag: tuple[Path, ...] | None = None  # audio files and folders of them to tag, instead of scoring
    top: Annotated[int, Range(1)] = 5  # how many tags to print for each file
    json: bool = False  # print one JSON object, file -> tag -> probability
    taggram: bool = False  # draw each file's spectrogram and tags over time, beside the checkpoint


ENOUGH_CLIPS = 30  # to score those that share no track with training
THREADS = os.cpu_count() or 1  # decode as many files ahead of the network
INEXACT_SECONDS = 0.5  # by which an intact file may be shorter than its header promises, as some mp3 files are


def main():
    settings = settings_from_command_line(Settings, __doc__)
    path = settings.checkpoint or settings.experiments / settings.name / "best.pt"
    if settings.tag is not None:
        return tag_files(settings, path)
    device = choose_device(settings.device)
    checkpoint = load_checkpoint(path)
    dump = Dump(settings.data)
    labels, rows_of = clips_of(checkpoint, dump, settings.other_data)
    has_clip_info = (settings.data / "clip_info_final.csv").exists()
    info = clip_info_of(settings.data, dump.ids) if has_clip_info else None
    dump.band_sums()  # compares every byte with the checksums
    probabilities = predict_parts(checkpoint, dump, labels, rows_of, device, settings)
    other_data = checkpoint["dump"] != dump.fingerprint
    comparable = scores.is_papers_experiment(checkpoint) and not other_data
    results = {
        "checkpoint": str(path),
        "data": str(settings.data),
        "other_data": other_data,
        "synthetic": dump.synthetic,
        "paper_roc_auc": scores.PAPER if comparable else None,
        "intervals": f"95%, {settings.resamples:,} resamples over {'tracks' if info else 'clips'}",
    }
    for part in ("validation", "test"):
        rows = rows_of[part]
        results[part] = score_part(
            labels[rows], probabilities[part], checkpoint["tag_names"], settings, info, rows, rows_of["train"]
        )
    print_results(results, checkpoint)  # first: no full disk can lose them
    write_results(results, path.parent)
    draw_results(results, checkpoint["tag_names"], labels[rows_of["test"]], probabilities["test"], path.parent)


# Scores


def clips_of(checkpoint, dump, other_data):
    """Return (labels, rows): the dump's labels for the checkpoint's tags, and its rows of each part of the split.

    Raises InputError if the dump lacks one of the clips or tags, or was made with another front end; and, unless
    `other_data`, if it is not the one that the checkpoint was trained on.
    """
    if checkpoint["front_end"] != dump.front_end:
        raise InputError(f"{dump.data}: spectrograms of another front end than the checkpoint's; make them anew")
    merge = checkpoint["hyperparameters"].get("merge_tags", True)
    labels, names = select_tags(dump.labels, dump.tag_names, len(dump.tag_names), merge)
    missing = [name for name in checkpoint["tag_names"] if name not in names]
    if missing:
        raise InputError(f"{dump.data}: has no tag {', '.join(missing)}; point --data at the checkpoint's data")
    row_of = {int(clip): row for row, clip in enumerate(dump.ids)}
    rows = {}
    for part, ids in checkpoint["clip_ids"].items():
        absent = [clip for clip in ids.tolist() if clip not in row_of]
        if absent:
            few = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            raise InputError(f"{dump.data}: lacks {len(absent):,} of the checkpoint's {part} clips: {few}")
        rows[part] = np.array([row_of[clip] for clip in ids.tolist()])
    if checkpoint["dump"] != dump.fingerprint and not other_data:
        raise InputError(
            f"{dump.data}: not the dump that the checkpoint was trained on; point --data at that one, or score this "
            "one with --other-data"
        )
    return labels[:, [names.index(name) for name in checkpoint["tag_names"]]], rows


def predict_parts(checkpoint, dump, labels, rows_of, device, settings):
    """Return the probabilities of the validation and the test clips, by part."""
    normalization = (checkpoint["normalization"]["mean"].numpy(), checkpoint["normalization"]["std"].numpy())
    net, precision = network_in_precision(checkpoint, device, settings.precision)
    feeder = Feeder(dump, labels, normalization, device, getattr(torch, precision), resident="no")
    with autocast(device, precision):
        return {part: predict(net, feeder, rows_of[part], settings.batch_size) for part in ("validation", "test")}


def score_part(labels, probabilities, tag_names, settings, info, rows, training_rows):
    """Return all scores of one part of the split, as results.json holds them."""
    groups = np.arange(len(rows))
    if info:
        _, groups = np.unique([str(info[row].track) for row in rows], return_inverse=True)
    resampled = scores.bootstrap(labels, probabilities, groups, settings.resamples, settings.seed)
    auc, ap = scores.roc_auc(labels, probabilities), scores.average_precision(labels, probabilities)
    return {
        "clips": len(rows),
        "roc_auc": with_interval(scores.macro(auc), scores.macro(resampled.roc_auc)),
        "average_precision": with_interval(scores.macro(ap), scores.macro(resampled.average_precision)),
        "clip_roc_auc": scores.macro(scores.clip_roc_auc(labels, probabilities)),
        "precision_at": {k: scores.macro(scores.precision_at(k, labels, probabilities)) for k in (1, 3, 5)},
        "one_class": [name for name, score in zip(tag_names, auc) if np.isnan(score)],
        "leakage": leakage(labels, probabilities, info, rows, training_rows) if info else None,
        "tags": per_tag_rows(tag_names, labels, auc, ap, resampled),
    }


def with_interval(value, resampled):
    low, high = scores.interval(resampled)
    return {"value": value, "low": low, "high": high}


def per_tag_rows(tag_names, labels, auc, ap, resampled):
    """Return a row of scores for each tag, in the checkpoint's order."""
    columns = {"tag": tag_names, "positives": labels.sum(axis=0, dtype=int), "prevalence": labels.mean(axis=0)}
    for score, values in (("roc_auc", auc), ("average_precision", ap)):
        low, high = scores.interval(getattr(resampled, score))
        columns |= {score: values, f"{score}_low": low, f"{score}_high": high}
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()))
    return [dict(zip(columns, row)) for row in rows]


def leakage(labels, probabilities, info, rows, training_rows):
    """Return the shares of clips whose track, album and artist are in training too, and the score on other tracks."""
    shared = {}
    for kind in ("track", "album", "artist"):
        trained_on = {getattr(info[row], kind) for row in training_rows}
        shared[kind] = np.array([getattr(info[row], kind) in trained_on for row in rows])
    fresh = ~shared["track"]
    auc = np.nan
    if fresh.sum() >= ENOUGH_CLIPS:
        auc = scores.macro(scores.roc_auc(labels[fresh], probabilities[fresh]))
    shares = {f"share_of_{kind}": float(clips.mean()) for kind, clips in shared.items()}
    return {**shares, "clips_of_other_tracks": int(fresh.sum()), "roc_auc_of_other_tracks": auc}


# What is written and printed


def write_results(results, folder):
    results = without_nan(results)
    with whole_file(folder / "results.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1, allow_nan=False)
    with whole_file(folder / "per_tag.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["part", *results["test"]["tags"][0]])
        table.writeheader()
        for part in ("validation", "test"):
            table.writerows({"part": part, **row} for row in results[part]["tags"])


def without_nan(value):
    """Return dicts and lists of any depth with None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def draw_results(results, tag_names, labels, probabilities, folder):
    """Draw the pictures of the test scores beside the checkpoint."""
    from lib import figures  # matplotlib takes a while to import

    synthetic = results["synthetic"]
    figures.per_tag_roc_auc(folder / "per_tag.png", results["test"]["tags"], synthetic=synthetic)
    figures.tag_correlations(folder / "correlations.png", tag_names, labels, probabilities, synthetic=synthetic)


def print_results(results, checkpoint):
    print_tags(results["test"]["tags"])
    for part in ("validation", "test"):
        print_part(part, results[part])
    print(f"\nbrackets: {results['intervals']}")
    print(scores.compare_with_paper(checkpoint))
    if results["other_data"]:
        print(f"note: {results['data']} is not the dump that the checkpoint was trained on (--other-data)")


def print_tags(rows):
    """Print the test scores of every tag, the best first."""
    ranked = sorted(rows, key=lambda row: -np.nan_to_num(row["roc_auc"], nan=-1))
    print(f"{'test clips':<22}{'positives':>16}  {'ROC-AUC':<22}{'average precision':<22}")
    for row in ranked:
        share = f"{row['positives']:,} ({row['prevalence']:.1%})"
        print(f"{row['tag']:<22}{share:>16}  {bracketed(row, 'roc_auc'):<22}{bracketed(row, 'average_precision'):<22}")
    scored = [row["tag"] for row in ranked if not np.isnan(row["roc_auc"])]
    if len(scored) >= 10:
        print(f"best five: {', '.join(scored[:5])}; worst five: {', '.join(scored[-5:])}")


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
    if result["leakage"]:
        print_leakage(**result["leakage"])


def print_leakage(share_of_track, share_of_album, share_of_artist, clips_of_other_tracks, roc_auc_of_other_tracks):
    shares = f"track {share_of_track:.1%}, album {share_of_album:.1%}, artist {share_of_artist:.1%}"
    print(f"  also in training   {shares} of the clips")
    auc = roc_auc_of_other_tracks
    score = "too few to score" if np.isnan(auc) else f"ROC-AUC {format_score(auc)}"
    print(f"  other tracks only  {score} ({clips_of_other_tracks:,} clips)")


# Your own music


def tag_files(settings, checkpoint_path):
    """Print the most likely tags of each file; return the exit status, 1 if one could not be tagged or drawn."""
    if not settings.tag:
        raise InputError("--tag: needs audio files, or folders of them, after it")
    silence_decoders()
    tagger = Tagger(checkpoint_path, settings.device, settings.precision)
    if tagger.synthetic and not settings.json:
        print("note: this checkpoint was trained on SYNTHETIC clips; its tags for music mean little")
    files, problems = audio_files(settings.tag)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)

    def prepare(path):
        """Return a file's (samples, spectrograms), or the error; runs in a thread, ahead of the network."""
        try:
            samples = tagger.samples(path)
            return samples, tagger.spectrograms(windows(samples))
        except Exception as error:  # whatever one file does never costs the others
            return error

    found, pictures, n_errors = {}, {}, len(problems)
    try:
        for path, prepared in zip(files, load_ahead(prepare, files, THREADS, THREADS)):
            try:
                if isinstance(prepared, Exception):
                    raise prepared
                samples, spectrograms = prepared
                note_missing_end(path, samples)
                found[str(path)] = tags = dict(list(tagger.tags(spectrograms).items())[: settings.top])
                if not settings.json:
                    print(f"{path}: {', '.join(f'{tag} {probability:.2f}' for tag, probability in tags.items())}")
                if settings.taggram:
                    draw_taggram(tagger, samples, settings.top, path, checkpoint_path.parent, pictures)
            except BrokenPipeError:  # nobody reads the results any more
                raise
            except Exception as error:
                n_errors += 1
                print(f"error: {path}: {reason(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    finally:  # after Ctrl-C too
        if settings.json:
            print(json.dumps(found, indent=1, allow_nan=False))
    return 1 if n_errors else 0


def note_missing_end(path, samples):
    """Say so if an audio file is shorter than its header promises."""
    promised, read = promised_seconds(path), len(samples) / SAMPLE_RATE
    if read < promised - INEXACT_SECONDS:
        print(f"note: {path}: only the first {read:.1f} s of {promised:.1f} s could be read", file=sys.stderr)


def draw_taggram(tagger, samples, n_tags, path, folder, pictures):
    """Draw the log-mel spectrogram of an audio file above its most likely tags over time, into `folder`.

    The picture has the file's name; with as many of the file's folders before it, if `pictures`, name -> file, has the
    name for another file.
    """
    from lib import figures

    file = Path(os.path.abspath(path))
    for n_parts in range(1, len(file.parts)):
        picture = folder / f"taggram_{'_'.join(file.parts[-n_parts:])}.png"
        if pictures.setdefault(picture, file) == file:
            break
    times, probabilities = taggram(tagger, samples)
    top = np.argsort(-probabilities.mean(axis=0), kind="stable")[:n_tags]
    figures.taggram(
        picture,
        log_mel(samples, n_frames=1 + len(samples) // HOP_LENGTH),
        [tagger.tag_names[tag] for tag in top],
        times,
        probabilities[:, top],
        title=path.name.encode(errors="backslashreplace").decode(),  # a file's name need not be UTF-8
        synthetic=tagger.synthetic,
    )
    print(f"  {picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main, "the same command starts over")
