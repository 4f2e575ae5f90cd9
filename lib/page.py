"""Pages to listen to, opened from disk by a browser: a report on a checkpoint, and a recording's tags over time.

Both are page.html, filled in. A page holds all that it shows but the music, which it plays from where that lies.
"""

import os
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np

from lib.common import whole_file
from lib.tagger import foremost

FOREMOST = 5  # of the network's tags that are shown of a clip
PAIRS = 5  # of tags that go together, in words


def write_report(path, evaluation, predictions, listed, correlations, **more):
    """Write a report on an Evaluation's checkpoint, with the clips that are worth a listen.

    `predictions` (clips, tags) are those of the test clips, `listed` evaluate.worth_a_listen's of them, `correlations`
    (2, tags, tags) those between tags, annotated and predicted. `more` is shown as it is: `results`, of results.json;
    `lines` {part: {what: said}} and `remarks`, as they are printed; `pictures`, the paths of PNG files.
    """
    names, thresholds = evaluation.checkpoint["tag_names"], evaluation.checkpoint["thresholds"].numpy()
    order, clips = foremost(predictions, thresholds)[:, :FOREMOST], {}
    for tag, label, clip in listed:
        about = {"row": (row := evaluation.rows["test"][clip]), "score": predictions[clip, tag]}
        about["annotated"] = [names[other] for other in np.flatnonzero(evaluation.labels[row])]
        about["foremost"] = [(names[other], predictions[clip, other], thresholds[other]) for other in order[clip]]
        clips.setdefault(names[tag], {}).setdefault(label, []).append(about)
    pairs = sorted(zip(*np.triu_indices(len(names), 1)), key=lambda pair: -correlations[0][pair])[:PAIRS]
    pairs = [(names[one], names[other], *(panel[one, other] for panel in correlations)) for one, other in pairs]
    name = evaluation.path.absolute().parent.name
    fill_in(path, name=name, evaluation=evaluation, clips=clips, pairs=pairs, **more)


def write_song(path, song, tagger, tags, spectrogram, edges, scores):
    """Write a page on a recording, the file `song`, that a Tagger has given `tags`, {tag: score}.

    `spectrogram` is a PNG file's bytes; over time, `scores` (columns, tags) are the tags', `edges` (columns + 1,) in s.
    """
    tags = [(*tag, [*zip(edges, edges[1:], over_time)]) for tag, over_time in zip(tags.items(), scores.T)]
    fill_in(path, name=song.name, song=song, tagger=tagger, tags=tags, spectrogram=spectrogram, seconds=edges[-1])


def url_of(file, folder):
    """Return a file's URL relative to `folder`, so that both can be moved together."""
    file, folder = (os.path.realpath(path) if ".." in path.parts else path for path in (file, folder))  # link/..
    return quote(os.path.relpath(file, folder), errors="surrogateescape")


def fill_in(path, **content):
    """Write page.html, filled in with `content`: whatever that holds is shown as text, and never runs."""
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    page = jinja2.Environment(loader=loader, undefined=strict, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["base64"] = lambda content: b64encode(content).decode()
    page.filters["sha256"] = lambda text: sha256(text.encode()).digest()
    page.filters["url"] = lambda file: url_of(file, path.parent)
    with whole_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # a file name need not be UTF-8
        file.write(page.get_template("page.html").render(content))
