#!/usr/bin/env bash
# Whether a left-over special_tokens_map.json decides a tokenizer's end token hangs on an unrelated key.
#
# transformers 5.24.0, tokenizers 0.23.3, Python 3.11, Linux x86-64; seen on 2026-12-01.
#
# transformers 5 writes tokenizer.json and tokenizer_config.json alone; special_tokens_map.json is of older versions.
# A folder whose tokenizer_config.json says eos_token </s>, with an old special_tokens_map.json beside it that says
# <|im_end|>, as merges that copy side files of several models have it:
#
#                                                   eos_token when loaded   in tokenizer_config.json once saved again
#   no special_tokens_map.json                      </s>                    </s>
#   with it                                         <|im_end|>              <|im_end|>
#   with it, and an added_tokens_decoder in the     </s>                    </s>
#   tokenizer_config.json
#
# So the old file wins over the new one, and saving writes it into the new one for good, unless the new one has a
# table of added tokens, which transformers 5 itself no longer writes for such tokenizers.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.24.0 tokenizers==0.23.3
cd "$place"
"$place/venv/bin/python" - <<'PY' 2> errors | tee seen || { cat errors >&2; exit 1; }
import json
from pathlib import Path

from transformers import AutoTokenizer

WORDS = ["<unk>", "</s>", "<|im_end|>", "a", "b"]
TOKENIZER = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(WORDS)}, "unk_token": "<unk>"},
}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
OLD = {"eos_token": "<|im_end|>", "unk_token": "<unk>"}
PLAIN = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
TABLE = {"added_tokens_decoder": {"1": {"content": "</s>", "special": True, **PLAIN}}}


def look(name, **files):
    folder = Path(name)
    folder.mkdir()
    for file, content in {"tokenizer": TOKENIZER, "tokenizer_config": CONFIG, **files}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(folder / "saved")
    written = json.loads((folder / "saved/tokenizer_config.json").read_text())["eos_token"]
    print(name, loaded.eos_token, loaded.eos_token_id, written)


look("alone")
look("with-the-old", special_tokens_map=OLD)
look("with-a-table", special_tokens_map=OLD, tokenizer_config=CONFIG | TABLE)
PY
diff seen - <<'SEEN'
alone </s> 1 </s>
with-the-old <|im_end|> 2 <|im_end|>
with-a-table </s> 1 </s>
SEEN
