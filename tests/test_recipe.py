"""Recipes: what is asked of every linear, on disk and in memory."""

import json
from pathlib import Path

import pytest

from rsparse import Recipe
from rsparse.models import decoder_linears
from rsparse.recipe import DENSE, Ask


@pytest.fixture
def model(build):
    return build()


def test_uniform(model):
    recipe = Recipe.uniform(model, 0.5, 0.9, score="column-norm", threshold="per-token")
    assert list(recipe.linears) == [x.name for x in decoder_linears(model)]
    assert set(recipe.linears.values()) == {Ask(0.5, 0.9, "column-norm", "per-token")}
    assert Recipe.uniform(model, 0.5, 1.0).linears["model.layers.1.mlp.down_proj"] == Ask(
        0.5, 1.0, "magnitude", "static"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0,), "sparsity is 1.0"), ((float("nan"),), "sparsity is nan"), ((True,), "sparsity is True"),
        ((0.5, 1.5), "rho is 1.5"), ((0.5, -0.1), "rho is -0.1"),
        ((0.5, 0.5, "norm"), "score is 'norm'; expected one of 'magnitude', 'column-norm'"),
        ((0.5, 0.5, "magnitude", "topk"), "threshold is 'topk'; expected one of 'static'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(values, message):
    with pytest.raises(ValueError, match=message):
        Ask(*values)


def test_save_and_load(model, tmp_path):
    recipe = Recipe.uniform(model, 0.3, 0.95)
    recipe.linears["model.layers.0.mlp.up_proj"] = Ask(0.7, 0.1, "column-norm", "per-token")
    recipe.save(tmp_path / "deep" / "recipe.json")
    assert Recipe.load(tmp_path / "deep" / "recipe.json") == recipe
    assert Recipe.load(str(tmp_path / "deep" / "recipe.json")).origin == {"sparsity": 0.3, "rho": 0.95}


def broken(change):
    def apply(raw: dict) -> str:
        change(raw)
        return json.dumps(raw)

    return apply


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda raw: "{", "is not JSON"),
        (lambda raw: "[]", r"is not a recipe: at \$,"),
        (broken(lambda r: r.pop("model")), "'model' is a required property"),
        (broken(lambda r: r.update(model="xyz")), r"at \$.model"),
        (broken(lambda r: r.update(format="2")), r"at \$.format"),
        (broken(lambda r: r.update(extra=1)), "'extra' was unexpected"),
        (broken(lambda r: r.update(linears={})), r"at \$.linears"),
        (broken(lambda r: r["linears"][FIRST].update(sparsity=1)), "sparsity"),
        (broken(lambda r: r["linears"][FIRST].update(sparsity=True)), "sparsity"),
        (broken(lambda r: r["linears"][FIRST].update(sparsity=float("nan"))), "sparsity is nan"),
        (broken(lambda r: r["linears"][FIRST].update(rho=1.01)), "rho"),
        (broken(lambda r: r["linears"][FIRST].update(score="l2")), "'l2' is not one of"),
        (broken(lambda r: r["linears"][FIRST].pop("threshold")), "'threshold' is a required property"),
        (broken(lambda r: r["linears"][FIRST].update(rank=3)), "'rank' was unexpected"),
    ],
)
def test_files_that_are_no_recipes(model, tmp_path, text, message):
    path = tmp_path / "recipe.json"
    Recipe.uniform(model, 0.5, 0.95).save(path)
    path.write_text(text(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert len(str(error.value)) < 400


def test_for_another_model(build, model):
    recipe = Recipe.uniform(build(seed=1), 0.5, 0.95)
    with pytest.raises(
        ValueError, match="'uniform-0.95' is for the model with fingerprint [0-9a-f]{16}; this one has"
    ):
        recipe.check(model)
    recipe = Recipe.uniform(model, 0.5, 0.95)
    recipe.check(model)
    del recipe.linears[FIRST]
    with pytest.raises(ValueError, match=f"{FIRST!r} is on one side only"):
        recipe.check(model)


def test_within_a_scope(model):
    recipe = Recipe.uniform(model, 0.5, 0.95).within(("gate", "up", "down"))
    for name, ask in recipe.linears.items():
        assert ask == (Ask(0.5, 0.95) if ".mlp." in name else DENSE)
    whole = Recipe.uniform(model, 0.5, 0.95)
    assert whole.within(("q", "k", "v", "o", "gate", "up", "down")) == whole


class TestAuthorsList:
    def write(self, folder: Path, values: list) -> Path:
        path = folder / "made-up_search.npy"
        path.write_text("".join(f"{v:.6f}\n" for v in values))
        return path

    def test_pairs_of_rho_and_sparsity_by_layer(self, model, tmp_path):
        rhos = [1.0 if i % 3 else i / 20 for i in range(14)]
        sparsities = [(50 + i) / 100 for i in range(14)]
        path = self.write(tmp_path, [v for pair in zip(rhos, sparsities, strict=True) for v in pair])
        recipe = Recipe.from_rsparse_list(path, model)
        recipe.check(model)
        for i, ask in enumerate(recipe.linears.values()):  # their code masks by |x| only where rho is 1
            assert ask == Ask(sparsities[i], rhos[i], "magnitude" if rhos[i] == 1 else "column-norm")
        assert recipe.name == "made-up_search" and recipe.origin == {"source": "made-up_search.npy"}
        assert list(recipe.linears)[7:9] == [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj",
        ]

    @pytest.mark.parametrize("form", ["{:.18e}\n", "{} ", "{:g}, ", "[{}]"])
    def test_other_ways_to_write_numbers(self, model, tmp_path, form):
        path = tmp_path / "list.txt"
        path.write_text("".join(form.format(v) for v in [0.25, 0.5] * 14))
        assert set(Recipe.from_rsparse_list(path, model).linears.values()) == {Ask(0.5, 0.25, "column-norm")}

    @pytest.mark.parametrize("count", [0, 27, 30, 448])
    def test_another_number_of_linears(self, model, tmp_path, count):
        with pytest.raises(ValueError, match=f"holds {count} numbers; expected 28, rho and sparsity"):
            Recipe.from_rsparse_list(self.write(tmp_path, [0.5] * count), model)

    def test_numbers_out_of_range(self, model, tmp_path):
        with pytest.raises(ValueError, match="rho is 1.5"):
            Recipe.from_rsparse_list(self.write(tmp_path, [1.5, 0.5] * 14), model)
