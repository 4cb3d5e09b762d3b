"""Similarity of importance maps, against ranks by scipy and means of recorded inputs."""

import pandas as pd
import pytest
import small_checkpoint
import torch
from scipy import stats

from reference import recorded
from rsparse import harness, texts
from rsparse.exhibits import generalisation, generalisation_reading
from rsparse.exhibits.generalisation import Plan, activations, overlap, spearman
from rsparse.models import KINDS, decoder_linears
from rsparse.results import Table
from rsparse.study import Sources, Study


def test_rank_correlation_is_scipys():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    b = b + 0.5 * a
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.flatten(), b.flatten()).statistic)
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)


def test_overlap_counts_the_largest():
    a = torch.arange(20.0)
    assert overlap(a, a) == 1 and overlap(a, -a) == 0
    assert overlap(a, a.roll(1)) == 0.5, "of 19 and 18, the one is in the other's top two"


def test_means_add_up_over_pieces(build, ids):
    model = build()
    linears, inputs = decoder_linears(model), recorded(model, ids)[0]
    pieces = [
        ("reference", 0, ids[3:], False), ("calibration", 1, ids[:1], False), ("calibration", 3, ids[1:3], True),
    ]  # fmt: skip
    found = activations(model, linears, pieces)
    for x in linears:
        rows = inputs[x.name].abs().view(4, 40, -1)
        for (source, count), part in {
            ("reference", 0): rows[3:], ("calibration", 1): rows[:1], ("calibration", 3): rows[:3],
        }.items():  # fmt: skip
            torch.testing.assert_close(found[source, count][x.layer, x.site], part.flatten(0, 1).mean(0))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generalisation")
    sizes = small_checkpoint.SMALL_SOURCES
    checkpoint = small_checkpoint.save(folder / "checkpoint")
    sources = Sources(str(checkpoint), "smoke", items=2, samples=2, length=sizes["length"])
    study = Study(sources, Table("generalisation", "smoke", str(folder / "results"), "cpu"))
    generalisation.measure(study, Plan([0, 1], [1, 4], ["heldout", "tasks", "random tokens"]))
    return study, study.table.frame


def test_rows_are_of_every_text_and_linear(measured):
    _, rows = measured
    named = rows[rows["source"] != ""]
    assert set(named["source"]) == {"calibration", "heldout", "tasks", "random tokens"}
    assert set(named.loc[named["source"] == "calibration", "samples"]) == {1, 4}
    for metric, control in generalisation_reading.METRICS:
        part = named[(named["metric"] == metric) & (named["control"] == control)]
        assert len(part) == 5 * 2 * len(KINDS), (metric, control)
        assert part["value"].between(-1, 1).all()
    assert len(rows[rows["control"] == "other-layer"]) == len(KINDS)


def test_a_map_is_of_all_components_of_a_small_weight(measured):
    """The row of one linear from an SVD and means of its own."""
    study, rows = measured
    linear = decoder_linears(study.dense())[1]  # k: 16 components, all of them in the map
    pieces = list(generalisation._pieces(study, Plan([0], [1, 4], [])))
    _, S, Vh = torch.linalg.svd(linear.module.weight.detach().double(), full_matrices=False)
    means = {}
    for source, count, ids, _ in pieces:
        found = recorded(study.model, ids)[0][linear.name]
        means[source, count] = found.abs().mean(0)
    weight = (S[:, None] * Vh).abs()
    want = stats.spearmanr(
        (weight * means["calibration", 1]).flatten(), (weight * means["reference", 0]).flatten()
    ).statistic
    chosen = (rows["layer"] == 0) & (rows["linear"] == "k") & (rows["source"] == "calibration") & (rows["samples"] == 1)
    own = rows[chosen].set_index(["metric", "control"])["value"]
    assert own["similarity", "real"] == pytest.approx(want, abs=1e-4)
    want = stats.spearmanr(means["calibration", 1], means["reference", 0]).statistic
    assert own["similarity_activation", "real"] == pytest.approx(want, abs=1e-4)
    assert own["similarity", "permuted-x"] < own["similarity", "real"]


def test_another_layers_map_is_the_one_before(measured):
    """The control of every kind, from an SVD of both layers and the reference's inputs."""
    study, rows = measured
    maps = {}
    linears, ids = decoder_linears(study.dense()), next(generalisation._pieces(study, Plan([0], [1, 4], [])))[2]
    inputs = recorded(study.model, ids)[0]
    for x in linears:  # of at most 64 components, all of them in the map
        _, S, Vh = torch.linalg.svd(x.module.weight.detach().double(), full_matrices=False)
        maps[x.layer, x.kind] = ((S[:, None] * Vh).abs() * inputs[x.name].abs().mean(0)).flatten()
    found = rows[rows["control"] == "other-layer"].set_index("linear")["value"]
    want = {kind: stats.spearmanr(maps[0, kind], maps[1, kind]).statistic for kind in KINDS}
    assert found.to_dict() == pytest.approx(want, abs=1e-3)
    assert max(want.values()) < 0.9, "far from what a map has with itself"


def test_no_sample_is_held_against_itself(measured):
    """The reference's windows and those of growing numbers are different windows of the calibration text."""
    study, _ = measured
    pieces = list(generalisation._pieces(study, Plan([0], [4, 1], ["heldout", "tasks", "random tokens"])))
    own = [(source, count, len(ids), goes_on) for source, count, ids, goes_on in pieces[:3]]
    assert own == [("reference", 0, 2, False), ("calibration", 1, 1, False), ("calibration", 4, 3, True)]
    windows = [tuple(window.tolist()) for _, _, ids, _ in pieces[:3] for window in ids]
    assert len(set(windows)) == 6
    assert set(windows) == set(map(tuple, texts.token_ids("tiny", "calibration", study.tokenizer, 6, 48, 0).tolist()))
    for source, count, ids, goes_on in pieces[3:]:
        assert count == 2 and not goes_on and torch.equal(ids, generalisation.source_ids(study, source))


def test_every_source_reads_its_own_text(measured, tmp_path):
    """The other text is an empty folder, of which reading fails."""
    study, _ = measured
    own = {role: texts.token_ids("tiny", role, study.tokenizer, 2, 48, 0) for role in texts.ROLES}
    assert not torch.equal(*own.values())
    for role, other in zip(texts.ROLES, reversed(texts.ROLES), strict=True):
        alone = study.sibling(**{other: f"c4:{tmp_path}"})
        assert torch.equal(generalisation.source_ids(alone, role), own[role])
    tasks = texts.windows(harness.row_texts("tiny", 2), study.tokenizer, 2, 48, 0)
    assert torch.equal(generalisation.source_ids(study, "tasks"), tasks)


def test_texts_are_what_they_are_called(measured):
    study, _ = measured
    ids = generalisation.source_ids(study, "random tokens")
    assert ids.shape == (2, 48) and len(set(ids[:, 1:].flatten().tolist())) > 60
    rows = list(harness.row_texts("tiny", 2))
    first = harness.load_tasks("tiny")["sciq"]
    assert any(str(first.doc_to_text(first.eval_docs[0])) in row for row in rows)
    text = study.tokenizer.decode(generalisation.source_ids(study, "tasks")[0, 1:20], skip_special_tokens=True)
    assert text.strip()[:10] in " ".join(rows) or text.strip()[-10:] in " ".join(rows)


def row(source: str, value: float, metric: str = "similarity", control: str = "real", samples: int = 4) -> dict:
    return {"source": source, "samples": samples, "metric": metric, "control": control, "linear": "q", "layer": 0,
            "value": value}  # fmt: skip


def test_the_reading_weighs_a_map_against_its_weight():
    rows = pd.DataFrame([
        row("calibration", 0.95), row("heldout", 0.85), row("random tokens", 0.5),
        row("calibration", 0.7, control="permuted-x"), row("heldout", 0.7, control="permuted-x"),
        row("calibration", 0.6, "similarity_activation"), row("heldout", 0.4, "similarity_activation"),
        row("", 0.1, control="other-layer"),
    ])  # fmt: skip
    said = generalisation_reading.reading(rows, "m")
    for part in ("by 0.900 at the median and 0.850 at least", "50% of the comparisons", "it is 0.700", "is 0.500 at"):
        assert part in said
    assert "at random give maps that correlate by 0.500" in generalisation_reading.control_reading(rows, "m")
    assert "another layer by 0.100" in generalisation_reading.control_reading(rows, "m")
    none = rows[~rows["source"].isin(["random tokens", ""])]
    assert "neither" in generalisation_reading.control_reading(none, "m")


def kinds(values: dict[tuple[str, int, str], list[float]], linear: str) -> list[dict]:
    """Rows of a linear, one per layer, from (source, samples, control) -> values."""
    return [row(source, value, control=control, samples=samples) | {"linear": linear, "layer": layer}
            for (source, samples, control), own in values.items() for layer, value in enumerate(own)]  # fmt: skip


ONE_KIND = {
    ("calibration", 1, "real"): [0.1, 0.1, 0.1], ("calibration", 1, "permuted-x"): [0.1, 0.1, 0.1],
    ("calibration", 4, "real"): [0.9, 0.8, 0.2], ("calibration", 4, "permuted-x"): [0.7, 0.6, 0.1],
    ("heldout", 4, "real"): [0.75, 0.5, 0.7], ("heldout", 4, "permuted-x"): [0.3, 0.4, 0.5],
}  # fmt: skip


def test_the_table_by_linear_has_every_text_with_its_shuffled_control():
    """Medians over layers; the calibration text with as many samples as the other has; another measure's rows aside."""
    higher = {key: [x + 0.05 for x in own] for key, own in ONE_KIND.items()}
    aside = row("heldout", 0.0, "similarity_activation")
    rows = pd.DataFrame([*kinds(ONE_KIND, "q"), *kinds(higher, "k"), aside])
    want = [{"linear": "q", "calibration, 4 samples": "0.8000 (0.6000)", "heldout, 4 samples": "0.7000 (0.4000)"},
            {"linear": "k", "calibration, 4 samples": "0.8500 (0.6500)", "heldout, 4 samples": "0.7500 (0.4500)"}]
    assert generalisation_reading.kinds_table(rows).to_dict("records") == want
    other = [row(None, value, control="other-layer") | {"linear": kind} for kind, value in (("q", 0.2), ("k", 0.3))]
    found = generalisation_reading.kinds_table(pd.concat([rows, pd.DataFrame(other)], ignore_index=True))
    assert found["another layer"].tolist() == [0.2, 0.3]


def test_the_table_by_linear_takes_the_nearest_number_of_calibration_samples():
    more = {("heldout", 3, control): own for (source, _, control), own in ONE_KIND.items() if source == "heldout"}
    more |= {key: own for key, own in ONE_KIND.items() if key[0] == "calibration"}
    found = generalisation_reading.kinds_table(pd.DataFrame(kinds(more, "q")))
    assert set(found) == {"linear", "calibration, 4 samples", "heldout, 3 samples"}
    alone = {key: own for key, own in more.items() if key[0] == "calibration"}
    assert set(generalisation_reading.kinds_table(pd.DataFrame(kinds(alone, "q")))) == {
        "linear", "calibration, 4 samples"
    }  # fmt: skip


def test_the_table_by_linear_of_a_run_has_all_it_measured(measured):
    found = generalisation_reading.kinds_table(measured[1])
    assert list(found["linear"]) == list(KINDS)
    texts_ = ["calibration, 1 sample", "heldout, 2 samples", "tasks, 2 samples", "random tokens, 2 samples"]
    assert list(found) == ["linear", *texts_, "another layer"]


@pytest.mark.parametrize("bad", [([], [1], []), ([0], [], []), ([0], [0], []), ([0], [1], ["novels"])])
def test_what_is_not_allowed_is_refused(bad):
    with pytest.raises(ValueError, match="expected some layers"):
        Plan(*bad)
