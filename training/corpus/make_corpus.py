"""Makes the token files that vsprefill-distill reads: documents.jsonl (fetch_corpus.sh) and a model's tokenizer in,
corpus_train.safetensors and corpus_heldout.safetensors out.

A file holds "ids" (uint16, or int32 for vocabularies above 65,536) [N], "starts" (int32) [documents] and "whole"
(uint8) [documents]: 1 marks a prompt that is used at its own length, never cut. Documents, not windows, are split
into training and held-out text, so no held-out passage was seen. A share of the documents begins with the model's
chat template, and needle prompts (a magic number in filler or documentation text, asked for at the end) are added, all
from one seed.
"""

import argparse
import hashlib
import json
import os
import random

import numpy as np
import safetensors.numpy
import transformers

FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ")
ADJECTIVES = ("amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd plain quiet "
              "rapid silent tidy upbeat vivid warm young zesty").split()
NOUNS = ("anchor basket candle desert engine forest garden harbor island jacket kettle ladder marble needle orchard "
         "pencil quarry river saddle temple umbrella valley window yard zipper").split()
USER_MARK = "VSPREFILLTEXT"


def is_heldout(name, share):
    return int.from_bytes(hashlib.sha256(("split:" + name).encode()).digest()[:4], "big") / 2**32 < share


class Template:
    """The model's chat template around a text; empty where the tokenizer has none."""

    def __init__(self, tokenizer):
        self.before, self.after = "", ""
        if tokenizer.chat_template:
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": USER_MARK}], tokenize=False,
                                                     add_generation_prompt=True)
            self.before, self.after = rendered.split(USER_MARK)


def needle_prompt(rng, encode, template, sources, target_tokens):
    """A needle prompt of about `target_tokens` tokens, never more."""
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    kind = rng.choice(["number", "code"])
    value = str(rng.randrange(10**6, 10**7)) if kind == "number" else "".join(rng.choices("ABCDEFGHKLMNPRST23456789",
                                                                                          k=8))
    needle = rng.choice([f"One of the special magic {kind}s for {key} is: {value}.",
                         f"The special magic {kind} for {key} is {value}.",
                         f"Remember this: the secret {kind} of the {key} is {value}."])
    lead = rng.choice([f"A special magic {kind} is hidden within the following text. Memorize it; I will ask you about "
                       "it afterwards.\n", "Read the text and answer the question after it.\n", ""])
    question = rng.choice([f"\nWhat is the special magic {kind} for {key} mentioned in the provided text?",
                           f"\nQuestion: what is the {kind} of the {key}? Answer with the {kind} only."])
    head, tail = encode(template.before + lead), encode(question + template.after)
    middle = encode(" " + needle + " ")
    room = target_tokens - len(head) - len(tail) - len(middle)
    filler = []
    while len(filler) < room:
        if sources is None:
            filler += encode(FILLER * 40)
        else:
            text = rng.choice(sources)
            at = rng.randrange(max(1, len(text) - 4000))
            filler += encode(text[at:at + 4 * room])
    filler = filler[:room]
    at = rng.randrange(room + 1)
    return head + filler[:at] + middle + filler[at:] + tail


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", required=True, help="documents.jsonl of fetch_corpus.sh")
    parser.add_argument("--model", required=True, help="model directory with the tokenizer")
    parser.add_argument("--out-dir", required=True, help="folder for the two .safetensors files")
    parser.add_argument("--heldout-share", type=float, default=0.08, help="share of the documents kept for evaluation")
    parser.add_argument("--chat-share", type=float, default=0.4, help="share of documents inside the chat template")
    parser.add_argument("--needles", type=int, default=160, help="needle prompts in the training file")
    parser.add_argument("--max-tokens", type=int, default=8192, help="longest needle prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    template = Template(tokenizer)
    rng = random.Random(args.seed)

    def encode(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    with open(args.documents, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    parts = {"train": [], "heldout": []}  # (name, ids, whole)
    manuals = {"train": [], "heldout": []}
    sources = {}
    for record in records:
        split = "heldout" if is_heldout(record["name"], args.heldout_share) else "train"
        chat = rng.random() < args.chat_share
        ids = encode((template.before if chat else "") + record["text"])
        parts[split].append((record["name"], ids, 0))
        entry = sources.setdefault(record["source"], {"licence": record["licence"], "genre": record["genre"],
                                                      "train": 0, "heldout": 0})
        entry[split] += len(ids)
        if record["genre"] == "manual":
            manuals[split].append(record["text"])
    for split, count in (("train", args.needles), ("heldout", max(8, args.needles // 10))):
        entry = sources.setdefault("needle-prompts", {"licence": "generated", "genre": "dialogue", "train": 0,
                                                      "heldout": 0})
        for i in range(count):
            target = rng.choice([1024, 2048, 3072, 4096, 6144, args.max_tokens - 400, args.max_tokens])
            filler = None if i % 2 == 0 else manuals[split]
            ids = needle_prompt(rng, encode, template, filler, target)
            parts[split].append((f"needle/{i:04d}", ids, 1))
            entry[split] += len(ids)

    os.makedirs(args.out_dir, exist_ok=True)
    dtype = np.uint16 if len(tokenizer) <= 65536 else np.int32
    for split, documents in parts.items():
        starts = np.cumsum([0] + [len(ids) for _, ids, _ in documents[:-1]]).astype(np.int32)
        ids = np.concatenate([np.asarray(ids, dtype=dtype) for _, ids, _ in documents])
        whole = np.asarray([flag for _, _, flag in documents], dtype=np.uint8)
        metadata = {"format": "vsprefill-corpus-1", "split": split, "seed": str(args.seed),
                    "vocab_size": str(len(tokenizer)), "names": json.dumps([name for name, _, _ in documents]),
                    "sources": json.dumps(sources)}
        path = os.path.join(args.out_dir, f"corpus_{split}.safetensors")
        safetensors.numpy.save_file({"ids": ids, "starts": starts, "whole": whole}, path + ".tmp", metadata=metadata)
        os.replace(path + ".tmp", path)
        print(f"{path}: {len(documents)} documents, {len(ids):,} tokens")
    print(f"{'source':18} {'genre':9} {'train':>9} {'heldout':>9}  licence")
    for name, entry in sources.items():
        print(f"{name:18} {entry['genre']:9} {entry['train']:9,d} {entry['heldout']:9,d}  {entry['licence']}")


if __name__ == "__main__":
    main()
