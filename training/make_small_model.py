#!/usr/bin/env python3
"""Makes a small model of a family, trained for some minutes on plain text, so that its attention has structure.

For trying distil_model.py (docs/distil_your_model.md) where no real model of that family is at hand; it is of no other
use. A byte-level BPE tokenizer is trained on the same text. Training is causal language modelling with transformers,
float32, AdamW, one seed; the weights are stored in bfloat16.

  training/make_small_model.py --family qwen3 --documents documents.jsonl --out /tmp/small-qwen3
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def read_documents(path, characters, seed):
    """Texts in random order, `characters` in all."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    random.Random(seed).shuffle(texts)
    chosen, total = [], 0
    for text in texts:
        if total >= characters:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def train_tokenizer(texts, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END, "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END,
                                                chat_template=CHAT_TEMPLATE)


def make_model(family, tokenizer, args):
    shape = dict(vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=3 * args.hidden,
                 num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
                 max_position_embeddings=args.positions, tie_word_embeddings=True, bos_token_id=tokenizer.eos_token_id,
                 eos_token_id=tokenizer.eos_token_id, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    if family == "qwen3":
        config = transformers.Qwen3Config(head_dim=args.head_dim, **shape)
        return transformers.Qwen3ForCausalLM(config)
    if args.heads * args.head_dim != args.hidden:
        raise SystemExit(f"make_small_model: qwen2 needs heads * head_dim = hidden, not {args.heads} * {args.head_dim}"
                         f" = {args.hidden}")
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("qwen2", "qwen3"), required=True)
    parser.add_argument("--documents", type=Path, required=True, help="documents.jsonl of corpus/fetch_corpus.sh")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--characters", type=int, default=4_000_000, help="of the documents that are trained on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--window", type=int, default=768, help="tokens of a window")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = read_documents(args.documents, args.characters, args.seed)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    ids = []
    for text in texts:
        ids += [tokenizer.eos_token_id] + tokenizer(text, verbose=False)["input_ids"]
    ids = torch.tensor(ids)
    model = make_model(args.family, tokenizer, args)
    print(f"make_small_model: {args.family}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(ids):,} tokens of text, {args.steps} steps of {args.batch} x {args.window} tokens", flush=True)

    warmup = max(1, args.steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup) * (
        0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps))))
    generator = torch.Generator().manual_seed(args.seed)
    start = last = time.monotonic()
    for step in range(args.steps):
        begins = torch.randint(len(ids) - args.window, (args.batch,), generator=generator)
        batch = torch.stack([ids[b:b + args.window] for b in begins])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if time.monotonic() - last > 15 or step + 1 == args.steps:
            last = time.monotonic()
            print(f"step {step + 1} of {args.steps}: loss {loss.item():.3f}, {last - start:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"make_small_model: wrote {args.out}")


if __name__ == "__main__":
    main()
