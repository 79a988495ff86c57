"""Held-out texts of five kinds for bench/eval/fidelity.py: documents that the indexer's training never saw, by the
same split as training/corpus/make_corpus.py."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training/corpus"))
import make_corpus

HELDOUT_SHARE = 0.08  # make_corpus.py's default
KINDS = ("manual", "prose", "code", "table", "dialogue")


def held_out(path, held=True):
    """[(kind, name, text)] of the held-out documents (or of the training ones), in the file's order."""
    documents = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            if record["genre"] in KINDS and make_corpus.is_heldout(record["name"], HELDOUT_SHARE) == held:
                documents.append((record["genre"], record["name"], record["text"]))
    return documents


def joined(documents, encode, tokens):
    """The documents, those of a source joined in order until each has at least `tokens` tokens."""
    sources, whole = {}, []
    for kind, name, text in documents:
        sources.setdefault((kind, name.split("/")[0]), []).append((name, text))
    for (kind, _), parts in sources.items():
        names, text = [], ""
        for name, part in parts:
            names.append(name)
            text = f"{text}\n\n{part}" if text else part
            if len(encode(text)) >= tokens:
                whole.append((kind, names[0], text))
                names, text = [], ""
    return whole


def windows(documents, encode, tokens, most_per_kind, windows_per_document=2):
    """[(kind, id, ids)]: stretches of exactly `tokens` tokens, first windows of all documents before second ones, of
    each kind up to `most_per_kind` and round its sources in turn."""
    by_kind = {kind: [] for kind in KINDS}
    for kind, name, text in documents:
        ids = encode(text)
        for window in range(min(windows_per_document, len(ids) // tokens)):
            by_kind[kind].append((window, name, ids[window * tokens:(window + 1) * tokens]))
    chosen = []
    for kind, found in by_kind.items():
        seen = {}
        ranked = []
        for window, name, ids in sorted(found, key=lambda item: item[0]):
            source = name.split("/")[0]
            seen[source] = seen.get(source, 0) + 1
            ranked.append((seen[source], window, name, ids))
        ranked.sort(key=lambda item: item[0])
        chosen += [(kind, f"{kind}/{name}/{window}", ids) for _, window, name, ids in ranked[:most_per_kind]]
    return chosen
