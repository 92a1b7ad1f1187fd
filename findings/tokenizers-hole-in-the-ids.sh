#!/usr/bin/env bash
# A hole in a vocabulary's ids gives an added token the id of an ordinary token; a hole before an added token's id moves it.
#
# tokenizers 0.23.3, transformers 5.24.0, Python 3.11, Linux x86-64; seen on 2026-12-01.
#
# A tokenizer.json of the words <unk> 0, a 1, b 2 and z, and an added token </s>, as an edited or merged vocabulary has it:
#
#     in the file                                 once loaded           "z </s>"      decode [4]
#     z 3, </s> 4                                 as in the file        [3, 4]        </s>
#     z 3, </s> 9 (rows 4-8 of the table spare)   </s> is 4, not 9      [3, 4]        </s>
#     z 4, no added token (no word has id 3)      as in the file        [4, 0]        z
#     z 4, </s> 5                                 </s> is 4, as z is    [4, 4]        </s>
#     z 4, </s> added later by add_tokens         </s> is 4, as z is    [4, 4]        </s>
#
# The library numbers added tokens on from the *count* of words and does not look at what the file says. So with one hole two
# tokens use one row of the model and z can no longer be decoded. The same in WordLevel, BPE and WordPiece and through
# AutoTokenizer; nothing is reported, and saving writes the new ids.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cd "$place"
"$place/venv/bin/python" - <<'PY' 2> errors | tee seen || { cat errors >&2; exit 1; }
import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

MODELS = {"WordLevel": {}, "BPE": {"merges": []}, "WordPiece": {"max_input_chars_per_word": 9, "continuing_subword_prefix": "##"}}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)


def document(kind, z, end):
    added = [] if end is None else [{"id": end, "content": "</s>", "special": True, **FLAGS}]
    vocab = {"<unk>": 0, "a": 1, "b": 2, "z": z}
    return {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": kind, "vocab": vocab, "unk_token": "<unk>", **MODELS[kind]},
    }


def look(kind, z, end, later=False):
    tokenizer = Tokenizer.from_str(json.dumps(document(kind, z, end)))
    if later:
        assert tokenizer.add_tokens(["</s>"]) == 1
    ids = tokenizer.token_to_id("z"), tokenizer.token_to_id("</s>")
    saved = [entry["id"] for entry in json.loads(tokenizer.to_str())["added_tokens"]]
    decoded = tokenizer.decode([4], skip_special_tokens=False)
    return f"z {ids[0]} </s> {ids[1]} | {tokenizer.encode('z </s>').ids} | {decoded} | saved {saved}"


for z, end, later in ((3, 4, False), (3, 9, False), (4, None, False), (4, 5, False), (4, None, True)):
    found = {look(kind, z, end, later) for kind in (MODELS if end or later else ["WordLevel"])}
    print(f"file: z {z} </s> {end}{' added later' if later else ''} ->", *found)
for z, end in ((3, 9), (4, 5)):
    folder = Path(f"auto{z}")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(document("WordLevel", z, end)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    auto = AutoTokenizer.from_pretrained(folder)
    print(f"AutoTokenizer: z {z} </s> {end} ->", auto("z </s>")["input_ids"], "eos", auto.eos_token_id)
PY
diff seen - <<'SEEN'
file: z 3 </s> 4 -> z 3 </s> 4 | [3, 4] | </s> | saved [4]
file: z 3 </s> 9 -> z 3 </s> 4 | [3, 4] | </s> | saved [4]
file: z 4 </s> None -> z 4 </s> None | [4, 0] | z | saved []
file: z 4 </s> 5 -> z 4 </s> 4 | [4, 4] | </s> | saved [4]
file: z 4 </s> None added later -> z 4 </s> 4 | [4, 4] | </s> | saved [4]
AutoTokenizer: z 3 </s> 9 -> [3, 4] eos 4
AutoTokenizer: z 4 </s> 5 -> [4, 4] eos 4
SEEN
