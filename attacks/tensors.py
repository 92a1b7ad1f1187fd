"""Rows 6 to 10: numbers that are none, shapes, tensors that are missing or too many, ties, dtypes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

import della
from attacks import INPUT, OUTPUT, refused, survived
from attacks.files import (
    EMBED,
    HEAD,
    NORM,
    RECIPE_TEXT,
    WEIGHTS,
    changed,
    merged,
    model,
    read,
    same_as_undisturbed,
    stored_dtypes,
    tensors,
)

LAYER = "model.layers.{}.mlp.up_proj.weight"

# ---- row 6: NaN and infinity ------------------------------------------------------------------------------

COUNTED = (NORM, r"\b37\b", r"\b117\b")  # the tensor, how many, the first


@refused(6, INPUT, "FOLDER/math|./math", "NaN|nan", *COUNTED)
def nan_in_an_expert(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM][117:154] = np.nan


@refused(6, INPUT, "FOLDER/base|./base", "NaN|nan", *COUNTED)
def nan_in_the_base(folder: Path) -> None:
    with changed(folder / "base") as named:
        named[NORM][117:154] = np.nan


@refused(6, INPUT, "FOLDER/code|./code", "inf", *COUNTED)
def infinities_of_both_signs(folder: Path) -> None:
    with changed(folder / "code") as named:
        named[NORM][117:154] = np.inf
        named[NORM][153] = -np.inf


@refused(6, INPUT, "FOLDER/math|./math", NORM, r"\b1\b", r"\b199\b")
def nan_in_the_last_place(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM][199] = np.nan


@refused(6, INPUT, "FOLDER/math|./math", *COUNTED)
def nan_in_half_precision(folder: Path) -> None:
    for seed, name in enumerate(("base", "math", "code")):
        named = tensors(seed, ml_dtypes.bfloat16)
        if name == "math":
            named[NORM][117:154] = -np.nan
        model(folder / name, named)


@refused(6, INPUT, "FOLDER/math|./math", *COUNTED)
def nan_where_the_weight_is_zero(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM][117:154] = np.nan
    (folder / "recipe.yml").write_text(
        RECIPE_TEXT.replace("0.5", f"[{{filter: {NORM}, value: 0}}, {{value: 0.5}}]", 1)
    )


@refused(6, OUTPUT, NORM, "inf", r"\b117\b", "float16", "out_dtype|dtype")
def too_large_for_float16(folder: Path) -> None:
    for name in ("base", "math", "code"):
        with changed(folder / name) as named:
            named[NORM][117:154] = 70_000
    (folder / "recipe.yml").write_text(RECIPE_TEXT + "dtype: float16\n")


@refused(6, OUTPUT, NORM, "inf|nan", r"\b117\b")
def a_difference_too_large_for_float32(folder: Path) -> None:
    for name, value in (("base", -3e38), ("math", 3e38), ("code", 3e38)):
        with changed(folder / name) as named:
            named[NORM][117:154] = value


# ---- row 7: shapes ----------------------------------------------------------------------------------------


@refused(7, INPUT, "math", EMBED, r"\[8, 10\]", r"\[10, 8\]")
def transposed(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[EMBED] = np.ascontiguousarray(named[EMBED].T)


@refused(7, INPUT, "math", NORM, r"\[1, 200\]", r"\[200\]")
def an_axis_more(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM] = named[NORM].reshape(1, 200)


@refused(7, INPUT, "math", NORM, r"\[1\]", r"\[200\]")
def one_number_that_would_be_repeated(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM] = named[NORM][:1]


@refused(7, INPUT, "math", NORM, r"\[0\]", r"\[200\]")
def no_numbers(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM] = named[NORM][:0]


@refused(7, INPUT, "code", EMBED, HEAD, r"\[12, 8\]", r"\[10, 8\]", "vocabulary")
def rows_added_to_the_vocabulary(folder: Path) -> None:
    with changed(folder / "code") as named:
        for name in (EMBED, HEAD):
            named[name] = np.concatenate([named[name], named[name][:2]])


@refused(7, INPUT, "math", "code", r"\[199\]", r"\[200\]", r"\[6, 7\]", r"\[6, 8\]")
def in_both_experts(folder: Path) -> None:
    """All of it is told at once."""
    with changed(folder / "math") as named:
        named[NORM] = named[NORM][:199]
    with changed(folder / "code") as named:
        named[LAYER.format(3)] = np.ascontiguousarray(named[LAYER.format(3)][:, :7])


# ---- row 8: missing and extra tensors ---------------------------------------------------------------------


@refused(8, INPUT, "math", NORM)
def a_tensor_missing(folder: Path) -> None:
    with changed(folder / "math") as named:
        del named[NORM]


@refused(8, INPUT, "math", LAYER.format(4), "code", NORM)
def missing_in_both_experts(folder: Path) -> None:
    with changed(folder / "math") as named:
        del named[LAYER.format(4)]
    with changed(folder / "code") as named:
        del named[NORM]


@refused(8, INPUT, "math", "extra-0")
def a_tensor_more(folder: Path) -> None:
    with changed(folder / "math") as named:
        named["extra-0"] = np.zeros(3, np.float32)


@refused(8, INPUT, "math", *(f"extra-{n}" for n in range(5)), "code", "another")
def five_tensors_more_and_one(folder: Path) -> None:
    with changed(folder / "math") as named:
        named |= {f"extra-{n}": np.zeros(3, np.float32) for n in range(5)}
    with changed(folder / "code") as named:
        named["another"] = np.zeros(3, np.float32)


@refused(8, INPUT, "math", NORM)
def a_name_in_other_case(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM.title()] = named.pop(NORM)


@refused(8, INPUT, "math", EMBED)
def names_with_a_prefix(folder: Path) -> None:
    with changed(folder / "math") as named:
        for name in list(named):
            named[f"_orig_mod.{name}"] = named[f"module.{name}"] = named.pop(name)


# ---- row 9: tied embeddings -------------------------------------------------------------------------------


@refused(9, INPUT, "code", HEAD, "untie|tie", "tie_word_embeddings", "missing: base")
def an_expert_tied_and_the_base_not(folder: Path) -> None:
    with changed(folder / "code", tie_word_embeddings=True) as named:
        del named[HEAD]


def no_head(folder: Path, out: Path) -> None:
    """The head is stored once, as in the base: as the embeddings."""
    found, wanted = read(out / WEIGHTS), merged(folder)
    del wanted[HEAD]
    assert found.keys() == wanted.keys()
    assert np.allclose(found[EMBED], wanted[EMBED], rtol=0, atol=1e-5)


@survived(9, no_head)
def all_tied(folder: Path) -> None:
    for name in ("base", "math", "code"):
        with changed(folder / name, tie_word_embeddings=True) as named:
            del named[HEAD]


@survived(9, no_head)
def a_redundant_head(folder: Path) -> None:
    """An expert whose configuration ties the head stores it all the same."""
    for name in ("base", "math", "code"):
        with changed(folder / name, tie_word_embeddings=True) as named:
            del named[HEAD]
            if name == "code":
                named[HEAD] = named[EMBED]


# ---- row 10: dtypes ---------------------------------------------------------------------------------------


def told_and_stored(folder: Path, out: Path, name: str) -> None:
    assert stored_dtypes(out / WEIGHTS) == {name}
    with della.plan(folder / "recipe.yml") as plan:
        assert any("float32" in note and "math" in note for note in plan.notes)


def as_the_base_says(folder: Path, out: Path) -> None:
    told_and_stored(folder, out, "BF16")


def as_the_recipe_says(folder: Path, out: Path) -> None:
    told_and_stored(folder, out, "F16")


@survived(10, as_the_base_says)
def experts_wider_than_the_base(folder: Path) -> None:
    model(folder / "base", tensors(0, ml_dtypes.bfloat16))


@survived(10, as_the_recipe_says)
def another_dtype_by_the_recipe(folder: Path) -> None:
    model(folder / "base", tensors(0, ml_dtypes.bfloat16))
    (folder / "recipe.yml").write_text(RECIPE_TEXT + "dtype: float16\n")


def in_double(folder: Path, out: Path) -> None:
    assert stored_dtypes(out / WEIGHTS) == {"F32"}
    same_as_undisturbed(folder, out)


@survived(10, in_double)
def an_expert_of_doubles(folder: Path) -> None:
    model(folder / "code", {name: values.astype(np.float64) for name, values in tensors(2).items()})


@refused(10, INPUT, "math", NORM, "I32", "F32")
def whole_numbers_for_fractions(folder: Path) -> None:
    with changed(folder / "math") as named:
        named[NORM] = named[NORM].astype(np.int32)
