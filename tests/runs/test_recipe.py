"""The recipe: defaults, overrides, a round trip, and errors that name the key."""

import typing

import pytest
import yaml

from prune2onnx.errors import RecipeError
from prune2onnx.pruning import FUNCTIONS, GRANULARITIES
from prune2onnx.runs.recipe import Recipe, read_recipe, resolve, settings
from prune2onnx.runs.sections import Prune


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: a.py:b\nprune: {lr: 1e-2, ramp: 0.1}\n")
    recipe = resolve(read_recipe(path), {"prune.ramp": 0.3, "seed": 4})
    assert (recipe.prune.lr, recipe.prune.ramp, recipe.seed) == (1e-2, 0.3, 4)
    assert recipe.prune.beta == Recipe(model="x").prune.beta


def test_a_recipe_written_and_read_is_the_same(tmp_path):
    recipe = resolve(
        {"model": "a.py:b", "prune": {"importance": {"conv*": 0.2}, "exclude": ["fc3"]}}
    )
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert resolve(read_recipe(path)) == recipe


def test_choices_are_those_the_project_has():
    functions = typing.get_args(Prune.model_fields["function"].annotation)
    granularities = typing.get_args(Prune.model_fields["granularity"].annotation)
    assert functions == tuple(FUNCTIONS) and granularities == tuple(GRANULARITIES)


def test_every_setting_says_what_it_means():
    assert {"model", "prune.threshold_lr", "quantize.levels"} < set(settings())
    assert all(field.description for field in settings().values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"model": "m", "prune": {"epoch": 3}},
            "unknown key 'prune.epoch'; did you mean 'prune.epochs'",
        ),
        ({"model": "m", "prun": {}}, "unknown key 'prun'; did you mean 'prune'"),
        ({"model": "m", "prune": {"lr": -1}}, "prune.lr is -1: input should be greater than 0"),
        ({"model": "m", "prune": 3}, "prune is 3"),
        ({"model": "m", "quantize": {"levels": 300}}, "quantize.levels is 300"),
        ({"model": "m", "prune": {"function": "hard"}}, "prune.function is 'hard'"),
        ({"model": "m", "start": "tune"}, "start is 'tune', which needs weights"),
        ({"model": "m", "target_size": "12 apples"}, "target_size is '12 apples'"),
        ({"model": "m", "target_density": 1.5}, "target_density is 1.5"),
        ({}, "model is missing"),
    ],
)
def test_errors_name_the_key_what_arrived_and_the_nearest(content, says):
    with pytest.raises(RecipeError) as caught:
        resolve(content, source="r.yaml")
    assert says in str(caught.value) and str(caught.value).startswith("r.yaml: ")


def test_a_section_that_is_no_mapping_cannot_be_overridden():
    with pytest.raises(RecipeError, match="prune is 3, expected a mapping"):
        resolve({"model": "m", "prune": 3}, {"prune.lr": 1.0})


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n- b\n", "a recipe is a mapping"), ("a: [1\n", "not valid YAML"), (None, "cannot read")],
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text, says):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("12KB", 12_000), ("12kB", 12_000), ("2KiB", 2048), (900, 900)]
)
def test_a_size_may_carry_a_unit(text, nbytes):
    recipe = resolve({"model": "m", "target_size": text})
    assert recipe.target_size == nbytes
    assert resolve(yaml.safe_load(recipe.to_yaml())) == recipe
