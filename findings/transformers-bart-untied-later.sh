#!/usr/bin/env bash
# A BART model whose head is untied after loading loses its embeddings when it is saved; its sister built untied does not.
#
# transformers 5.24.0, torch 2.13.0, Python 3.11, Linux x86-64; seen on 2026-12-01.
#
# A model of the BART family has a table of tokens (model.shared) that encoder, decoder and head share. Giving the head a
# matrix of its own (tie_word_embeddings = False in the configuration and a new parameter, as fine-tuning of the head alone
# does) and save_pretrained:
#
#                                  tables in the file              missing when loaded           logits
#   tied                           shared                          none                          the same
#   built untied                   all four                        none                          the same
#   untied after it was built      shared, lm_head                 encoder's and decoder's       others: both are random
#   T5, untied after it was built  shared, lm_head                 none                          the same
#
# Saving leaves out encoder's and decoder's tables, since they are one tensor with model.shared; loading ties them to it only
# where the configuration says that the *head* is tied. Nothing fails: the report of loading names the two as newly made. In
# T5 the tables follow `shared` whatever that field says.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
cd "$place"
"$place/venv/bin/python" - <<'PY' 2> errors | tee seen || { cat errors >&2; exit 1; }
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSeq2SeqLM

transformers.logging.set_verbosity_error()
WIDTHS = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (
    ("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}
BART = WIDTHS | {"d_model": 16, "vocab_size": 60, "max_position_embeddings": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
IDS = torch.tensor([[3, 4, 5]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits


def look(kind, sizes, built, later):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes, tie_word_embeddings=built == "tied"))
    if later:
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() + 1)
    folder = f"{kind}-{built}-{later}"
    model.save_pretrained(folder)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        tables = sorted(n for n in file.keys() if any(part in n for part in ("embed_tokens", "shared", "lm_head")))
    again, told = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    same = torch.equal(logits(model), logits(again))
    print(kind, built, "untied later" if later else "as built", "| saved", *tables)
    print("   missing", *(sorted(told["missing_keys"]) or ["none"]), "| same logits", same)


look("bart", BART, "tied", False)
look("bart", BART, "untied", False)
for kind in ("bart", "mbart", "m2m_100", "pegasus"):
    look(kind, BART, "tied", True)
look("t5", T5, "tied", True)
PY
diff seen - <<'SEEN'
bart tied as built | saved model.shared.weight
   missing none | same logits True
bart untied as built | saved lm_head.weight model.decoder.embed_tokens.weight model.encoder.embed_tokens.weight model.shared.weight
   missing none | same logits True
bart tied untied later | saved lm_head.weight model.shared.weight
   missing model.decoder.embed_tokens.weight model.encoder.embed_tokens.weight | same logits False
mbart tied untied later | saved lm_head.weight model.shared.weight
   missing model.decoder.embed_tokens.weight model.encoder.embed_tokens.weight | same logits False
m2m_100 tied untied later | saved lm_head.weight model.shared.weight
   missing model.decoder.embed_tokens.weight model.encoder.embed_tokens.weight | same logits False
pegasus tied untied later | saved lm_head.weight model.shared.weight
   missing model.decoder.embed_tokens.weight model.encoder.embed_tokens.weight | same logits False
t5 tied untied later | saved lm_head.weight shared.weight
   missing none | same logits True
SEEN
