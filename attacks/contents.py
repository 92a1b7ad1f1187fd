"""Rows 16, 21, 22 and 25: pickles, side files, code, and models that are quantised."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attacks import INPUT, PAYLOAD, Maker, refused, survived
from attacks.files import (
    CONFIG,
    NORM,
    RECIPE_TEXT,
    WEIGHTS,
    file_of,
    model,
    put,
    same_as_undisturbed,
    tensors,
)

# ---- row 16: pickles --------------------------------------------------------------------------------------


class _Trap:
    """An object whose unpickling opens a file for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def trap(folder: Path) -> bytes:
    """A pickle that makes the payload's file."""
    return pickle.dumps({NORM: _Trap(folder / PAYLOAD)})


def zipped_trap(folder: Path) -> bytes:
    """The same as torch.save packs it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", trap(folder))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return packed.getvalue()


def pickled(name: str, *, zipped: bool, reference: str = "./math") -> Maker:
    def make(folder: Path) -> None:
        (folder / "math" / WEIGHTS).unlink()
        put(folder / "math" / name, zipped_trap(folder) if zipped else trap(folder))
        (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", reference))

    return make


HOW = ("a pickle", "run any code", "save_file")
for _suffix in ("bin", "pt", "pth", "ckpt"):
    _file = f"pytorch_model.{_suffix}"
    for _zipped in (False, True):
        refused(16, INPUT, f"FOLDER/math/{_file}", *HOW, name=f"{_suffix}{'-zipped' * _zipped}")(
            pickled(_file, zipped=_zipped)
        )
refused(16, INPUT, "FOLDER/math/x.pt", *HOW, name="the-file-itself")(
    pickled("x.pt", zipped=True, reference="./math/x.pt")
)
refused(16, INPUT, f"FOLDER/math/{WEIGHTS}", "not a safetensors file", "again", name="in-disguise")(
    pickled(WEIGHTS, zipped=False)
)
refused(16, INPUT, f"FOLDER/math/{WEIGHTS}", "not a safetensors file", "again", name="in-disguise-zipped")(
    pickled(WEIGHTS, zipped=True)
)


@refused(16, INPUT, "FOLDER/math/pytorch_model.*", *HOW)
def shards_with_an_index(folder: Path) -> None:
    pickled("pytorch_model-00001-of-00001.bin", zipped=True)(folder)
    put(
        folder / "math/pytorch_model.bin.index.json",
        {"weight_map": {NORM: "pytorch_model-00001-of-00001.bin"}},
    )


def side_files(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {WEIGHTS, "config.json", "README.md", "della.json"}


def nothing_of_it(folder: Path, out: Path) -> None:
    """The result is as without the attack, and no file came along."""
    same_as_undisturbed(folder, out)
    assert side_files(out) == set()


@survived(16, nothing_of_it)
def beside_the_weights(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl", "x.npy"):
        put(folder / "base" / name, trap(folder))
        put(folder / "math" / name, zipped_trap(folder))


# ---- row 21: side files -----------------------------------------------------------------------------------

TOKENIZER = {
    "tokenizer.json": {"model": {"vocab": {"auto_map": 0, "custom_pipelines": 1}}},
    "vocab.json": {"auto_map": 0, "x": 1},
    "tokenizer_config.json": {"model_max_length": 8},
    "generation_config.json": {"eos_token_id": 2},
}


def as_in_the_base(folder: Path, out: Path) -> None:
    same_as_undisturbed(folder, out)
    assert side_files(out) == TOKENIZER.keys()
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (folder / "base" / name).read_bytes(), name
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o7777 for path in out.iterdir()} == {0o666 & ~mask}


@survived(21, as_in_the_base)
def strange_files_and_permissions(folder: Path) -> None:
    """Only the tokenizer comes along, without its permissions; its words may be anything."""
    for name, value in TOKENIZER.items():
        put(folder / "base" / name, value)
        put(folder / "math" / name, {"of": "math"})
    strange = (
        "run.sh",
        ".bashrc",
        "x.exe",
        "notes.md",
        "Makefile",
        ".git/hooks/post-checkout",
        "x.so",
        "x.pth",
    )
    for name in strange:
        put(folder / "base" / name, b"echo")
    (folder / "base" / WEIGHTS).chmod(0o600)
    (folder / "base/tokenizer.json").chmod(0o4777)
    (folder / "base/vocab.json").chmod(0o400)


def without_references(folder: Path, out: Path) -> None:
    same_as_undisturbed(folder, out)
    for name in ("config.json", *NAMING):
        found = (out / name).read_text()
        json.loads(found)
        assert "modeling_x" not in found, name
        assert "auto_map" not in found, name
        assert "custom_pipelines" not in found, name
    assert '"model_max_length": 8' in (out / "tokenizer_config.json").read_text()


CODE: dict[str, Any] = {
    "auto_map": {
        "AutoModel": "modeling_x.Model",
        "AutoTokenizer": ["owner/name--modeling_x.Tokenizer", None],
    },
    "custom_pipelines": {"x": {"impl": "modeling_x.Pipeline", "pt": ["AutoModel"]}},
}
NAMING = (
    "tokenizer_config.json",
    "processor_config.json",
    "generation_config.json",
    "preprocessor_config.json",
)


def name_code(folder: Path, *, disguise: bool = False) -> None:
    config = {**CODE, "model_max_length": 8, "image_processor": CODE, "list": [CODE], "vision_config": CODE}
    text = json.dumps(config)
    if disguise:
        text = text.replace("auto_map", "\\u0061uto_map").replace("custom_p", "custom\\u005fp")
    for name in ("base", "math"):
        put(folder / name / "config.json", json.dumps(CONFIG | config).encode())
        for file in NAMING:
            put(folder / name / file, text.encode())


@survived(21, without_references)
def names_of_code(folder: Path) -> None:
    """Every file that may name code does, at every depth."""
    name_code(folder)


@survived(21, without_references)
def names_of_code_in_disguise(folder: Path) -> None:
    name_code(folder, disguise=True)


@refused(21, INPUT, "FOLDER/base/tokenizer_config.json", "10,000,000 is the most")
def names_of_code_behind_megabytes(folder: Path) -> None:
    put(folder / "base/tokenizer_config.json", {"filling": "x" * 10_000_000, **CODE})


# ---- row 22: remote code ----------------------------------------------------------------------------------

PAYLOAD_CODE = f"from pathlib import Path\n(Path({{folder!r}}) / {PAYLOAD!r}).touch()\n"
TEMPLATE = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Quitter' %}"
    "{{ c.__init__.__globals__['__builtins__']['open']('" + PAYLOAD + "', 'w') }}{% endif %}{% endfor %}"
)
MODULES = ("modeling_x", "tokenization_x", "configuration_x", "handler", "setup", "conftest", "__init__")


def nothing_ran_nothing_copied(folder: Path, out: Path) -> None:
    """That the payload's file is not there is looked at after every attack."""
    same_as_undisturbed(folder, out)
    assert not [path for path in out.rglob("*") if path.suffix in (".py", ".pyc", ".pth", ".so")]
    assert "modeling_x" not in (out / "config.json").read_text()


def plant(folder: Path, *modules: str) -> None:
    for name in modules:
        put(folder / f"{name}.py", PAYLOAD_CODE.format(folder=str(folder)).encode())


@survived(22, nothing_ran_nothing_copied)
def auto_map_and_its_module(folder: Path) -> None:
    for name in ("base", "math"):
        put(folder / name / "config.json", {**CONFIG, **CODE, "trust_remote_code": True})
        put(folder / name / "tokenizer_config.json", {**CODE, "trust_remote_code": True})
        for module in MODULES:
            put(folder / name / f"{module}.py", PAYLOAD_CODE.format(folder=str(folder)).encode())
        put(folder / name / "custom_generate/generate.py", PAYLOAD_CODE.format(folder=str(folder)).encode())


@survived(22, nothing_ran_nothing_copied)
def a_chat_template_that_runs_code(folder: Path) -> None:
    for name in ("base", "math"):
        put(folder / name / "tokenizer_config.json", {"chat_template": TEMPLATE})
        put(folder / name / "chat_template.jinja", TEMPLATE.encode())
        put(folder / name / "chat_template.json", {"chat_template": TEMPLATE})


@survived(22, nothing_ran_nothing_copied)
def modules_of_well_known_names(folder: Path) -> None:
    """In the folder where the command is called: nothing is imported from there."""
    plant(
        folder, "numpy", "yaml", "torch", "typer", "rich", "numba", "xxhash", "sitecustomize", "json", "della"
    )


@refused(22, INPUT, "math", "model_type", "mismatch: ignore")
def a_model_type_that_nobody_knows(folder: Path) -> None:
    for name in ("base", "math"):
        config = {"model_type": "x", "architectures": ["XForCausalLM"], "_class_name": ["modeling_x", "X"]}
        put(folder / name / "config.json", {**config, "model_type": "../../x"} if name == "math" else CONFIG)


# ---- row 25: quantised ------------------------------------------------------------------------------------

INSTEAD = "give the unquantised model"
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "hqq": "(?i)hqq",
    "aqlm": "(?i)aqlm",
    "torchao": "torchao",
    "one-of-tomorrow": "one-of-tomorrow",
}


def configured(config: Mapping[str, Any]) -> Maker:
    def make(folder: Path) -> None:
        put(folder / "math/config.json", {**CONFIG, **config})

    return make


for _method, _says in METHODS.items():
    refused(25, INPUT, "FOLDER/math", _says, "quantization_config", INSTEAD, name=f"configured-{_method}")(
        configured({"quantization_config": {"quant_method": _method, "bits": 4}})
    )
refused(25, INPUT, "FOLDER/math", "AWQ", INSTEAD, name="a-part-of-the-model-configured-awq")(
    configured({"text_config": {"quantization_config": {"quant_method": "awq"}}})
)
refused(25, INPUT, "FOLDER/math", INSTEAD, name="configured-mlx")(
    configured({"quantization": {"group_size": 64, "bits": 4}})
)
refused(25, INPUT, "FOLDER/math", INSTEAD, name="configured-with-a-list")(
    configured({"quantization_config": ["gptq"]})
)

LINEAR = "model.layers.0.mlp.up_proj"
PACKED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16, ".g_idx": np.int32}, "GPTQ"),
    "awq": ({".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16}, "AWQ"),
    "nf4": (
        {".weight": np.uint8, ".weight.absmax": np.uint8, ".weight.quant_state.bitsandbytes__nf4": np.uint8},
        "bitsandbytes 4-bit",
    ),
    "fp4": ({".weight": np.uint8, ".weight.quant_state.bitsandbytes__fp4": np.uint8}, "bitsandbytes 4-bit"),
    "int8": ({".weight": np.int8, ".SCB": np.float32}, "bitsandbytes 8-bit"),
    "fp8": ({".weight": np.uint8, ".weight_scale_inv": np.float32}, "FP8"),
    "mxfp4": ({"_blocks": np.uint8, "_scales": np.uint8}, "MXFP4"),
    "compressed-tensors": ({".weight_packed": np.int32, ".weight_scale": np.float16}, "compressed-tensors"),
    "mlx": ({".weight": np.uint32, ".scales": np.float16, ".biases": np.float16}, "MLX"),
    "hqq": ({".W_q": np.uint8, ".scale": np.float16}, "HQQ"),
}


def packed(suffixes: Mapping[str, Any]) -> Maker:
    """Only the tensors tell: the configuration says nothing."""

    def make(folder: Path) -> None:
        named = tensors(1)
        del named[f"{LINEAR}.weight"]
        model(folder / "math", named | {LINEAR + s: np.zeros((2, 4), kind) for s, kind in suffixes.items()})

    return make


for _method, (_suffixes, _says) in PACKED.items():
    refused(25, INPUT, "FOLDER/math", LINEAR, _says, INSTEAD, name=f"packed-{_method}")(packed(_suffixes))


@refused(25, INPUT, "FOLDER/math", "GGUF", "give the safetensors model")
def only_gguf(folder: Path) -> None:
    (folder / "math" / WEIGHTS).unlink()
    put(folder / "math/model.Q4_K_M.gguf", b"GGUF\x03\0\0\0")


@refused(25, INPUT, "FOLDER/base", "GPTQ", INSTEAD)
def the_base_too(folder: Path) -> None:
    put(folder / "base/config.json", CONFIG | {"quantization_config": {"quant_method": "gptq"}})
    put(folder / "base" / WEIGHTS, file_of(tensors(0)))
