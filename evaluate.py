"""Score a trained checkpoint on its validation and test clips, or tag your own music with it.

Writes results.json, per_tag.csv and pictures beside the checkpoint. With --tag, prints the most likely tags of each
audio file instead. From Python: Tagger("experiments/paper/best.pt")("song.mp3") gives {tag: probability}.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import scores
from common import ROOT, InputError, run, settings_from_command_line, whole_file
from dump import Dump, Feeder
from model import choose_device
from scores import shown
from tagger import Tagger, load_checkpoint, network_of, predict, taggram
from tags import clip_info_of, select_tags


@dataclass(frozen=True)
class Settings:
    # what to evaluate
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # the experiment whose best.pt is evaluated
    checkpoint: Path | None = None  # another checkpoint, instead of the experiment's best.pt
    data: Path = ROOT / "data"  # folder with the dump

    # scores
    resamples: int = 1000  # of the bootstrap behind the 95% intervals
    seed: int = 1337  # of the bootstrap
    batch_size: int = 32  # clips at a time
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name

    # your own music
    tag: tuple[Path, ...] = ()  # audio files and folders of them to tag, instead of scoring
    top: int = 5  # how many tags to print for each file
    json: bool = False  # print one JSON object, file -> tag -> probability
    taggram: bool = False  # draw each file's spectrogram and tags over time, beside the checkpoint


ENOUGH_CLIPS = 30  # to score those that share no track with training


def main():
    settings = settings_from_command_line(Settings, __doc__)
    path = settings.checkpoint or settings.experiments / settings.name / "best.pt"
    if settings.tag:
        return tag_files(Tagger(path, settings.device), settings, path.parent)
    checkpoint = load_checkpoint(path)
    dump = Dump(settings.data)
    dump.check_spectrograms()
    labels, rows_of = clips_of(checkpoint, dump)
    probabilities = predict_parts(checkpoint, dump, rows_of, settings)
    info = clip_info_if_present(settings.data, dump.ids)
    results = {
        "checkpoint": str(path),
        "data": str(settings.data),
        "synthetic": dump.synthetic,
        "paper_roc_auc": scores.PAPER if scores.is_papers_experiment(checkpoint) else None,
        "intervals": f"95%, {settings.resamples:,} resamples over {'tracks' if info else 'clips'}",
    }
    for part in ("validation", "test"):
        rows = rows_of[part]
        results[part] = score_part(
            labels[rows], probabilities[part], checkpoint["tag_names"], settings, info, rows, rows_of["train"]
        )
    write_results(results, path.parent)
    draw(results, checkpoint["tag_names"], labels[rows_of["test"]], probabilities["test"], path.parent)
    print_results(results, checkpoint)


# Scores


def clips_of(checkpoint, dump):
    """Return (labels, rows): the dump's labels for the checkpoint's tags, and its rows of each part of the split.

    Raises InputError if the dump lacks one of the clips or tags, or was made with another front end.
    """
    if checkpoint["front_end"] != dump.front_end:
        raise InputError(f"{dump.data}: spectrograms of another front end than the checkpoint's; make them anew")
    rule = checkpoint["hyperparameters"]
    labels, names = select_tags(dump.labels, dump.tag_names, len(dump.tag_names), rule["merge_tags"])
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
    return labels[:, [names.index(name) for name in checkpoint["tag_names"]]], rows


def predict_parts(checkpoint, dump, rows_of, settings):
    """Return the probabilities of the validation and the test clips, by part."""
    device = choose_device(settings.device)
    normalization = (checkpoint["normalization"]["mean"].numpy(), checkpoint["normalization"]["std"].numpy())
    net = network_of(checkpoint, device)
    feeder = Feeder(dump, normalization, device, next(net.parameters()).dtype, n_ahead=4)
    return {part: predict(net, feeder, rows_of[part], settings.batch_size) for part in ("validation", "test")}


def clip_info_if_present(data, ids):
    """Return each clip's artist, album and track, or None where the data folder has no clip table."""
    return clip_info_of(data, ids) if (data / "clip_info_final.csv").exists() else None


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
        "clip_roc_auc": number(scores.macro(scores.clip_roc_auc(labels, probabilities))),
        "precision_at": {k: number(scores.macro(scores.precision_at(k, labels, probabilities))) for k in (1, 3, 5)},
        "one_class": [name for name, score in zip(tag_names, auc) if np.isnan(score)],
        "leakage": leakage(labels, probabilities, info, rows, training_rows) if info else None,
        "tags": per_tag_rows(tag_names, labels, auc, ap, resampled),
    }


def with_interval(value, resampled):
    low, high = scores.interval(resampled)
    return {"value": number(value), "low": number(low), "high": number(high)}


def number(value):
    """Return a float that JSON can hold: None for NaN."""
    return None if np.isnan(value) else float(value)


def per_tag_rows(tag_names, labels, auc, ap, resampled):
    """Return a row of scores for each tag, in the checkpoint's order."""
    ends = {
        "roc_auc": scores.interval(resampled.roc_auc),
        "average_precision": scores.interval(resampled.average_precision),
    }
    rows = []
    for column, name in enumerate(tag_names):
        row = {"tag": name, "positives": int(labels[:, column].sum()), "prevalence": float(labels[:, column].mean())}
        for score, values in (("roc_auc", auc), ("average_precision", ap)):
            row[score] = number(values[column])
            row[f"{score}_low"], row[f"{score}_high"] = (number(end[column]) for end in ends[score])
        rows.append(row)
    return rows


def leakage(labels, probabilities, info, rows, training_rows):
    """Return the shares of clips whose track, album and artist are in training too, and the score on the others."""
    result = {}
    for kind in ("track", "album", "artist"):
        trained_on = {getattr(info[row], kind) for row in training_rows}
        shared = np.array([getattr(info[row], kind) in trained_on for row in rows])
        result[f"share_of_{kind}"] = float(shared.mean())
        if kind == "track":
            fresh = ~shared
    result["clips_of_other_tracks"] = int(fresh.sum())
    result["roc_auc_of_other_tracks"] = None
    if fresh.sum() >= ENOUGH_CLIPS:
        result["roc_auc_of_other_tracks"] = number(scores.macro(scores.roc_auc(labels[fresh], probabilities[fresh])))
    return result


# What is written and printed


def write_results(results, folder):
    with whole_file(folder / "results.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    with whole_file(folder / "per_tag.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["part", *results["test"]["tags"][0]])
        table.writeheader()
        for part in ("validation", "test"):
            table.writerows({"part": part, **row} for row in results[part]["tags"])


def draw(results, tag_names, labels, probabilities, folder):
    """Draw the pictures of the test scores beside the checkpoint."""
    import figures  # matplotlib takes a while to import

    synthetic = results["synthetic"]
    rows = [{key: np.nan if value is None else value for key, value in row.items()} for row in results["test"]["tags"]]
    figures.per_tag_roc_auc(folder / "per_tag.png", rows, synthetic=synthetic)
    figures.tag_correlations(folder / "correlations.png", tag_names, labels, probabilities, synthetic=synthetic)


def print_results(results, checkpoint):
    print_tags(results["test"]["tags"])
    for part in ("validation", "test"):
        print_part(part, results[part])
    print(f"\nbrackets: {results['intervals']}")
    print(scores.compare_with_paper(checkpoint))


def print_tags(rows):
    """Print the test scores of every tag, the best first."""
    ranked = sorted(rows, key=lambda row: -1 if row["roc_auc"] is None else row["roc_auc"], reverse=True)
    print(f"{'test clips':<22}{'positives':>16}  {'ROC-AUC':<22}{'average precision':<22}")
    for row in ranked:
        share = f"{row['positives']:,} ({row['prevalence']:.1%})"
        print(f"{row['tag']:<22}{share:>16}  {bracketed(row, 'roc_auc'):<22}{bracketed(row, 'average_precision'):<22}")
    scored = [row["tag"] for row in ranked if row["roc_auc"] is not None]
    if len(scored) >= 10:
        print(f"best five: {', '.join(scored[:5])}; worst five: {', '.join(scored[-5:])}")


def bracketed(row, score):
    if row[score] is None:
        return "one class only"
    return f"{row[score]:.3f} [{row[f'{score}_low']:.3f}, {row[f'{score}_high']:.3f}]"


def shown_with_interval(score):
    return f"{shown(score['value'])} [{shown(score['low'])}, {shown(score['high'])}]"


def print_part(part, result):
    precision = ", ".join(f"{shown(value)} at {k}" for k, value in result["precision_at"].items())
    print(f"\n{part}, {result['clips']:,} clips")
    print(f"  ROC-AUC            {shown_with_interval(result['roc_auc'])}  macro over tags")
    print(f"  average precision  {shown_with_interval(result['average_precision'])}  macro over tags")
    print(f"  within a clip      ROC-AUC {shown(result['clip_roc_auc'])}; precision {precision}")
    if result["one_class"]:
        print(f"  left out           {', '.join(result['one_class'])}: only one class among these clips")
    if result["leakage"]:
        shares = ", ".join(
            f"{kind} {result['leakage'][f'share_of_{kind}']:.1%}" for kind in ("track", "album", "artist")
        )
        print(f"  also in training   {shares} of the clips")
        n_fresh, auc = result["leakage"]["clips_of_other_tracks"], result["leakage"]["roc_auc_of_other_tracks"]
        print(f"  other tracks only  {f'ROC-AUC {auc:.4f}' if auc else 'too few to score'} ({n_fresh:,} clips)")


# Your own music


def tag_files(tagger, settings, folder):
    """Print the most likely tags of each file; return the exit status, 1 if one could not be read."""
    found, failed = {}, False
    if tagger.synthetic and not settings.json:
        print("note: this checkpoint was trained on SYNTHETIC clips; its tags for music mean little")
    for path in audio_files(settings.tag):
        try:
            found[str(path)] = tags = dict(list(tagger(path).items())[: settings.top])
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        if not settings.json:
            print(f"{path}: {', '.join(f'{tag} {probability:.2f}' for tag, probability in tags.items())}")
        if settings.taggram:
            draw_taggram(tagger, path, settings.top, folder)
    if settings.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    return 1 if failed else 0


def audio_files(paths):
    """Yield the paths that are files, and in the folders every file whose name is that of a decodable format."""
    import soundfile

    extensions = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".opus", ".oga"}
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in extensions)
        else:
            yield path


def draw_taggram(tagger, path, n_tags, folder):
    """Draw a file's log-mel spectrogram above its most likely tags over time, beside the checkpoint."""
    import figures
    from gen_spectrograms import HOP_LENGTH, log_mel

    samples = tagger.samples(path)
    times, probabilities = taggram(tagger, samples)
    top = np.argsort(-probabilities.mean(axis=0), kind="stable")[:n_tags]
    picture = folder / f"taggram_{path.name}.png"
    figures.taggram(
        picture,
        log_mel(samples, n_frames=1 + len(samples) // HOP_LENGTH),
        [tagger.tag_names[tag] for tag in top],
        times,
        probabilities[:, top],
        title=path.name,
        synthetic=tagger.synthetic,
    )
    print(f"  {picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
