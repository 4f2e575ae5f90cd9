"""Break the program in one place at a time, and see whether the tests notice. Run by hand; pytest leaves it alone.

Each mutant is a text of the program, its replacement, and the tests that should fail once it is replaced. They run in a
copy of this checkout, where what they need from outside it (the real clips) is missing, as in a clean clone. Prints a
table in Markdown; the exit status is 1 if a mutant lives that is not known to be equivalent to the program.

    python tests/mutants.py                           all of them, in 15 to 30 minutes on 2 cores
    python tests/mutants.py --only model.py splits    those whose file or text contains one of these words
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import tyro
from joblib import cpu_count

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.common import InputError, number, run


@dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = ()  # words, one of which a mutant's file or text has to contain; none: all mutants
    jobs: number(int, 1, 64) = cpu_count()  # mutants tested at a time


TIMEOUT = 600  # seconds after which a mutant counts as noticed: it hangs


class Mutant(NamedTuple):
    file: str
    tests: list[str]  # files in tests/, or tests in them
    text: str  # occurs once in the file
    replacement: str
    equivalent: str = ""  # why no test can notice


def of(file, tests, *replacements):
    """Return the mutants of one file that the same tests should notice."""
    return [Mutant(file, tests.split(), *replacement) for replacement in replacements]


LOOP = "test_experiment.py::test_the_trainer_does_what_a_plain_loop_does"
NETWORK = "test_model.py::test_the_networks_own_dropout_and_batch_norm_are_the_papers"
GRAPH = "test_cuda.py::test_steps_and_predictions_are_the_cpus_and_the_host_waits_in_none"
DEFAULTS = "test_experiment.py::test_the_defaults_are_the_originals"
SPLIT = "test_splits.py::test_the_trainer_uses_the_split_that_was_asked_for"
RESUMED = "test_trainer.py::test_killed_and_resumed_is_bit_identical"
FINE_TUNING = "test_trainer.py::test_fine_tuning_begins_with_the_checkpoints_weights"
NAMES = "test_evaluate.py::test_what_names_alone_predict_stands_beside_the_networks_scores"
SEEN = "test_evaluate.py::test_what_a_checkpoint_started_from_has_seen_is_never_forgotten"
TRACKS = "test_evaluate.py::test_intervals_group_by_track_and_leakage_is_what_sets_say"
BASELINE = "test_evaluate.py::test_the_baseline_is_trained_on_the_training_clips_alone"
COMPARISON = "test_evaluate.py::test_two_experiments_are_compared_on_clips_that_both_held_out"

# fmt: off
MUTANTS = [
    # ====== the loop ======
    *of("trainer.py", LOOP,
        ('group["lr"] = learning_rate', "pass"),
        ("epoch > drop for drop", "epoch >= drop for drop"),
        ("settings.learning_rate / 10 **", "settings.learning_rate / 2 **"),
        ("settings.learning_rate, fused", "settings.learning_rate, (0.5, 0.9), fused"),
        ("settings.learning_rate, fused", "settings.learning_rate, eps=1e-6, fused"),
        ("settings.learning_rate, fused", "settings.learning_rate, weight_decay=1e-4, fused"),
        ("(n_clips * targets.shape[1])", "targets.shape[1]"),
        ("    net.zero_grad()\n", ""),
        ("    net.train()\n", ""),
        ('            rng.shuffle(parts["train"])\n', ""),
        ("    initialize(net, rng)\n", ""),
        ("torch.manual_seed(settings.seed)", "torch.manual_seed(1337)"),
        ("np.random.RandomState(settings.seed)", "np.random.RandomState(1337)"),
        ('settings.normalize_on == "train"', "False"),
        ('labels, parts["validation"], settings)', 'labels, parts["test"], settings)'),
        ('labels, parts["test"], settings)', 'labels, parts["validation"], settings)'),
        ("all(auc > past", "all(auc >= past"),
        ('net.load_state_dict(best["weights"])', "pass"),
        ("select_tags(dump.labels, dump.tag_names,", "select_tags(1 - dump.labels, dump.tag_names,")),
    *of("trainer.py", LOOP,
        ("float(np.mean(losses))", "losses[-1]")),
    *of("lib/splits.py", LOOP,
        ("for first in range(0, len(train), super_batch_size)", "for first in [0]"),
        ("range(0, len(rows), batch_size)", "range(0, len(rows) - 1, batch_size)")),
    *of("lib/loader.py", LOOP,
        ("    net.eval()\n", ""),
        ("if self.pinned else self.labels[rows]", "if self.pinned else self.labels[rows[::-1]]"),
        ("(spectrograms - self.mean) / self.std", "spectrograms - self.mean")),
    *of("trainer.py", DEFAULTS,
        ("= (20, 30, 35)", "= (20, 30)"),
        ("epochs: number(int, 0) = 40", "epochs: number(int, 0) = 50"),
        (" batch_size: Count = 32", " batch_size: Count = 64"),
        ("1e-12, 10) = 0.001", "1e-12, 10) = 0.01"),
        ('"train"] = "all"', '"train"] = "train"')),
    # ====== the network ======
    *of("model.py", NETWORK,
        ("N_FEATURES, keep_probability=0.6", "N_FEATURES, keep_probability=0.4"),
        ("features * self.mask", "features * self.draw_mask(features.numel()).view_as(features).to(features.dtype)"),
        (".double() / self.keep_probability", ".double()"),
        ("momentum=0.01", "momentum=0.99"),
        ("epsilon=1e-3", "epsilon=1e-5"),
        (".square().sum(dim=0)) / n_clips", ".square().sum(dim=0)) / (n_clips - 1)"),
        ("self.running_var.lerp_(var, self.momentum)", "pass"),
        ("self.running_mean.lerp_(mean, self.momentum)", "pass")),
    *of("model.py", "test_model.py",
        ("self.dropout(self.batch_norm(features))", "self.batch_norm(self.dropout(features))"),
        ("half = F.avg_pool2d(", "half = F.max_pool2d("),
        ("F.avg_pool2d(half, (2, 4))", "F.max_pool2d(half, (2, 4))"),
        ("ConvPool(210, 70, kernel=(3, 3))", "ConvPool(210, 70, kernel=(5, 3))"),
        ("self.branch1(spectrograms), self.branch2(half)", "self.branch2(half), self.branch1(spectrograms)"),
        ("F.relu(self.hidden(features))", "self.hidden(features)"),
        ("weights = 4 * weights", "weights = 2 * weights"),
        ("[:, :, ::-1, ::-1]", ""),
        ("np.sqrt(2 / ((n_in", "np.sqrt(1 / ((n_in"),
        ("layer.bias.zero_()", "pass"),
        ("torch.autocast(hidden.device.type, enabled=False)", "torch.autocast(hidden.device.type)"),
        ("super().__init__(*layers, nn.ReLU(inplace=True))",
         "super().__init__(layers[0], nn.ReLU(), *layers[1:])",
         "both are monotone: the ReLU may come before or after the pooling")),
    *of("model.py", "test_model.py::test_the_convolutions_that_a_gpu_computes_in_another_order",
        ("unfold(2, seen[0], 1)", "unfold(2, seen[0], 1)[:, :, :1]"),
        ("unfold(3, seen[1], columns)", "unfold(3, seen[1], columns - 1)[:, :, :, :157]"),
        ("F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))",
         "F.pad(maps, (padding[0], padding[0], padding[1], padding[1]))"),
        ("maps + convolution.bias.to(maps.dtype)[:, None, None]", "maps"),
        ("convolution.bias.to(maps.dtype)", "convolution.bias")),
    *of("model.py", NETWORK,
        ("self.mask.clone()", "self.mask")),
    *of("lib/graph.py", GRAPH,
        ("        net.draw()\n", ""),
        ("            weights.grad = gradient", "            pass"),
        ("        self.targets.copy_(targets)\n", ""),
        ("        self.spectrograms.copy_(spectrograms)\n", ""),
        ("return self.loss.clone()", "return self.loss"),
        ("if spectrograms.shape != self.spectrograms.shape", "if self.graph")),
    *of("trainer.py", "test_cuda.py::test_what_is_not_a_graph",
        (' and hasattr(net, "draw")', ""),
        ('device.type == "cuda" and world', "world")),
    *of("trainer.py", "test_parallel.py", (" and world_size() == 1 and", " and")),
    # ====== which clips ======
    *of("lib/splits.py", SPLIT,
        ('(first == "c"), np.flatnonzero(first > "c")', '(first > "c"), np.flatnonzero(first == "c")'),
        ('if settings.split == "folder"', "if False"),
        ('if settings.split == "artist"', "if False")),
    *of("lib/splits.py", "test_splits.py",
        ("    rng.shuffle(rows)\n", ""),
        ('(first < "c")\n    rng.shuffle(train)\n', '(first < "c")\n'),
        ("rows[:validation_size], rows[validation_size:test_end]",
         "rows[validation_size:test_end], rows[:validation_size]"),
        ("rng.permutation(len(names))", "range(len(names))"),
        ("| settings.untagged", "| True"),
        ("labels.any(axis=1) |", "labels.all(axis=1) |"),
        ("size=2_925_580", "size=2_925_578"),
        ("RandomState(settings.split_seed)", "RandomState(settings.seed)"),
        ("split(*given, split_rng)", "split(*given, rng)"),
        (".permutation(np.concatenate(held_out))", ".permutation(0)"),
        ("(settings.seed).permutation(np.concatenate(held_out))", "(settings.seed) and np.concatenate(held_out)"),
        ("order[np.isin(order, train)]", "train"),
        ("room[part_of[artist]] -= n_clips_of[artist]", "pass"),
        ("round(rest * validation_size / free)", "round(rest * validation_size / train_size)"),
        ("free, rest = free - papers, rest - size", "free, rest = free, rest - size"),
        ("        if size != papers:", "        if True:")),
    # ====== saving and going on ======
    *of("lib/checkpoint.py", RESUMED,
        ('optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})', "pass"),
        ('    train[:] = state["train_order"].numpy()\n', ""),
        ('torch.set_rng_state(state["torch_rng"])', "pass"),
        ("rng.set_state((", "print(("),
        ('    net.load_state_dict(last["weights"])\n', "")),
    *of("lib/checkpoint.py", "test_trainer.py::test_more_epochs_are_the_same_experiment",
        ('{**optimizer.state_dict(), "state": state["optimizer"]["state"]}',
         'state["optimizer"]',
         "the trainer sets the learning rate of every epoch, and the other settings are constants")),
    *of("lib/checkpoint.py", FINE_TUNING,
        ("    net.load_state_dict(weights, strict=same_tags)\n", "")),
    *of("trainer.py", FINE_TUNING,
        ('source["normalization"] if source', 'source["normalization"] if last')),
    *of("lib/experiment.py", "test_trainer.py",
        ('save(folder / "best.pt", {', 'save(folder / "other.pt", {')),
    *of("lib/experiment.py", "test_trainer.py",
        ("then[name] != now.get(name, then[name])]", "False]"),
        ("now.get(name, then[name])", "now.get(name)"),
        ('"overwrite", "device"}', '"overwrite", "device", "learning_rate"}'),
        ("if not ids.equal(", "if ids.equal("),
        ('("dump", "tag_names")', '("tag_names",)'),
        ('["epochs so far"] * (', '["epochs so far"] * (0 * ')),
    *of("lib/checkpoint.py", "test_trainer.py",
        (" --dirty", ""),
        (" --exclude='*'", " --tags"),
        (" --git-dir=.git", ""),
        ('last["made_with"] if last', "[] if last")),
    *of("trainer.py", "test_trainer.py::test_resuming_with_other_hyperparameters_or_data_is_refused",
        ('{"epochs", "train_size"', '{"epochs", "seed", "train_size"')),
    *of("trainer.py", "test_trainer.py::test_synonyms_are_merged_unless_told_otherwise_and_evaluated_as_trained",
        ("settings.n_tags, settings.merge_tags)", "settings.n_tags, True)")),
    *of("evaluate.py", "test_trainer.py::test_synonyms_are_merged_unless_told_otherwise_and_evaluated_as_trained",
        ('checkpoint["hyperparameters"].get("merge_tags", True)', "True")),
    # ====== spectrograms and the dump ======
    *of("lib/audio.py", "test_spectrograms.py",
        ('"hop_length": 512', '"hop_length": 511'),
        ('"floor": 1e-20', '"floor": 1e-10'),
        ('pad_mode="reflect")', 'window="hamming", pad_mode="reflect")'),
        ('pad_mode="reflect")', 'pad_mode="constant")'),
        ("spectrum.real**2 + spectrum.imag**2", "abs(spectrum)"),
        ("mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS,",
         "mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, htk=True,"),
        ("sum(samples.T) / np.float32(samples.shape[1])", "sum(samples.T)"),
        ('quality="HQ"', 'quality="LQ"'),
        ("found += bytes(max(0,", "found += bytes(min(0,")),
    *of("lib/audio.py", "test_audio.py",
        ("8 * n_bytes / bit_rate + INEXACT_SECONDS < seconds", "0 < seconds"),
        ("seconds if 8 * n_bytes", "0 if 8 * n_bytes"),
        ('"layout.name", "sample_rate"', '"sample_rate"'),
        ("rate=sample_rate)", "rate=None)"),
        ("fifo.samples >= BLOCK_SAMPLES", "fifo.samples >= 100 * BLOCK_SAMPLES"),
        ("numba.config.CACHE_DIR = tempfile", "_ = tempfile")),
    *of("lib/dump.py", "test_spectrograms.py",
        ("axis=0) / n_values - mean**2", "axis=0) / n_values"),
        ("np.where(varies, std, 1)", "std"),
        ("std > 1e-5 * np.abs(mean)", "std > 0"),
        ("divmod(row, len(self.spectrograms[0]))", "divmod(row, len(self.spectrograms[0]))[0], 0"),
        ("zlib.crc32(self.clips.read(CLIP_BYTES)) != crc", "False"),
        ("zlib.crc32(clip) == expected[row]", "True"),
        ("shutil.copyfile(self.path, self.partial)", "os.link(self.path, self.partial)"),
        ('self.manifest["annotations_sha256"])', 'annotations_sha256(self.data))'),
        ("held.enter_context(lock(", "print((")),
    *of("gen_spectrograms.py", "test_spectrograms.py",
        ('return log_mel(samples), "gaps"', 'return 2 * log_mel(samples), "gaps"'),
        ("len(samples) > CLIP_SAMPLES_READ", "len(samples) > CLIP_SAMPLES"),
        ('"n_cut": dump.manifest.get("n_cut", 0)', '"n_cut": 0'),
        ("if text == commonest", "if text != commonest"),
        ("if row[2] in OUTCOMES]", "if row[2]]"),
        ("{*chunk.resume()}", "{*chunk.resume()[1:]}"),
        ('or made[1] != "zero"', ""),
        ('in missing or made[1] != "zero"', "not in [None]"),
        ("if retry_bad else []", "if False else []"),
        ('("NFC", "NFD")', '("NFC", "NFKC")'),
        ("or dump.mp3_paths != annotations.mp3_paths", ""),
        ('or dump.manifest["annotations_sha256"] != plan["annotations_sha256"]', ""),
        ("if not failures.empty()", "if not running and not failures.empty()")),
    # ====== tags ======
    *of("tags.py", "test_tags.py",
        ("labels[:, group].max(axis=1)", "labels[:, group[-1]]"),
        ("{group[0]: [name for", "{group[-1]: [name for"),
        ("if len(names) > 1}", "if names}"),
        ("np.argsort(-labels.sum", "np.argsort(labels.sum"),
        ('kind="stable")[:n_tags]', 'kind="stable")[1 : n_tags + 1]'),
        ('"no voices", "instrumental")', '"no voices")'),
        ("track=track)", "track=track[::3])")),
    # ====== scores ======
    *of("lib/scores.py", "test_scores.py",
        ("default_rng(seed)", "default_rng(0)"),
        ("[2.5, 97.5]", "[5, 95]"),
        ("np.diff(scores[order], append=-np.inf)", "np.ones(len(order))"),
        ("np.nanmean(per_tag, axis=-1)", "np.nanmedian(per_tag, axis=-1)"),
        ("ends -= 2 * (np", "ends -= 1 * (np"),
        ('if name == "average_precision"', "if name"),
        ("np.clip(ends, self.least, 1)", "np.clip(ends, 0, 1)"),
        ("np.clip(ends, self.least, 1)", "np.clip(ends, -1, 2)"),
        ("other.resampled, least=-1)", "other.resampled)"),
        (">= 10\n", ">= 9\n"),
        ("axis=1), 95)", "axis=1), 50)"),
        ("np.max(errors / deviations, axis=1)", "np.mean(errors / deviations, axis=1)"),
        ("self.resampled - other.resampled", "self.resampled"),
        ("np.argsort(-predictions, axis=1", "np.argsort(predictions, axis=1"),
        ("np.argmax(f1[:-1])", "np.argmax(precision[:-1])"),
        ("np.argmax(f1[:-1])", "np.argmax(f1[:-1]) - 1"),
        ("of_each_tag, recall_score", "of_each_tag, precision_score"),
        ("zero_division=np.nan", "zero_division=0"),
        ("names, groups = np.unique(groups, return_inverse=True)", "names = groups = np.arange(len(groups))")),
    *of("trainer.py", "test_trainer.py::test_what_could_not_be_loaded_is_not_saved",
        ("float(learning_rate_at(epoch, settings))", "learning_rate_at(epoch, settings)")),
    *of("lib/checkpoint.py", "test_trainer.py::test_what_could_not_be_loaded_is_not_saved",
        ("        load_checkpoint(file.name)\n", "")),
    *of("lib/checkpoint.py", "test_evaluate.py::test_few_clips_and_few_steps_are_said",
        ("< 30:", "<= 30:"),
        ("elif remains > 0.05", "elif remains > 0.06"),
        ("(1 - layer.momentum) ** n_steps", "(1 - layer.momentum) ** epoch"),
        (' and not checkpoint["seen_before"]', "")),
    *of("lib/checkpoint.py", "test_trainer.py::test_the_experiment_is_changed_where_the_readme_says",
        ('net = build_network(len(checkpoint["tag_names"]), trained["network"])',
         'net = build_network(len(checkpoint["tag_names"]))')),
    *of("trainer.py", "test_trainer.py::test_the_experiment_is_changed_where_the_readme_says",
        ("build_network(len(tag_names), settings.network)", "build_network(len(tag_names))")),
    *of("lib/experiment.py", "test_trainer.py",
        ("and made and", "and False and"),
        ("in vars(settings).items() if name not in PLACE", "in vars(settings).items() if name in PLACE"),
        ("**found, data=data_folder(then))", "**found)"),
        ('and not data.is_dir() else data', "else data"),
        ('checkpoint["hyperparameters"] | sizes', 'checkpoint["hyperparameters"]'),
        (' | {"data": settings.data.resolve()}', "")),
    *of("trainer.py", "test_trainer.py",
        ("best_thresholds(labels[rows], predictions)", "best_thresholds(labels[rows], 1 - predictions)"),
        ("default=saved_settings(settings))", "default=settings)")),
    *of("lib/audio.py", "test_evaluate.py::test_what_is_not_a_checkpoint_is_one_line_and_runs_nothing",
        (" if then != now]", " if False]")),
    *of("lib/dump.py", "test_spectrograms.py",
        ("        require_front_end(", "        print(")),
    *of("lib/common.py", "test_common.py",
        ("value not in get_args(kind)", "False"),
        ('Path if "pathlib" in str(kind) else', "")),
    *of("lib/figures.py", "test_figures.py",
        ("if len({*rates}) <= 5", "if len({*rates}) <= 9"),
        ("rates[rates > 0].min()", "rates.min()")),
    *of("lib/experiment.py", "test_evaluate.py",
        ('folder / "last.pt")) for folder in folders', 'folder / "best.pt")) for folder in folders'),
        ('{"seed", "split_seed"}', '{"seed", "split_seed", "epochs"}'),
        ('if one["hyperparameters"]["seed"] ==', 'if "no seed" ==')),
    *of("lib/published.py", "test_published.py",
        ('!= 50 or', "> 50 or"),
        (' or trained.get("start_from"):', ":"),
        ('"untagged": True, **', "**"),
        ('"split", "merge_tags", "untagged")), *sizes', '"split", "merge_tags", "untagged")), *sizes[:2], 5863')),
    *of("evaluate.py", "test_evaluate.py",
        ("ddof=1", "ddof=0"),
        ("np.mean(values), np.std", "np.median(values), np.std")),
    *of("evaluate.py", TRACKS,
        ("if has_info else self.dump.ids", "if False else self.dump.ids"),
        ("self.settings.resamples, self.settings.seed", "self.settings.resamples, 1337"),
        ("fresh = ~np.isin(origins[rows], origins[heard])", "fresh = ~np.isin(origins[rows], origins[rows])"),
        ('"clips_of_other_{kind}s": int(fresh.sum())', '"clips_of_other_{kind}s": len(rows)'),
        ("labels[rows][fresh], predictions[fresh]", "labels[rows], predictions")),
    *of("evaluate.py", BASELINE,
        ("bands, ours.labels, train)", 'bands, ours.labels, ours.rows["test"])'),
        ('"network_minus_{name}": ours.minus(rival)', '"network_minus_{name}": rival.minus(ours)'),
        ("rival.per_tag[0]", "rival.per_tag[1]"),
        ("evaluation.scores(rows, found[rows])", "evaluation.scores(rows, predictions)")),
    *of("evaluate.py", NAMES,
        ("only_predictions(ours.labels, train", 'only_predictions(ours.labels, ours.rows["test"]'),
        ("zip(RIVALS, rivals)", "zip(RIVALS, rivals[::-1])"),
        ("repeatability(self.labels, self.groups)", "repeatability(1 - self.labels, self.groups)")),
    *of("lib/baseline.py", "test_evaluate.py",
        ('("artist", "album")', '("album",)'),
        ('("artist", "album")', '("album", "artist")'),
        ("/ (n_clips + 1)", "/ (n_clips + 2)"),
        ("(sums - labels) / (n_clips - 1)", "sums / n_clips"),
        ("np.where(labels, (sums", "np.where(1 - labels, (sums")),
    *of("evaluate.py", COMPARISON,
        ("ours.scores(rows, ours.predict(rows)).minus(theirs.scores(rows, theirs.predict(rows)))",
         "theirs.scores(rows, theirs.predict(rows)).minus(ours.scores(rows, ours.predict(rows)))"),
        ("resampling = self.groups[rows]", "resampling = rows"),
        ("count_seen(ids, clips_seen(one) + clips_seen(other)", "count_seen(ids, clips_seen(one)"),
        ("    if n_seen:\n", "    if False:\n")),
    *of("evaluate.py", SEEN,
        ("clips_seen(one) + clips_seen(other)", "[]"),
        ('torch.cat([checkpoint["clip_ids"]["train"], *earlier])', 'checkpoint["clip_ids"]["train"]'),
        ('if same_clips(dump, [checkpoint["dump"]])]', "]"),
        ('[ids["train"] for dump', '[ids["validation"] for dump'),
        ("    if n_perhaps:\n", "    if n_seen:\n"),
        ("if dumps != {ours.dump.fingerprint}", "if False")),
    *of("lib/checkpoint.py", SEEN,
        ('[*checkpoint["seen_before"], (checkpoint', '[(checkpoint'),
        ('[clip_ids["train"], clip_ids["validation"]]', '[clip_ids["train"]]'),
        ("known[same_clips(dump, dumps)]", "known[True]"),
        ("(perhaps & ~surely).sum()", "perhaps.sum()")),
    *of("lib/dump.py", FINE_TUNING,
        ("> 2 for one", "> 1 for one"),
        ("> 2 for one", "> 4 for one")),
    *of("lib/checkpoint.py", FINE_TUNING,
        ('checkpoint["seen_before"] = clips_seen(source)', 'checkpoint["seen_before"] = clips_seen(source)[-1:]'),
        ('checkpoint["clip_ids"]["test"], clips_seen(source)', 'checkpoint["clip_ids"]["test"], []')),
    *of("trainer.py", FINE_TUNING,
        ('last["seen_before"] if last else []', "[]")),
    *of("evaluate.py", "test_evaluate.py",
        ("np.abs(values[candidates] - annotated)", "np.abs(values[candidates])"),
        ("scores.roc_auc(labels.T, predictions.T)", "scores.roc_auc(labels, predictions)"),
        ('("labels", evaluation.labels[evaluation.rows[part]])', '("labels", predictions)'),
        ("predictions >= thresholds", "predictions > thresholds"),
        ("ours.network(source)", "ours.network(ours.checkpoint)"),
        ('baseline_predictions(features, ours.labels, ours.rows["train"])',
         "baseline_predictions(features, ours.labels, rows)"),
        ("note_on_seen(ours.checkpoint, source)", "''"),
        ('if gain["high"] < 0 else', "if False else"),
        ('"prevalence": labels.mean(axis=0)', '"prevalence": labels.std(axis=0)'),
        ("names.index(name) for name in", "names.index(name) - 1 for name in"),
        ("format_interval(result['average_precision'])}  macro", "format_interval(result['roc_auc'])}  macro"),
        ('gain["low"] <= 0', 'gain["value"] <= 0'),
        ("""name if result["roc_auc"]["low"] > 0""", """name if result["roc_auc"]["value"] > 0""")),
    *of("lib/baseline.py", BASELINE,
        ("BASELINE_C = 0.03", "BASELINE_C = 1"),
        ("fit(features[train])", "fit(features)")),
    # ====== music ======
    *of("lib/tagger.py", "test_tagger.py",
        ("np.linspace(0, excess, n_windows)", "np.linspace(0, excess / 2, n_windows)"),
        ("max(0, excess - HOP_LENGTH)", "max(0, excess)"),
        ("(windows(samples)).mean(axis=0)", "(windows(samples)).max(axis=0)"),
        ("self.scores(clips)).mean(axis=0)", "self.scores(clips)).max(axis=0)"),
        ("np.argsort(-scores / thresholds", "np.argsort(-scores * thresholds"),
        ("score >= self.thresholds[tag]", "score >= 0.5"),
        ('if not song.startswith("#")', "if song"),
        ("path.parent / song for", "Path(song) for"),
        ("(spectrograms - self.mean) / self.std", "(spectrograms - self.mean)"),
        ("np.resize(samples, CLIP_SAMPLES)", "np.pad(samples, (0, CLIP_SAMPLES - len(samples)))"),
        ("followlinks=True", "followlinks=False"),
        ("sorted(name for name in folders if not name", "sorted(name for name in folders if name"),
        ("in seen:\n                folders.clear()", "in []:\n                folders.clear()")),
    *of("lib/library.py", "test_library.py test_tagger.py",
        ("[path for path in stamps if path not in done]", "[*stamps]"),
        ("read_table(table, header, checkpoint) if table.exists() else []", "[]"),
        ("row[-3:-1] == stamps.get(row[0], row[-3:-1])", "True"),
        ("os.path.realpath(path.parent)", "os.path.abspath(path.parent)"),
        ("follow_moved(found, stamps)\n", "0\n"),
        ("len(gone[file]) == len(come[file]) == 1", "come[file]"),
        ("stamps.keys() - {row[0] for row in rows}", "stamps.keys()"),
        ("come[os.path.basename(path), *stamps[path]]", "come[os.path.basename(path), stamps[path][0], '']"),
        ("        if not os.path.exists(row[0]):", "        if True:"),
        ("// 10**6", "// 10**9"),
        ('"surrogateescape" if content.startswith(codecs.BOM_UTF8) else "strict"', '"surrogateescape"'),
        ("filter(any, csv", "filter(None, csv"),
        ('for separator in ",;\\t"', 'for separator in ","'),
        ('text.endswith(("\\n", "\\r"))', "True"),
        ('"; ".join(tagger.above(tags))', '"; ".join(tags)')),
    *of("lib/loader.py", "test_tagger.py",
        ("if threading.get_ident() == here:", "if True:"),
        ("inputs[0].float()", "inputs[0]")),
    *of("lib/demo.py", "test_demo.py",
        ("LOW_NOTES[clip.low]", 'LOW_NOTES["guitar"]'),
        ("HIGH_NOTES[clip.high]", 'HIGH_NOTES["birds"]'),
        ("decibels=rng.uniform(20, 50)", "decibels=0"),
        ("semitones=rng.uniform(4, 12)", "semitones=0"),
        ("STROKES[clip.rhythm]", "0.7"),
        ("TEMPOS[clip.tempo]", "1"),
        ("LEVELS[clip.level]", "-25"),
        ("default_rng([seed, 1])", "default_rng(1)")),
    *of("lib/library.py", "test_tagger.py",
        ("extended[centre : centre + CLIP_SAMPLES]", "samples[centre : centre + CLIP_SAMPLES]"),
        ("np.resize(samples[:half], half)", "samples[:half]"),
        ("tagger.tags(samples), note", 'tagger.tags(samples), ""'),
        ("min(cpu_count(), MOST_THREADS)", "cpu_count()"),
        ("_{hex_crc32(os.fsencode(place_of(path)))}", ""),
        ("path.name[-LONGEST_NAME:]", "path.name"),
        ("list(tags.items())[: settings.top]", "list(tags.items())")),
    # ====== the pages ======
    *of("evaluate.py", "test_evaluate.py test_page.py",
        ("(values >= thresholds[tag]) != annotated", "(values >= 0.5) != annotated"),
        ("candidates[most]", "candidates[most[:9]]")),
    *of("lib/figures.py", "test_figures.py",
        ("-(-log_mel.shape[1] // 1500)", "1"),
        ('"origin": "lower"', '"origin": "upper"')),
    *of("lib/page.py", "test_page.py",
        ("foremost(predictions, thresholds)", "foremost(predictions, 1)"),
        ("evaluation.labels[row]", "1 - evaluation.labels[row]"),
        ("-correlations[0][pair]", "-correlations[1][pair]"),
        ("zip(edges, edges[1:], over_time)", "zip(edges, edges, over_time)"),
        ("autoescape=True", "autoescape=False"),
        ('errors="backslashreplace"', 'errors="strict"'),
        ('if ".." in path.parts', "if False"),
        ('if ".." in path.parts', "if True"),
        ("FOREMOST = 5", "FOREMOST = 2")),
    *of("lib/page.html", "test_page.py",
        ("[current, next] = [place, place + 1]", "[current, next] = [place, place]"),
        ('clip.closest("details").open = true;', ""),
        ("absent.hidden = true;", ""),
        ('audio.addEventListener("error", showAbsence);', ""),
        (".focus({preventScroll: true})", ""),
        ("clip.scrollIntoView();", ""),
        ("dataset.tag, dataset.annotators", "dataset.annotators"),
        ("localStorage.setItem(", "String("),
        ("clips.findIndex(clip => !verdictOf(clip))", "0"),
        ("""replace(/"/g, '""')""", "trim()"),
        ("filter(place => !verdictOf(clips[place]))", "filter(place => true)"),
        ("go(current - 1)", "go(current)"),
        ("audio.paused ? play() : audio.pause()", "play()"),
        ("if (event.ctrlKey || event.metaKey || event.altKey) return;", ""),
        ('addEventListener("change", () => judge(place))', 'addEventListener("change", () => {})'),
        ("find(link.hash).open = true;", ""),
        ("(a, b) => a - b :", "(a, b) => a.localeCompare(b) :"),
        ("(up ? 1 : -1)", "1"),
        ("* (event.clientX - box.left) / box.width", "/ 2"),
        ("requestAnimationFrame(move);\n  });", "});"),
        ("default-src 'none'; ", ""),
        ("base-uri 'none'; ", ""),
        ("{{ '*' if score >= threshold }} <small>", " <small>"),
        ("100 * (end - start) / seconds", "100 * end / seconds"),
        ("(lines.validation | list + lines.test | list) | unique", "lines.test"),
        ("'yes, network no' if annotated", "'no, network no' if annotated"),
        ("<b>{{ 'no' if annotated else 'yes' }}</b>", "<b>no</b>"),
        ("row[score + '_low'] - least", "row[score] - least")),
    # ====== the download ======
    *of("lib/download.py", "test_get_data.py",
        ("position - begin if status == 200 else 0", "0"),
        ("status in (200, 206) and", "status and"),
        (' and "html" not in kind', ""),
        (r"\?\S*|", ""),
        ("self.verify = False", "pass"),
        ("output.truncate(whole.end)", "pass"),
        ("require_md5(part, piece.md5)", "pass"),
        ("output.truncate(output.seek(piece.begin))\n        with", "with"),
        ("hosts.append(hosts.pop(0))", "pass"),
        ("watch.n_slow > 1 and any(other.fault is None for other in others)", "False"),
        ("any(other.fault is None for other in others)", "True"),
        ("(failed or not host.served)", "True"),
        ("digest(output.name, piece.begin, piece.end) == piece.md5", "True"),
        ("if begun > piece.begin:", "if False:")),
    *of("get_data.py", "test_get_data.py",
        ("archive == ARCHIVE.md5 and clips", "clips"),
        ("sizes == [clip", "[] != [clip"),
        ("2 * ARCHIVE.end", "ARCHIVE.end"),
        ("path.read_bytes() == clip", "True"),
        ("if not is_unpacked(data)", "if True")),
    # ====== several processes ======
    *of("model.py", "test_parallel.py::test_two_processes_train_as_one",
        ("    backward = forward\n", "    @staticmethod\n    def backward(ctx, gradient):\n        return gradient\n")),
    *of("lib/parallel.py", "test_parallel.py::test_two_processes_train_as_one",
        ("gradient.copy_(summed.view(gradient.shape))", "pass")),
]
# fmt: on


def main():
    settings = tyro.cli(Settings, description=__doc__)
    for file, _, text, replacement, _ in MUTANTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        if (n := source.count(text)) != 1:
            raise InputError(f"{file}: has {n} places with {text!r}; a mutant needs one, so write this one anew")
        if file.endswith(".py"):
            compile(source.replace(text, replacement), file, "exec")  # no mutant dies of a syntax error
    words = settings.only or [""]
    chosen = [mutant for mutant in MUTANTS if any(word in f"{mutant.file} {mutant.text}" for word in words)]
    unbroken = [Mutant("model.py", [test], "", "") for test in sorted({test for one in chosen for test in one.tests})]
    tally = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(settings.jobs) as pool:
        copies = SimpleQueue()
        for number in range(settings.jobs):
            copies.put(copy_of_checkout(Path(folder) / str(number)))
        for mutant, outcome in outcomes(unbroken, pool, copies):
            if outcome == "died":
                raise InputError(f"{mutant.tests[0]}: fails although nothing is broken; mend that first")
        print("| file | text | replacement | outcome |\n|---|---|---|---|")
        for mutant, outcome in outcomes(chosen, pool, copies):
            tally[outcome] += 1
            cells = mutant.file, code(mutant.text), code(mutant.replacement), outcome
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{', '.join(f'{n} {outcome}' for outcome, n in tally.items())}")
    return 1 if tally["ALIVE"] else 0


def copy_of_checkout(folder):
    """Copy what git tracks, as it is now, and return the folder."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def outcomes(mutants, pool, copies):
    """Yield (mutant, "died", "ALIVE" or "equivalent") for each; `copies` is a queue of the folders to break."""

    def outcome_of(mutant):
        folder = copies.get()
        original = (folder / mutant.file).read_text(encoding="utf-8")
        (folder / mutant.file).write_text(original.replace(mutant.text, mutant.replacement), encoding="utf-8")
        try:
            alive = passes(folder, mutant.tests)
        finally:
            (folder / mutant.file).write_text(original, encoding="utf-8")
            copies.put(folder)
        return ("equivalent" if mutant.equivalent else "ALIVE") if alive else "died"

    return zip(mutants, pool.map(outcome_of, mutants))


def passes(folder, tests):
    """Return whether the tests pass in a copy; if they hang, they do not. Raises InputError if there are none."""
    options = "-qx", "-n0", "-p", "no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # 1: a test failed; 2: a file could not even be imported
        raise InputError(f"{' '.join(tests)}: {done.stdout.splitlines()[-1]}")
    return done.returncode == 0


def code(text):
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`"


if __name__ == "__main__":
    run(main)
