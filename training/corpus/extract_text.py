"""Turns unpacked Debian packages into plain-text documents, one JSON object a line:
{"source", "genre", "licence", "name", "text"}.

Files of a source are taken in name order and joined until a document is about 40,000 characters (more than 8K
tokens), so that long windows exist for manuals whose pages are short. Markup is removed from HTML, POD and man pages.
"""

import argparse
import dataclasses
import glob
import gzip
import hashlib
import html.parser
import json
import os
import re
import subprocess

DOCUMENT_CHARS = 40_000


@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    package: str
    genre: str
    licence: str
    pattern: str  # glob below the package's tree
    kind: str  # text, html, pod, man, bible, fortune, json_table
    max_chars: int
    exclude: str = r"^$"


DOC = "usr/share/doc/"
SOURCES = [
    Source("linux", "linux-doc-6.1", "manual", "GPL-2.0", DOC + "linux-doc-6.1/Documentation/**/*.rst.gz", "text",
           2_600_000, r"translations|/index\.rst|changes"),
    Source("postgresql", "postgresql-doc-15", "manual", "PostgreSQL", DOC + "postgresql-doc-15/html/*.html", "html",
           1_800_000, r"release-|bookindex|biblio"),
    Source("python-doc", "python3.11-doc", "manual", "PSF-2.0", DOC + "python3.11/html/_sources/**/*.rst.txt",
           "text", 1_800_000, r"whatsnew/changelog"),
    Source("git", "git-doc", "manual", "GPL-2.0", DOC + "git-doc/**/*.txt", "text", 1_000_000, r"RelNotes"),
    Source("perl", "perl-doc", "manual", "GPL-1.0+ or Artistic", "usr/share/perl/*/pod/perl*.pod", "pod", 1_200_000,
           r"delta|perltoc|perluniprops"),
    Source("man-system", "manpages", "manual", "GPL-2.0+ and BSD and others, free", "usr/share/man/man[457]/*.gz",
           "man", 700_000),
    Source("man-calls", "manpages-dev", "manual", "GPL-2.0+ and BSD and others, free", "usr/share/man/man2/*.gz",
           "man", 700_000),
    Source("debian-reference", "debian-reference-en", "manual", "GPL-2.0+",
           "usr/share/debian-reference/debian-reference.en.txt.gz", "text", 700_000),
    Source("debian-handbook", "debian-handbook", "manual", "GPL-2.0+ or CC-BY-SA-3.0",
           DOC + "debian-handbook/html/en-US/*.html", "html", 1_000_000),
    Source("debian-policy", "debian-policy", "manual", "GPL-2.0+", DOC + "debian-policy/policy.txt.gz", "text",
           500_000),
    Source("debian-security", "harden-doc", "manual", "GPL-2.0+", DOC + "harden-doc/html/en-US/*.html", "html",
           500_000),
    Source("debian-history", "debian-history", "prose", "GPL-2.0+", DOC + "debian-history/**/*.en.html", "html",
           200_000),
    Source("anarchism-faq", "anarchism", "prose", "GPL-2.0 and GFDL-1.1+", DOC + "anarchism/markdown/*.md*", "text",
           2_200_000),
    Source("king-james-bible", "bible-kjv-text", "prose", "text in the public domain, package GPL-2.0+",
           "usr/lib/bible.data", "bible", 1_600_000),
    Source("jargon-file", "jargon-text", "prose", "public domain", DOC + "jargon-text/jargon.txt.gz", "text", 500_000),
    Source("fortunes", "fortunes", "dialogue", "BSD and public domain", "usr/share/games/fortunes/*", "fortune",
           1_200_000, r"\.(dat|u8)$|/off/"),
    Source("python-library", "libpython3.11-stdlib", "code", "PSF-2.0", "usr/lib/python3.11/**/*.py", "text",
           2_000_000, r"pydoc_data|_sysconfigdata"),
    Source("eigen", "libeigen3-dev", "code", "MPL-2.0", "usr/include/eigen3/**/*.h", "text", 1_000_000),
    Source("iso-codes", "iso-codes", "table", "LGPL-2.1+", "usr/share/iso-codes/json/iso_*.json", "json_table",
           600_000),
]
EXTRA_PACKAGES = ["bible-kjv"]  # the program that prints bible-kjv-text


class _Text(html.parser.HTMLParser):
    """Text of a page: a line per block element, table cells separated by ' | '."""

    BLOCK = {"p", "div", "br", "li", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "section",
             "ul", "ol", "title"}
    SKIP = {"script", "style", "nav", "header", "footer"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skip, self.pre = [], 0, 0

    def handle_starttag(self, tag, attrs):
        if tag in self.SKIP:
            self.skip += 1
        if tag == "pre":
            self.pre += 1
        if tag in self.BLOCK:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" | ")

    def handle_endtag(self, tag):
        if tag in self.SKIP:
            self.skip = max(0, self.skip - 1)
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def _read(path):
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as f:
        return f.read().decode("utf-8", errors="replace")


def _json_table(path):
    rows = next(iter(json.loads(_read(path)).values()))
    columns = sorted({key for row in rows for key in row if key != "flag"})
    lines = [" | ".join(columns)]
    lines += [" | ".join(str(row.get(column, "-")) for column in columns) for row in rows]
    return "\n".join(lines)


def _convert(source, path, tree):
    if source.kind == "text":
        text = _read(path)
    elif source.kind == "html":
        parser = _Text()
        parser.feed(_read(path))
        text = "".join(parser.parts)
    elif source.kind == "pod":
        text = subprocess.run(["pod2text", "-w", "100", path], capture_output=True, check=True).stdout.decode(
            "utf-8", errors="replace")
    elif source.kind == "man":
        env = dict(os.environ, MANWIDTH="100", LC_ALL="C.UTF-8", MAN_KEEP_FORMATTING="")
        text = subprocess.run(["man", "-l", path], capture_output=True, check=True, env=env).stdout.decode(
            "utf-8", errors="replace")
        text = re.sub(r".\x08", "", text)
    elif source.kind == "bible":
        program = os.path.join(tree, "bible-kjv", "usr/bin/bible")
        text = subprocess.run([program, "-p", os.path.dirname(path), "gen1:1-rev22:21"], capture_output=True,
                              check=True, stdin=subprocess.DEVNULL).stdout.decode("latin-1")
    elif source.kind == "fortune":
        text = _read(path).replace("\n%\n", "\n\n")
    else:
        text = _json_table(path)
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _documents(source, tree):
    root = os.path.join(tree, source.package)
    paths = sorted(p for p in glob.glob(os.path.join(root, source.pattern), recursive=True)
                   if os.path.isfile(p) and not re.search(source.exclude, p))
    if not paths:
        raise SystemExit(f"error: no file matches {source.pattern} in package {source.package}")
    documents, pending = [], ""
    for path in paths:
        pending = (pending + "\n\n" if pending else "") + _convert(source, path, tree)
        while len(pending) >= DOCUMENT_CHARS:
            cut = pending.rfind("\n", 0, DOCUMENT_CHARS + 8_000)
            cut = cut if cut >= DOCUMENT_CHARS else min(len(pending), DOCUMENT_CHARS)
            documents.append(pending[:cut])
            pending = pending[cut:].lstrip("\n")
        if len(documents) * DOCUMENT_CHARS > 4 * source.max_chars:
            break
    if len(pending) >= 6_000:
        documents.append(pending)
    names = [f"{source.name}/{i:04d}" for i in range(len(documents))]
    chosen, total = [], 0
    for name, text in sorted(zip(names, documents), key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        if total >= source.max_chars:
            break
        chosen.append((name, text))
        total += len(text)
    return sorted(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list-packages", action="store_true", help="print the Debian packages needed, one a line")
    parser.add_argument("--tree", help="folder with one unpacked tree per package")
    parser.add_argument("--out", help="documents.jsonl to write")
    args = parser.parse_args()
    if args.list_packages:
        print("\n".join(sorted({s.package for s in SOURCES} | set(EXTRA_PACKAGES))))
        return
    if not args.tree or not args.out:
        parser.error("--tree and --out are needed")
    with open(args.out + ".tmp", "w", encoding="utf-8") as out:
        for source in SOURCES:
            documents = _documents(source, args.tree)
            for name, text in documents:
                record = {"source": source.name, "genre": source.genre, "licence": source.licence, "name": name,
                          "text": text}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(f"{source.name:18} {source.genre:9} {len(documents):4d} documents "
                  f"{sum(len(t) for _, t in documents):9,d} characters  {source.licence}", flush=True)
    os.replace(args.out + ".tmp", args.out)


if __name__ == "__main__":
    main()
