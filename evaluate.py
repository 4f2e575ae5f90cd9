"""Score a trained checkpoint on its validation and test clips, or tag your own music with it.

Writes results.json, tables, pictures and report.html, a page to listen to, beside the checkpoint, or into --output; for
several names, means over seeds too. With --against, compares two experiments instead. With --tag, prints the tags of
audio files instead.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lib.common import ROOT, Count, FromPython, InputError, Seed, number, optional_picture, require_writable, run
from lib.common import write_json, write_table

import numpy as np
import torch
import tyro

from lib import scores
from lib.baseline import band_features, baseline_predictions, names_only_predictions, origins_of, repeatability
from lib.checkpoint import SEEN, cautions, clips_seen, count_seen, load_checkpoint, load_network, note_on_seen
from lib.dump import Dump, same_clips
from lib.experiment import data_folder, require_other_seeds
from lib.library import ELSEWHERE, tag_files
from lib.loader import Loader, hidden_values, predict
from lib.page import write_report
from lib.parallel import choose_device, started_with_others
from lib.published import published
from lib.scores import format_score
from lib.tagger import Tagger  # noqa: F401 - re-exported
from tags import clip_info_of, select_tags


@dataclass(frozen=True)
class Settings(FromPython):
    # what to evaluate
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: tuple[str, ...] = ("paper",)  # experiment whose best.pt is evaluated; or several that differ in their seeds
    checkpoint: Path | None = None  # another checkpoint, instead of the experiment's best.pt
    output: Path | None = None  # folder for tables and pictures, instead of the checkpoint's
    data: Path | None = None  # folder with the dump; default: the one that the checkpoint was trained on
    other_data: bool = False  # score the dump even if the checkpoint was trained on another
    against: str = ""  # another experiment, to compare with instead of scoring
    baseline: bool = True  # also score a baseline, a logistic regression on mel-band loudness
    probe: Path | None = None  # also score one on the features of this checkpoint, which may have other tags

    # scores
    resamples: number(int, 1, 10_000) = 1000  # of the bootstrap behind the 95% intervals
    seed: Seed = 1337  # of the bootstrap
    batch_size: number(int, 1, 10_000) = 32  # clips per forward pass
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["checkpoint", "float32", "bfloat16", "float64"] = "checkpoint"  # the one it was trained in

    # your own music
    tag: tuple[Path, ...] | None = None  # audio files, folders and playlists to tag, instead of scoring
    top: Count = 5  # how many tags to print for each file; * marks those that reach their thresholds
    json: bool = False  # print one JSON object, file -> tag -> score
    taggram: bool = False  # draw each file's spectrogram and its tags over time
    page: bool = False  # the same as a page for a browser, which plays the music
    csv: Path | None = None  # write a table instead, one row per file as it is tagged; resumes


EVALUATED = ("validation", "test")  # parts of the split
ENOUGH_CLIPS = 30  # to score those that share no track, album or artist with training
RIVALS = dict(baseline="a logistic regression on mel bands' loudness", names_only="the labels of artist and album")
RIVALS["probe"] = "a logistic regression on the features of --probe"
APART = {  # options that do not go together
    "tag": "against batch_size data other_data probe resamples seed",
    "csv": "json output page taggram top",
    "against": "probe",
}
WORTH_A_LISTEN = 10  # clips per tag in each direction


def main(settings=None):
    if not settings and sys.argv[1:] and not sys.argv[1].startswith("-"):
        raise InputError(f"{sys.argv[1]}: to tag music, put --tag before it")
    settings = settings or tyro.cli(Settings, description=__doc__)
    require_together(settings)
    if started_with_others():
        raise InputError("evaluate.py: runs in one process; start it with python instead of torchrun")
    paths = [settings.checkpoint or settings.experiments / name / "best.pt" for name in settings.name]
    if len(paths) != 1 and (not paths or settings.tag or settings.checkpoint or settings.against):
        raise InputError("--name: takes one experiment, or several only to score them")
    if settings.tag:
        return tag_files(settings, paths[0])
    settings = replace(settings, data=settings.data or data_folder(load_checkpoint(paths[0])["hyperparameters"]))
    require_other_seeds([path.parent for path in paths] if len(paths) > 1 else [])
    ours, *others = evaluations = [Evaluation(settings, path) for path in paths]
    for each in evaluations:
        require_writable(each.output, ELSEWHERE)
    print(end=ours.dump.note_on_table())
    if settings.against:
        return compare(ours, Evaluation(settings, settings.experiments / settings.against / "best.pt"))
    source = load_checkpoint(settings.probe) if settings.probe else None
    bands, train = band_features(*ours.dump.verify()), ours.rows["train"]  # the same whatever the seed
    baseline = baseline_predictions(bands, ours.labels, train) if settings.baseline else None
    names_only = names_only_predictions(ours.labels, train, ours.origins) if ours.origins else None
    probe = probe_predictions(ours, source) if source else None
    results = [evaluate(each, (baseline, names_only, probe)) for each in evaluations]
    if others:
        write_table((settings.output or ours.output) / "seeds.csv", print_over_seeds(dict(zip(settings.name, results))))


def require_together(settings):
    """Raise InputError for options that do not go together."""
    given = {name for name, default in vars(Settings()).items() if getattr(settings, name) != default}
    for one in given & {*APART}:
        if others := given & {*APART[one].split()}:
            raise InputError(f"--{one}: leave out --{' and --'.join(sorted(others)).replace('_', '-')}")
    if settings.tag == () or given & {"top", "json", "taggram", "page", "csv"} and not settings.tag:
        raise InputError("--tag: needs audio files, folders or playlists after it")


def evaluate(ours, rivals):
    """Print, write and return the scores of an Evaluation and, of all clips, of the predictions of RIVALS."""
    predicted = {part: ours.predict(ours.rows[part]) for part in EVALUATED}
    results = {"checkpoint": str(ours.path), "made_with": ours.checkpoint["made_with"], "intervals": ours.intervals}
    results |= {"data": str(ours.dump.data), "synthetic": ours.dump.synthetic}
    results["other_data"] = ours.checkpoint["dump"] != ours.dump.fingerprint
    results |= {part: score_part(ours, ours.rows[part], predicted[part], rivals) for part in EVALUATED}
    lines = {part: summary(results[part]) for part in EVALUATED}
    other = f"note: {ours.dump.data} is not the checkpoint's dump (--other-data): nothing published to compare with"
    remarks = [*cautions(ours.checkpoint), other if results["other_data"] else published(ours.checkpoint)]
    print_results(results, lines, remarks)  # before writing: a full disk must not lose them
    write_results(ours, results, predicted, lines=lines, remarks=remarks)
    return results


class Evaluation:
    """A checkpoint and the dump to score it on; `rows` are the dump's rows of each part of the checkpoint's split.

    `labels` (clips, tags) are those of the checkpoint's tags, `groups` (clips,) the units that the bootstrap
    draws, `info` each clip's tags.ClipInfo, `origins` and `repeatability` lib.baseline's; without a clip table, these
    three are None. Raises InputError for other data.
    """

    def __init__(self, settings, path):
        self.settings, self.device = settings, choose_device(settings.device)
        folder = settings.output and settings.output / (path.parent.name if len(settings.name) > 1 else "")
        self.path, self.output = path, folder or path.parent
        self.checkpoint, self.dump = load_checkpoint(path), Dump(settings.data)
        self.labels, self.rows = clips_of(self.checkpoint, self.dump, settings.other_data)
        has_info = (settings.data / "clip_info_final.csv").exists()
        self.info = clip_info_of(settings.data, self.dump.ids) if has_info else None
        self.origins = origins_of(self.info) if has_info else None
        self.groups = self.origins["track"] if has_info else self.dump.ids
        self.repeatability = repeatability(self.labels, self.groups) if has_info else None
        self.intervals = f"95%, {settings.resamples:,} resamples over {'tracks' if has_info else 'clips'}"

    def predict(self, rows):
        """Return the scores of the checkpoint's tags for the dump's `rows`: (rows, tags)."""
        return predict(*self.network(self.checkpoint), rows, self.settings.batch_size)

    def network(self, checkpoint):
        """Return (the network of this or another checkpoint, a Loader of the dump for it)."""
        net, precision = load_network(checkpoint, self.device, self.settings.precision)
        return net, Loader(self.dump, self.labels, checkpoint["normalization"], self.device, precision)

    def scores(self, rows, predictions):
        """Return the lib.scores.Scores of predictions for the dump's `rows`."""
        resampling = self.groups[rows], self.settings.resamples, self.settings.seed
        return scores.scores_of(self.labels[rows], predictions, *resampling)


def clips_of(checkpoint, dump, other_data):
    """Return (labels, rows): the dump's labels for the checkpoint's tags, and its rows of each part of the split.

    Raises InputError if the dump lacks one of the clips or tags or, unless `other_data`, if it is not the checkpoint's.
    """
    merge = checkpoint["hyperparameters"].get("merge_tags", True)
    labels, names = select_tags(dump.labels, dump.tag_names, len(dump.tag_names), merge)
    if missing := [name for name in checkpoint["tag_names"] if name not in names]:
        raise InputError(f"{dump.data}: has no tag {', '.join(missing)}; point --data at the checkpoint's data")
    rows = {}
    for part, ids in checkpoint["clip_ids"].items():
        rows[part] = np.flatnonzero(np.isin(dump.ids, ids.numpy()))
        if n_absent := len(ids) - len(rows[part]):
            raise InputError(f"{dump.data}: lacks {n_absent:,} of the checkpoint's {part} clips")
    if checkpoint["dump"] != dump.fingerprint and not other_data:
        raise InputError(f"{dump.data}: not the dump that the checkpoint was trained on; --other-data scores it anyway")
    return labels[:, [names.index(name) for name in checkpoint["tag_names"]]], rows


def probe_predictions(ours, source):
    """Return what the baseline's regressions predict from the features of the checkpoint `source`: (clips, tags)."""
    print(end=note_on_seen(ours.checkpoint, source))
    net, loader = ours.network(source)
    rows, batch_size = np.arange(len(ours.dump)), ours.settings.batch_size
    features = hidden_values(net, lambda: predict(net, loader, rows, batch_size))
    return baseline_predictions(features, ours.labels, ours.rows["train"])


def score_part(evaluation, rows, predictions, rivals):
    """Return the scores of predictions for the dump's `rows`, as in results.json; RIVALS have theirs for all rows."""
    labels, tag_names = evaluation.labels[rows], evaluation.checkpoint["tag_names"]
    ours, ids = evaluation.scores(rows, predictions), torch.from_numpy(evaluation.dump.ids[rows])
    thresholds = evaluation.checkpoint["thresholds"].numpy()
    at_thresholds = {name: score(labels, predictions >= thresholds) for name, score in scores.OF_GIVEN_TAGS.items()}
    theirs = {name: evaluation.scores(rows, found[rows]) for name, found in zip(RIVALS, rivals) if found is not None}
    of_rivals = {f"roc_auc_of_{name}": rival.per_tag[0] for name, rival in theirs.items()}
    result = {
        "clips": len(rows),
        **count_seen(ids, evaluation.checkpoint["seen_before"], [evaluation.checkpoint["dump"]]),
        **ours.macro(),
        "clip_roc_auc": scores.macro(scores.roc_auc(labels.T, predictions.T)),
        "precision_at": {k: scores.macro(scores.precision_at(k, labels, predictions)) for k in (1, 3, 5)},
        "one_class": [name for name, score in zip(tag_names, ours.per_tag[0]) if np.isnan(score)],
        "at_thresholds": {name: scores.macro(of_tags) for name, of_tags in at_thresholds.items()},
        "tags": per_tag_rows(evaluation, rows, ours, threshold=thresholds, **at_thresholds, **of_rivals),
        "leakage": leakage(evaluation, rows, predictions) if evaluation.origins else None,
    }
    for name in RIVALS:
        rival = theirs.get(name)
        result[name] = rival and {**rival.macro(), f"network_minus_{name}": ours.minus(rival).macro()}
    return result


def per_tag_rows(evaluation, rows, found, **more):
    """Return a row of `found`, the scores on the dump's `rows`, and `more`, for each tag in the checkpoint's order."""
    labels, columns = evaluation.labels[rows], {"tag": evaluation.checkpoint["tag_names"]}
    columns |= {"positives": labels.sum(axis=0, dtype=int), "prevalence": labels.mean(axis=0)}
    if evaluation.origins:
        columns["repeatability"] = evaluation.repeatability
    for name, values, low, high in found.intervals():
        columns |= {name: values, f"{name}_low": low, f"{name}_high": high}
    columns |= more
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()))
    return [dict(zip(columns, row)) for row in rows]


def leakage(evaluation, rows, predictions):
    """Return the shares of `rows` whose track, album or artist was trained on, and the scores on the other clips."""
    found, checkpoint = {}, evaluation.checkpoint
    earlier = [ids["train"] for dump, ids in checkpoint["seen_before"] if same_clips(dump, [checkpoint["dump"]])]
    heard = np.isin(evaluation.dump.ids, torch.cat([checkpoint["clip_ids"]["train"], *earlier]).numpy())
    for kind, origins in evaluation.origins.items():
        fresh = ~np.isin(origins[rows], origins[heard])
        enough = fresh.sum() >= ENOUGH_CLIPS
        per_tag = scores.roc_auc(evaluation.labels[rows][fresh], predictions[fresh]) if enough else np.nan
        found |= {f"share_of_{kind}": float(np.mean(~fresh)), f"clips_of_other_{kind}s": int(fresh.sum())}
        found[f"roc_auc_of_other_{kind}s"] = scores.macro(per_tag)
    return found


def write_results(evaluation, results, predicted, **printed):
    """Write the scores, the predictions, the pictures, and a report, which repeats what is `printed`."""
    folder, dump, tag_names = evaluation.output, evaluation.dump, evaluation.checkpoint["tag_names"]
    write_json(folder / "results.json", results)
    rows = [{"part": part, **row} for part in EVALUATED for row in results[part]["tags"]]
    write_table(folder / "per_tag.csv", [rows[0], *(row.values() for row in rows)])
    clips = {part: [(dump.ids[row], dump.mp3_paths[row]) for row in evaluation.rows[part]] for part in EVALUATED}
    for part, predictions in predicted.items():
        for name, columns in (("predictions", predictions), ("labels", evaluation.labels[evaluation.rows[part]])):
            rows = [(*clip, *(f"{value:.9g}" for value in values)) for clip, values in zip(clips[part], columns)]
            write_table(folder / f"{name}_{part}.csv", [("clip_id", "mp3_path", *tag_names), *rows])
    labels, predictions = evaluation.labels[evaluation.rows["test"]], predicted["test"]
    listed = [*worth_a_listen(labels, predictions, evaluation.checkpoint["thresholds"].numpy())]
    rows = [(tag_names[tag], said, f"{predictions[clip, tag]:.4f}", *clips["test"][clip]) for tag, said, clip in listed]
    write_table(folder / "worth_a_listen.csv", [("tag", "annotators", "network", "clip_id", "mp3_path"), *rows])
    correlations = [scores.correlations(columns) for columns in (labels, predictions)]
    pictures = [*evaluation.path.parent.glob("curves.png")]
    with optional_picture(folder):
        from lib import figures  # matplotlib takes a while to import

        figures.per_tag_roc_auc(folder / "per_tag.png", results["test"]["tags"], synthetic=dump.synthetic)
        figures.tag_correlations(folder / "correlations.png", tag_names, *correlations, synthetic=dump.synthetic)
        pictures += [folder / "per_tag.png", folder / "correlations.png"]  # unless drawn, they are of other scores
    shown = dict(results=results, pictures=pictures, **printed)
    write_report(report := folder / "report.html", evaluation, predictions, listed, correlations, **shown)
    print(f"report: {report}", file=sys.stderr)


def worth_a_listen(labels, predictions, thresholds):
    """Yield (tag, label, clip), all of them numbers, of the clips on which annotators and network disagree most.

    They are at most WORTH_A_LISTEN for each tag and label, and in the rows of `labels` and `predictions` (clips, tags).
    """
    for tag, (label, values) in enumerate(zip(labels.T, predictions.T)):
        for annotated in (0, 1):
            candidates = np.flatnonzero((label == annotated) & ((values >= thresholds[tag]) != annotated))
            most = np.argsort(-np.abs(values[candidates] - annotated), kind="stable")[:WORTH_A_LISTEN]
            yield from ((tag, annotated, clip) for clip in candidates[most])


def print_results(results, lines, remarks):
    columns = f"{'test clips':<22}{'positives':>16}  {'ROC-AUC':<22}{'average precision':<22}"
    print(f"{results['checkpoint']}\n{columns}threshold precision    recall")
    for row in sorted(results["test"]["tags"], key=lambda row: -np.nan_to_num(row["roc_auc"], nan=-1)):
        share = f"{row['positives']:,} ({row['prevalence']:.1%})"
        both = f"{bracketed(row, 'roc_auc'):<22}{bracketed(row, 'average_precision'):<22}"
        at_threshold = [row["threshold"], row["precision"], row["recall"]]
        cells = " ".join(f"{'-' if np.isnan(x) else f'{x:.3f}':>9}" for x in at_threshold)
        print(f"{row['tag']:<22}{share:>16}  {both}{cells}")
    for part in EVALUATED:
        print(f"\n{part}, {results[part]['clips']:,} clips")
        print("\n".join(f"  {what:<18} {said}" for what, said in lines[part].items()))
    print(f"\nbrackets: {results['intervals']}", *(f"made with {line}" for line in results["made_with"]), sep="\n")
    print(*remarks, sep="\n")


def bracketed(row, score):
    if np.isnan(row[score]):
        return "one class only"
    return f"{row[score]:.3f} [{row[f'{score}_low']:.3f}, {row[f'{score}_high']:.3f}]"


def format_interval(score):
    return f"{format_score(score['value'])} [{format_score(score['low'])}, {format_score(score['high'])}]"


def summary(result):
    """Return {what: said} of a part's scores, as printed and in the report."""
    precision = ", ".join(f"{format_score(value)} at {k}" for k, value in result["precision_at"].items())
    both = ", ".join(f"{name} {format_score(score)}" for name, score in result["at_thresholds"].items())
    lines = {
        "ROC-AUC": f"{format_interval(result['roc_auc'])}  macro over tags",
        "average precision": f"{format_interval(result['average_precision'])}  macro over tags",
        "within a clip": f"ROC-AUC {format_score(result['clip_roc_auc'])}; precision {precision}",
        "at the thresholds": f"{both}  macro over tags",
    }
    if result["seen_before"] or result["seen_before_by_id"]:
        lines["seen before"] = f"by what it was fine-tuned from: {SEEN.format_map(result)}"
    if result["one_class"]:
        lines["left out"] = f"{', '.join(result['one_class'])}: only one class among these clips"
    if leakage := result["leakage"]:
        shares = ", ".join(f"{kind} {leakage[f'share_of_{kind}']:.1%}" for kind in ("track", "album", "artist"))
        lines["also in training"] = f"{shares} of the clips"
        for kind in ("tracks", "artists"):
            auc, n_clips = format_score(leakage[f"roc_auc_of_other_{kind}"]), leakage[f"clips_of_other_{kind}"]
            few = f", fewer than {ENOUGH_CLIPS}" if n_clips < ENOUGH_CLIPS else ""
            lines[f"other {kind} only"] = f"ROC-AUC {auc} ({n_clips:,} clips{few})"
    for name, what in RIVALS.items():
        if rival := result[name]:
            gain = rival[f"network_minus_{name}"]["roc_auc"]
            verdict = "clearly worse" if gain["high"] < 0 else "not clearly better" if gain["low"] <= 0 else ""
            verdict = verdict and f": {verdict} than {what}"  # of NaN, none
            roc_auc, precision = format_interval(rival["roc_auc"]), format_interval(rival["average_precision"])
            lines[name.replace("_", " ")] = f"ROC-AUC {roc_auc}, average precision {precision}"
            lines[f"network - {name.split('_')[0]}"] = f"ROC-AUC {format_interval(gain)}{verdict}"
    return lines


def print_over_seeds(results):
    """Print, and return as a table, mean and standard deviation of every score of {experiment: results}."""
    found = [scores.all_scores({part: each[part] for part in EVALUATED}) for each in results.values()]
    table = [("score", "mean", "standard_deviation", *results)]
    print(f"\nmean and standard deviation over {len(results)} seeds: {', '.join(results)}")
    for score in sorted(found[0], key=lambda name: " tags " not in name):
        values = [each[score] for each in found]
        table.append((score, np.mean(values), np.std(values, ddof=1), *values))
        print(f"  {score:<66}{format_score(table[-1][1])} ± {format_score(table[-1][2])}")
    return table


def compare(ours, theirs):
    """Print, write and draw how Evaluation `ours` differs from `theirs`, that of --against, on the test clips of both.

    Raises InputError if one of both has seen test clips before, if they share none, or if their tags differ.
    """
    name, against = str(ours.settings.checkpoint or ours.settings.name[0]), ours.settings.against
    one, other, rows = ours.checkpoint, theirs.checkpoint, np.intersect1d(ours.rows["test"], theirs.rows["test"])
    notes, dumps = [], {one["dump"], other["dump"]}
    ids = torch.cat([one["clip_ids"]["test"], other["clip_ids"]["test"]]).unique()
    n_seen, n_perhaps = count_seen(ids, clips_seen(one) + clips_seen(other), dumps).values()
    if n_seen:
        seen = f"{n_seen:,} clips of the two test sets were trained or chosen on, by one or by what it started from"
        raise InputError(f"{name}, {against}: {seen}; give all the same --split-seed")
    if n_perhaps:
        notes.append(f"{n_perhaps:,} test clips have ids that one network saw in other data, of maybe other clips")
    if dumps != {ours.dump.fingerprint}:
        notes.append(f"{ours.dump.data} is not the dump of both checkpoints (--other-data)")
    if not len(rows) or one["tag_names"] != other["tag_names"] or np.any(ours.labels != theirs.labels):
        raise InputError(f"{name}, {against}: have no test clips in common, or different tags")
    ours.dump.verify(rows)
    difference = ours.scores(rows, ours.predict(rows)).minus(theirs.scores(rows, theirs.predict(rows)))
    result = {"name": name, "against": against, "clips": len(rows), "intervals": ours.intervals, "notes": notes}
    clear = scores.differs_clearly(ours.labels[rows], ours.groups[rows], difference)
    result |= {**difference.macro(), "tags": per_tag_rows(ours, rows, difference, differs_clearly=clear)}
    print_comparison(result)
    write_json(ours.output / "comparison.json", result)
    with optional_picture(picture := ours.output / "comparison.png"):
        from lib.figures import tag_differences  # matplotlib takes a while to import

        tag_differences(picture, result["tags"], f"{name} - {against}", synthetic=ours.dump.synthetic)


def print_comparison(result):
    name, against, of_many = result["name"], result["against"], f", allowing for {len(result['tags'])} tags"
    print(f"{name} - {against}, {result['clips']:,} test clips of both")
    print(f"  ROC-AUC            {format_interval(result['roc_auc'])}  macro over {len(result['tags'])} tags")
    print(f"  average precision  {format_interval(result['average_precision'])}")
    for row in sorted(result["tags"], key=lambda row: -np.nan_to_num(row["roc_auc"])):
        if row["differs_clearly"]:
            print(f"  {row['tag']:<22} {bracketed(row, 'roc_auc')}  ROC-AUC, differs clearly{of_many}")
    print(f"brackets: {result['intervals']}, the same for both; about other clips, not about training with other seeds")
    print(end="".join(f"note: {note}\n" for note in result["notes"]))
    better = name if result["roc_auc"]["low"] > 0 else against if result["roc_auc"]["high"] < 0 else None
    print(f"{better} is better" if better else f"these clips cannot tell which of {name} and {against} is better")


if __name__ == "__main__":
    run(main, "the same command starts over, but with --csv goes on")
