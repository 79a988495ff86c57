#!/usr/bin/env python3
"""Makes tiny models and their expected results with transformers, fixed seeds, float32 runs.

models/fixtures/NAME/ is a Hugging Face model directory with one more file, expected.safetensors:
  ids           int32   [n]
  layers.{i}.k  float32 [kv_heads, n, head_dim], after RoPE
  layers.{i}.v  float32 [kv_heads, n, head_dim]
  logits        float32 [1, vocab], of the last token
models/fixtures/smollm2/expected.safetensors holds the same for models/SmolLM2-135M-Instruct.

The expected run uses the stored weights (read back from the file in their stored dtype), computed
in float32, so that a reader that is exact agrees to rounding. Existing folders of this VERSION are kept.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import save_file

VERSION = 1
ROOT = Path(__file__).resolve().parents[2]

BASE = dict(vocab_size=512, hidden_size=384, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
            rms_norm_eps=1e-5, initializer_range=0.06, tie_word_embeddings=True)


def rope(kind, theta=10000.0, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = rope("yarn", 10000.0, factor=8.0, original_max_position_embeddings=128)

# name: (family, config changes, stored dtype, options). Styles: 5 is what save_pretrained of
# transformers 5 writes; 4 is what the hub holds (rope_theta, rope_scaling, torch_dtype).
FIXTURES = {
    "llama": ("llama", dict(rope_parameters=rope("default")), "bfloat16", dict(n=300)),
    "llama-v4": ("llama", dict(rope_parameters=rope("default")), "bfloat16", dict(n=300, style=4)),
    "llama-mha": ("llama", dict(num_key_value_heads=6, tie_word_embeddings=False, attention_bias=True,
                                mlp_bias=True, rope_parameters=rope("default", 500000.0)),
                  "bfloat16", dict(n=77)),
    "llama-linear": ("llama", dict(rope_parameters=rope("linear", factor=2.5)), "float32", dict(n=77)),
    "llama-linear-v4": ("llama", dict(rope_parameters=rope("linear", factor=2.5)), "float32",
                        dict(n=77, style=4, type_key="type")),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3), "bfloat16", dict(n=300)),
    "llama-llama3-v4": ("llama", dict(rope_parameters=LLAMA3), "bfloat16", dict(n=300, style=4)),
    "llama-yarn": ("llama", dict(rope_parameters=YARN), "bfloat16", dict(n=300)),
    "llama-yarn-factor": ("llama", dict(rope_parameters=dict(YARN, attention_factor=1.25, beta_fast=16.0,
                                                             beta_slow=2.0, truncate=False)),
                          "float32", dict(n=300)),
    "qwen2": ("qwen2", dict(num_attention_heads=6, num_key_value_heads=1, num_hidden_layers=3,
                            rope_parameters=rope("default", 1000000.0)), "bfloat16", dict(n=300)),
    "qwen2-yarn-v4": ("qwen2", dict(head_dim=None, rope_parameters=YARN, tie_word_embeddings=False),
                      "bfloat16", dict(n=77, style=4, type_key="type")),
    "qwen3": ("qwen3", dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
                            rope_parameters=rope("default", 1000000.0)), "bfloat16", dict(n=300)),
    "qwen3-v4": ("qwen3", dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
                               rope_parameters=rope("default", 1000000.0)), "bfloat16",
                 dict(n=300, style=4)),
    "llama-sharded": ("llama", dict(rope_parameters=rope("default")), "bfloat16", dict(n=77, shards=3)),
    "llama-f16": ("llama", dict(rope_parameters=rope("default"), num_hidden_layers=2), "float16", dict(n=77)),
    "llama-f32": ("llama", dict(rope_parameters=rope("default"), num_hidden_layers=2), "float32", dict(n=77)),
}
# The same weights in another guise: identical ids and results are expected.
SAME_SEED = {"llama-v4": "llama", "llama-sharded": "llama", "llama-llama3-v4": "llama-llama3",
             "llama-linear-v4": "llama-linear", "qwen3-v4": "qwen3"}


def seed_of(name):
    return 1000 + sorted(FIXTURES).index(SAME_SEED.get(name, name))


def classes(family):
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return getattr(transformers, prefix + "Config"), getattr(transformers, prefix + "ForCausalLM")


def make_model(family, changes, dtype, seed):
    config_class, model_class = classes(family)
    values = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    config = config_class(**values, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a reader that ignores them.
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
            elif "norm" in name:
                parameter.uniform_(0.6, 1.4, generator=generator)
    return model.to(getattr(torch, dtype))


def to_v4(path, dtype, type_key):
    """Rewrites a config.json to the style of transformers 4."""
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {type_key: kind, **parameters}
    config["transformers_version"] = "4.51.3"
    path.write_text(json.dumps(config, indent=2) + "\n")


def expected(model_dir, ids, model_class):
    """K and V of every layer and the logits of the last token, by transformers in float32."""
    model = model_class.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "logits": out.logits[0, -1:].contiguous()}
    for i, layer in enumerate(out.past_key_values.layers):
        tensors[f"layers.{i}.k"] = layer.keys[0].contiguous()
        tensors[f"layers.{i}.v"] = layer.values[0].contiguous()
    return tensors


def up_to_date(folder):
    try:
        return json.loads((folder / "fixture.json").read_text())["version"] == VERSION
    except (OSError, ValueError, KeyError):
        return False


def finish(temporary, folder, tensors):
    save_file(tensors, temporary / "expected.safetensors",
              metadata={"transformers": transformers.__version__, "torch": torch.__version__})
    (temporary / "fixture.json").write_text(json.dumps({"version": VERSION}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


def fresh(folder):
    temporary = folder.with_name("." + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def make_fixture(name, folder):
    family, changes, dtype, options = FIXTURES[name]
    temporary = fresh(folder)
    model = make_model(family, changes, dtype, seed_of(name))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    shards = {"max_shard_size": size // (options["shards"] - 1)} if "shards" in options else {}
    model.save_pretrained(temporary, **shards)
    files = len(list(temporary.glob("*.safetensors")))
    if files != options.get("shards", 1):
        sys.exit(f"make_fixtures: {name}: {files} files, expected {options.get('shards', 1)}")
    if options.get("style", 5) == 4:
        to_v4(temporary / "config.json", dtype, options.get("type_key", "rope_type"))
    generator = torch.Generator().manual_seed(seed_of(name))
    ids = torch.randint(3, BASE["vocab_size"], (options["n"],), generator=generator).tolist()
    finish(temporary, folder, expected(temporary, ids, classes(family)[1]))


def make_smollm2(model_dir, document, folder):
    from transformers import AutoTokenizer, LlamaForCausalLM

    temporary = fresh(folder)
    text = document.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(model_dir)(text).input_ids[:600]
    finish(temporary, folder, expected(model_dir, ids, LlamaForCausalLM))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models/fixtures")
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--document", type=Path, default=ROOT / "deploy/local/prompts/document.txt")
    parser.add_argument("--force", action="store_true", help="make all of them again")
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    begin = time.monotonic()
    made = 0
    for name in FIXTURES:
        if args.force or not up_to_date(args.out / name):
            print(f"make_fixtures: {name}", flush=True)
            make_fixture(name, args.out / name)
            made += 1
    if args.force or not up_to_date(args.out / "smollm2"):
        print("make_fixtures: smollm2", flush=True)
        make_smollm2(args.model, args.document, args.out / "smollm2")
        made += 1
    for folder in args.out.iterdir():
        if folder.name not in (*FIXTURES, "smollm2"):
            shutil.rmtree(folder)
    print(f"make_fixtures: {made} made, {len(FIXTURES) + 1 - made} there, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
