#!/usr/bin/env bash
# Fetches the text that the default VSIndexer is distilled on: Debian documentation and source packages
# (docs/distillation.md lists them with their licences), unpacked without being installed, turned into plain text.
#
#   training/corpus/fetch_corpus.sh WORK_DIR     writes WORK_DIR/documents.jsonl (about 20 MB)
#
# Needs apt-get, dpkg-deb, pod2text, man and the project's venv. Idempotent: packages already there are kept.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: fetch_corpus.sh WORK_DIR}
python=${PYTHON:-$here/../../.venv/bin/python}
mkdir -p "$work/deb" "$work/tree"
work=$(cd "$work" && pwd)

mapfile -t packages < <("$python" "$here/extract_text.py" --list-packages)
for package in "${packages[@]}"; do
  if ! compgen -G "$work/deb/${package}_*.deb" >/dev/null; then
    echo "fetching $package"
    (cd "$work/deb" && apt-get -qq download "$package") || {
      echo "error: cannot download Debian package '$package' (run apt-get update?)" >&2
      exit 1
    }
  fi
  if [ ! -d "$work/tree/$package" ]; then
    dpkg-deb -x "$work"/deb/"${package}"_*.deb "$work/tree/$package"
  fi
done
"$python" "$here/extract_text.py" --tree "$work/tree" --out "$work/documents.jsonl"
