#!/usr/bin/env python3
"""Text to token ids and back, with the model directory's own tokenizer and chat template.

    prompt.py encode --model DIR [--prompt FILE | --question TEXT] --out IDS.json
    prompt.py decode --model DIR IDS.json|-

encode writes a JSON array of ids: the shipped document and a question about it, FILE as one message of
a user, or the document with another question. decode prints the text of a JSON array of ids.
"""

import argparse
import json
import sys
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

DEFAULT_DOCUMENT = Path(__file__).resolve().parent / "prompts/document.txt"
DEFAULT_QUESTION = (Path(__file__).resolve().parent / "prompts/question.txt").read_text(encoding="utf-8").strip()


def load_tokenizer(model_dir):
    return Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))


def chat_ids(model_dir, message):
    """Ids of one user message in the model's chat template, ready for the answer."""
    config = json.loads((Path(model_dir) / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    text = environment.from_string(config["chat_template"]).render(
        messages=[{"role": "user", "content": message}], add_generation_prompt=True)
    return load_tokenizer(model_dir).encode(text, add_special_tokens=False).ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode")
    encode.add_argument("--model", type=Path, required=True)
    encode.add_argument("--prompt", type=Path, help="a text file: the whole message")
    encode.add_argument("--question", default=DEFAULT_QUESTION, help="about the shipped document")
    encode.add_argument("--out", type=Path, required=True)
    decode = commands.add_parser("decode")
    decode.add_argument("--model", type=Path, required=True)
    decode.add_argument("ids", help="file with a JSON array of ids, - for standard input")
    args = parser.parse_args()
    if args.command == "encode":
        if args.prompt:
            message = args.prompt.read_text(encoding="utf-8").strip()
        else:
            message = f"{DEFAULT_DOCUMENT.read_text(encoding='utf-8').strip()}\n\n{args.question}"
        ids = chat_ids(args.model, message)
        args.out.write_text(json.dumps(ids))
        print(len(ids))
    else:
        text = sys.stdin.read() if args.ids == "-" else Path(args.ids).read_text()
        print(load_tokenizer(args.model).decode(json.loads(text), skip_special_tokens=True))


if __name__ == "__main__":
    main()
