"""Every cure that a message of della names is carried out by a test, which then gets a right result or
a right refusal: in tests/reports/test_cures_*.py, in a test named here, or it is told here why not."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from cures import named, source, tried

TESTS = Path(__file__).parents[1]

# Tests that carry out cures anyway.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "merging/method.py:Method.count_problem": ("merging/test_directions.py::test_how_many_models",),
    "merging/methods/spheres.py:Slerp.problems": ("merging/test_directions.py::test_t_must_be_given",),
    "merging/methods/selections.py:Nearswap.problems": ("merging/test_directions.py::test_t_must_be_given",),
    "merging/methods/spheres.py:_no_mean": (
        "merging/test_directions.py::test_weights_without_a_sum_have_no_mean",
    ),
    "planning/layers.py:Sections._check_numbers": (
        "planning/test_slices.py::test_layers_whose_kind_goes_by_their_number",
    ),
    "planning/kin.py:_misfits": (
        "planning/test_slices.py::test_tables_of_other_sizes_are_refused_with_a_cure_that_works",
        "planning/test_slices.py::test_tables_of_other_sizes_are_refused_with_a_cure_that_works",
    ),
    "planning/overall.py:check_whole_model": (
        "planning/test_slices.py::test_what_is_learnt_of_a_whole_model_is_of_the_same_models",
    ),
    "output/staging.py:Staging._make_ready": (
        "output/test_older_versions.py::test_its_staging_is_refused_and_stays",
    ),
    "output/staging.py:Staging._recover": (
        "output/test_output_place.py::test_an_old_model_put_aside_is_never_removed_by_mistake",
    ),
    "planning/tables.py:unequal": ("planning/test_token_refusals.py::test_unequal_rows_name_the_union",),
    "planning/vocabularies.py:_Follower._check_named": (
        "planning/test_token_refusals.py::test_a_recipe_file_is_told_by_its_line",
        "planning/test_token_refusals.py::test_mistakes_of_the_mapping",
    ),
    "planning/vocabularies.py:_Follower._comparable": (
        "planning/test_token_refusals.py::test_tables_of_different_sizes_in_one_model",
    ),
    "planning/vocabularies.py:_Follower._gather": (
        "planning/test_token_refusals.py::test_columns_of_tokens_cannot_follow",
    ),
    "planning/vocabularies.py:_Follower._known": (
        "planning/test_token_refusals.py::test_a_model_without_a_tokenizer",
    ),
    "planning/vocabularies.py:_Follower.all": (
        "planning/test_token_refusals.py::test_a_model_without_a_tokenizer",
    ),
    "recipe/filters.py:_layers": ("recipe/test_filters.py::test_mistakes",),
    "recipe/filters.py:read_filter": (
        "recipe/test_filters.py::test_mistakes",
        "recipe/test_filters.py::test_a_case_for_no_tensor",
    ),
    "recipe/models.py:Recipe.check_cases": ("recipe/test_filters.py::test_a_case_that_holds_for_no_tensor",),
    "evaluate/evaluation.py:_Run._missing": (
        "evaluate/test_evaluation.py::test_other_settings_and_other_problems_are_refused_or_begun_anew",
    ),
    "evaluate/generations.py:Store._other_settings": (
        "evaluate/test_generations.py::test_other_settings_are_refused_by_name_unless_it_is_begun_anew",
    ),
    "output/between.py:kept": ("running/test_documents.py::test_verify_says_what_it_cannot_do",),
    "checkpoint/layout.py:_why_no_weights": (
        "reports/test_subfolders.py::test_a_pipeline_of_diffusers_is_merged_part_by_part",
    ),
}

# What no test carries out, and why; a key for each cure.
UNTRIED: dict[str, str] = {
    "installing, the Hub or a sandbox of the system is needed": """
        checkpoint/pickles.py:_torch
        checkpoint/source.py:_hub_refusal
        checkpoint/source.py:_hub_refusal
        evaluate/alpaca.py:_not_run
        evaluate/endpoint.py:Endpoint.__init__
        evaluate/hf.py:load
        evaluate/numpy_backend.py:load
        evaluate/tokenizer.py:load_tokenizer
        evaluate/vllm_server.py:vllm_server
        sandbox/walls.py:open_sandbox
    """,
    "a file that another program writes to meanwhile: the cure is to wait": """
        checkpoint/header.py:_read_exactly
        checkpoint/weights.py:_shrank
        running/hashing.py:of_file
        running/run.py:_check_unchanged
        output/writer.py:StagedOutput._check_files
    """,
    "not yet": """
        evaluate/alpaca.py:_compared
        evaluate/alpaca.py:_result
        evaluate/alpaca.py:_run
        evaluate/endpoint.py:Endpoint._ask
        evaluate/endpoint.py:Endpoint._ask
        evaluate/endpoint.py:Endpoint._ask
        evaluate/endpoint.py:Endpoint._refused
        evaluate/evaluation.py:_Run._check_annotator
        evaluate/evaluation.py:_Run._store
        evaluate/hf.py:HfModel.answer
        evaluate/hf.py:HfScorer.sums
        evaluate/vllm_server.py:_wait
        evaluate/vllm_server.py:_wait
        experiments/bench.py:Bench.shares
        experiments/full.py:_check_settings
        experiments/full.py:_mean
        experiments/full_models.py:prepare
        experiments/small.py:run_small
        experiments/small.py:run_small
        experiments/small.py:run_small
        experiments/small_model.py:base_folder
        experiments/small_train.py:train_experts
    """,
}


def lists() -> dict[str, Counter[str]]:
    """How many cures of each function the two lists stand for."""
    elsewhere = Counter({key: len(tests) for key, tests in ELSEWHERE.items()})
    return {"elsewhere": elsewhere, "untried": Counter(" ".join(UNTRIED.values()).split())}


def test_every_cure_is_tried() -> None:
    known = sum(lists().values(), tried())
    lacking = {key: count - known[key] for key, count in named().items() if known[key] < count}
    assert not lacking, "cures that no test carries out"


def test_the_lists_are_of_today() -> None:
    found = named()
    moved = [key for key in tried() if f"def {key.split('.')[-1].split(':')[-1]}(" not in source(key)]
    assert not moved, "no such function is there"
    gone = [key for each in lists().values() for key in each if key not in found]
    assert not gone, "these functions name no cure"
    spared = tried() + lists()["elsewhere"]
    more = [key for key, count in lists()["untried"].items() if spared[key] + count > found[key]]
    assert not more, "these are tried by now"


@pytest.mark.parametrize("name", sorted({name for names in ELSEWHERE.values() for name in names}))
def test_tests_that_are_named_exist(name: str) -> None:
    path, _, test = name.partition("::")
    tree = ast.parse((TESTS / path).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
