"""Reports: facts that are checked, one list of sections, three media that render it."""

import html.parser
import json
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from moe_jax.environment import environment, peak_memory_mib
from moe_jax.report import (
    check_report,
    importance_curve,
    model_card,
    plain,
    plot_bits_per_byte,
    plot_experts,
    plot_kl,
    plot_neuron_importance,
    plot_routing_by_domain,
    plot_scores,
    plot_stages,
    plot_training,
    read_report,
    report_html,
    stage_points,
    summary_table,
    write_report,
)
from moe_jax.report import elements as parts
from moe_jax.report.figures.confidence import plot_confidence
from moe_jax.report.figures.quality import shown_parts, thin, training_caption
from moe_jax.report.figures.theme import DARK, LIGHT, page_colors
from moe_jax.report.html import document_html
from moe_jax.report.markdown import document_markdown, without_folders
from moe_jax.report.points import domain_point_rows, point_rows, stage_title
from moe_jax.report.sections import document
from moe_jax.report.stage_sections import experts_named, training_sentences, unreached_ids

HOSTILE = "$\\frac{$<script>alert(1)</script>|`x`**[a](http://evil.example)\"'\n---\nlicense: mit"


def evaluation(bits, kl=None, name="books"):
    domain = {
        "tokens": 100,
        "bytes": 300,
        "nll": 2.0,
        "perplexity": 7.39,
        "bits_per_byte": bits,
        "kl": kl,
        "top1_agreement": None if kl is None else 0.9,
    }
    domains = {name: domain, "code_python": domain | {"bits_per_byte": bits + 0.5}}
    return {
        "domains": domains,
        "total": domain,
        "mean": domain,
        "tokens_per_second": 4321.0,
        "seq_len": 64,
        "batch_size": 2,
    }


def layers(num_layers=2, num_experts=8):
    rng = np.random.default_rng(0)
    made = []
    for i in range(num_layers):
        count = rng.integers(1, 100, num_experts)
        count[3] = 0
        variance = rng.uniform(0.5, 2, num_experts)
        made.append(
            {
                "layer": i,
                "num_experts": num_experts,
                "count": count,
                "routing_mass": 0.3 * count,
                "variance": variance,
                "score": np.sqrt(variance) * count,
                "removed": [5] if i else [],
                "novices": [3, 4],
                "expert_width": (6, 4),
                "kv_groups": (8, 4),
                "unreached": [3],
                "fewer_tokens_than_neurons": [2, 3, 4],
                "frequency": {
                    "books": rng.dirichlet(np.ones(num_experts)),
                    "code_python": rng.dirichlet(np.ones(num_experts)),
                },
                "importance": importance_curve(rng.gamma(1, 1, (num_experts, 6)), 4),
            }
        )
    return made


def training(records=3, tokens=2048, text="text"):
    metrics = [
        {"step": 10 * (n + 1), "loss": 2 / (n + 1), "distill": 1 / (n + 1), "lm": 3.0 - 1e-4 * n}
        for n in range(records)
    ]
    return {
        "settings": {"loss": "kd_full", "learning_rate": 1e-3, text: text},
        "steps": 10 * records,
        "tokens": tokens,
        "tokens_per_second": 987.6,
        "metrics": metrics,
    }


def confidence(text="text", num_layers=2):
    coverage = {
        "floor": 100,
        "tokens": 8000,
        "experts": 16,
        "num_few": 120,
        "few": [[0, e, 3] for e in range(100)],
        "edges": np.geomspace(3, 4000, 21),
        "histogram": np.arange(20),
        "busiest": [1, 7, 0.5],
        "uniform": 0.25,
    }
    convergence = {
        "shares": [0.25, 0.5, 1.0],
        "layers": list(range(num_layers)),
        "kept": [6] * num_layers,
        "common": [[0.75] * num_layers, [0.875, *[1.0] * (num_layers - 1)], [1.0] * num_layers],
        "rank_correlation": [[0.9] * num_layers] * 3,
    }
    unsure = {
        "probability": 0.1,
        "resamples": 200,
        "degrees": 7,
        "number": 21,
        "experts": [[1, 3, False, 0.5], *[[0, e, True, 0.25] for e in range(19)]],
    }
    told = {"coverage": coverage, "convergence": convergence, "unsure": unsure}
    return {"verdict": f"verdict {text}"} | told


def trained_stages(num_stages=2, text="text"):
    """Each cuts and trains; how well the last does is the report's ``after``."""
    books = text if text == HOSTILE else "books"
    made = []
    for n in range(num_stages):
        kept = {"method": f"slim {text}", "settings": {text: text}, "kept": text}
        measured = {
            "cut": evaluation(1.4 + n, kl=0.5 + n, name=books),
            "trained": evaluation(1.2 + n, kl=0.25 + n, name=books),
        }
        stage = kept | {"layers": layers(), "training": training(text=text)}
        stage["confidence"] = confidence(text)
        made.append(stage | {"evaluation": measured})
    del made[-1]["evaluation"]["trained"]
    return made


def full_report(text="text"):
    books = text if text == HOSTILE else "books"
    return {
        "name": f"name {text}",
        "source": {"path": f"/models/{text}", "family": "olmoe", "id": "a/b", "license": text},
        "output": {"path": f"out/{text}", "dtype": "bfloat16"},
        "command": f"python -m moe_jax.compress {text}",
        "environment": environment() | {"note": text},
        "seed": 7,
        "config": {"model": text, "stages": ({"method": "mone"},)},
        "data": {text: {text: "ab" * 32}, "evaluation": {"books": "cd" * 32}},
        "seconds": {"calibrate": 12.0, text: 3.5},
        "peak_memory_mib": peak_memory_mib(),
        "before": {
            "parameters": {"total": 1_200_000, "active": 500_000, "experts": 900_000},
            "bytes": 2_400_000,
            "evaluation": evaluation(1.0, name=books),
        },
        "after": {
            "parameters": {"total": 900_000, "active": 500_000, "experts": 600_000},
            "bytes": 1_800_000,
            "evaluation": evaluation(1.1, kl=0.0625, name=books),
        },
        "stages": [
            {"method": f"mone {text}", "settings": {text: text}, "kept": text, "layers": layers()},
            *trained_stages(text=text),
        ],
        "loader": {"trust_remote_code": True, "notes": [text]},
        "warnings": [f"warning {text}"],
    }


def test_round_trip(tmp_path):
    report = full_report()
    report["stages"] = report["stages"][:1]
    report["stages"][0]["layers"] = []
    paths = write_report(report, tmp_path / "run", card_folder=tmp_path / "checkpoint")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"report.json", "report.html"}
    assert paths["card"] == tmp_path / "checkpoint" / "README.md"
    assert read_report(tmp_path / "run") == read_report(paths["json"]) == plain(report)
    assert paths["html"].read_text() == report_html(plain(report))
    assert paths["card"].read_text() == model_card(plain(report))


def render(report):
    """Everything but the drawings of figures: what each medium says."""
    told = document(report)
    assert not [warning for warning in told.warnings if "left out" in warning]
    return model_card(report), summary_table(report), told


def words(told, medium="page"):
    """All text of a document in one medium."""
    shown = [(section.title, section.shown(medium)) for section in told.sections]
    return "\n".join(f"{title}\n{vars(e)}" for title, content in shown for e in content)


@pytest.mark.parametrize("key", full_report().keys())
def test_every_section_is_optional(key):
    for report in ({key: full_report()[key]}, {k: v for k, v in full_report().items() if k != key}):
        report = plain(report)
        check_report(report)
        card, _, _ = render(report)
        assert card.startswith("---\n")


def test_empty_report():
    assert summary_table({}) == ""
    assert "<h2>" not in report_html({})
    assert "##" not in model_card({})


def test_one_model_without_the_other():
    card, summary, _ = render(plain({"before": full_report()["before"]}))
    assert "1,200,000" in summary
    assert "1,200,000" in card


class Resources(html.parser.HTMLParser):
    """Collects tags, attributes that load something, and visible text."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded, self.text = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        loading = ("src", "srcset", "href", "data", "action")
        self.loaded += [value for key, value in attrs if key in loading]
        self.tags |= {key for key, _ in attrs if key.startswith("on")}

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Resources()
    parser.feed(page)
    return parser


def drawn_report():
    """A full report, in which the figures of one stage's experts stand for those of all."""
    report = full_report()
    for stage in report["stages"][:-1]:
        stage["layers"] = []
    return report


@pytest.fixture(scope="module")
def page():
    return report_html(plain(drawn_report()))


def test_page_is_self_contained(page):
    found = parsed(page)
    assert found.loaded
    assert all(value.startswith("data:image/svg+xml;base64,") for value in found.loaded)
    assert "://" not in page
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


def test_page_holds_every_figure_for_light_and_dark(page):
    told = document(plain(drawn_report()))
    figures = [e for s in told.sections for e in s.content if isinstance(e, parts.Figure)]
    assert len(figures) >= 10
    assert page.count("<figure>") == page.count("<source media=") == len(figures)
    assert "Warnings" in page
    assert "left out" not in page


def test_hostile_text_stays_text():
    report = plain(full_report(HOSTILE))
    for stage in report["stages"]:
        stage["layers"] = []
    found = parsed(report_html(report))
    assert "script" not in found.tags
    assert not any(tag.startswith("on") for tag in found.tags)
    assert "".join(found.text).count("<script>alert(1)</script>") >= 8
    card = model_card(report)
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    fields = yaml.safe_load(front)
    assert f"mone {HOSTILE}".split("/")[0] in " ".join(fields["tags"])
    # Outside code spans each special character is escaped.
    prose = re.sub(r"(`+).*?\1(?!`)", "", body)
    assert not re.search(r"(?<!\\)<script>|(?<!\\)\[a", prose)


def test_model_card():
    report = plain(full_report())
    card = model_card(report)
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["base_model"] == "a/b"
    assert fields["pipeline_tag"] == "text-generation"
    assert fields["library_name"] == "transformers"
    assert {"moe", "moe_jax"} <= set(fields["tags"])
    assert "| parameters | 1,200,000 | 900,000 | -25.0% |" in card
    assert "from_pretrained(folder, trust_remote_code=True)" in card
    report["source"] = {"path": "folder"}
    report["loader"] = {"trust_remote_code": False}
    card = model_card(report)
    assert "base_model" not in card
    assert "license" not in card
    assert "from_pretrained(folder)\n" in card


PLACES = ("/home/me", "/srv/client x", "~/secret", "../../secret", "file:///home/me")


@pytest.mark.parametrize("place", PLACES)
def test_card_names_files_without_their_folders(place):
    report = plain(full_report())
    report["source"] = {"path": f"{place}/olmoe", "family": "olmoe"}
    report["output"]["path"] = f"{place}/out/model"
    files = f"{place}/a.jsonl,{place}/b.jsonl"
    report["command"] = (
        f"python -m moe_jax.compress --config={place.replace(' ', '_')}/mine.py:olmoe "
        f"'--config.calibration.files={files}' --config.model '{place}/olmoe' --config.seed=3"
    )
    report["data"] = {"calibration": {f"{place}/a.jsonl": "ab" * 32}}
    report["stages"][0]["settings"] = {"plan": f"{place}/plan.json", "files": [f"{place}/x"]}
    report["warnings"] = [f"'{place}/a.jsonl' is short", "see https://example.org/a/b"]
    card = model_card(report)
    assert not re.search(r"/home|/srv|~|\.\./|secret|client", card)
    for kept in ("olmoe", "a.jsonl,b.jsonl", "plan.json", "mine.py:olmoe", "--config.seed=3"):
        assert kept in card
    assert "abababababababab" in card
    assert "https://example.org/a/b" in card
    assert read_back(report) == report


def read_back(report):
    """Cards and pages leave a report as it is."""
    return json.loads(json.dumps(report))


def test_paths_inside_the_working_folder_stay_as_they_are():
    command = "python -m moe_jax.compress --config=configs/quickstart.py:olmoe"
    assert without_folders({"command": command}) == {"command": command}
    assert without_folders(["hf:allenai/c4", "1/2", 3]) == ["hf:allenai/c4", "1/2", 3]


class Broken:
    """Draws nothing, and fails at it."""

    def __call__(self, dark=False):
        raise ArithmeticError("no such number")


def test_a_figure_that_cannot_be_drawn_is_left_out_with_a_warning():
    content = [parts.Figure(Broken(), "caption"), parts.Paragraph("what remains")]
    told = parts.Document("title", "", [parts.Section("Here", content)])
    page = document_html(told)
    assert "what remains" in page
    assert "<figure>" not in page
    assert "Here: a part of this report could not be made and is left out" in page
    assert "no such number" in page
    assert "what remains" in document_markdown(told)


@pytest.mark.parametrize(
    ("key", "value"), [("confidence", {"coverage": {"floor": "x"}}), ("settings", ["odd"])]
)
def test_facts_that_cannot_be_told_cost_their_part_alone(tmp_path, key, value):
    report = {"name": "name", "stages": [{"method": "mone", "kept": "half", key: value}]}
    paths = write_report(report, tmp_path)
    assert set(paths) == {"json", "html", "card"}
    for kind in ("html", "card"):
        text = paths[kind].read_text()
        assert "half" in text or key == "settings"
        assert "left out" in text


def test_summary_table():
    lines = [line.split() for line in summary_table(plain(full_report())).splitlines()]
    assert ["parameters", "1,200,000", "900,000", "-25.0%"] in lines
    assert ["weights,", "MB", "2.4", "1.8", "-25.0%"] in lines
    row = ["books", "7.39", "7.39", "1.0000", "1.1000", "+10.0%", "0.0625", "90.0%"]
    assert row in lines
    assert ["KL", "to", "the", "original,", "nats/token", "0.0625"] in lines
    assert ["wall", "time,", "s", "15.5"] in lines
    assert ["warning:", "warning", "text"] in lines


def test_schema_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'stage'; did you mean 'stages'"):
        check_report({"stage": []})
    with pytest.raises(ValueError, match=r"stages\[0\].layers\[0\] .* 'scores'.*'score'"):
        check_report({"stages": [{"layers": [{"layer": 0, "scores": []}]}]})
    with pytest.raises(ValueError, match="must have the key 'layer'"):
        check_report({"stages": [{"layers": [{"frequency": {}}]}]})
    with pytest.raises(ValueError, match="one number of experts"):
        check_report({"stages": [{"layers": [{"layer": 0, "count": [1], "score": [1, 2]}]}]})
    with pytest.raises(ValueError, match=r"kv_groups must be \[before, after\], got \[8\]"):
        check_report({"stages": [{"layers": [{"layer": 0, "kv_groups": [8]}]}]})
    with pytest.raises(ValueError, match=r"stages\[0\].training .* 'step'.*'steps'"):
        check_report({"stages": [{"training": {"step": 1}}]})
    with pytest.raises(ValueError, match=r"metrics\[0\] must have the key 'step'"):
        check_report({"stages": [{"training": {"metrics": [{"loss": 1.0}]}}]})
    with pytest.raises(ValueError, match=r"stages\[1\].evaluation .* 'after'"):
        check_report({"stages": [{}, {"evaluation": {"after": {}}}]})
    with pytest.raises(ValueError, match=r"stages\[0\].confidence .* 'verdicts'.*'verdict'"):
        check_report({"stages": [{"confidence": {"verdicts": ""}}]})
    with pytest.raises(ValueError, match="before must be a dict"):
        check_report({"before": [1]})
    with pytest.raises(ValueError, match="unknown key"):
        write_report({"seeed": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "report.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="must be JSON"):
        read_report(tmp_path)


def test_plain_values():
    value = {
        "array": np.arange(3),
        "jax": jnp.asarray([1.5], jnp.bfloat16),
        "scalar": np.float32(0.5),
        3: (1, float("nan"), np.inf),
        "set": {2, 1},
    }
    expected = {
        "array": [0, 1, 2],
        "jax": [1.5],
        "scalar": 0.5,
        "3": [1, None, None],
        "set": [1, 2],
    }
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)
    with pytest.raises(ValueError, match="plain values only, got object"):
        plain({"x": object()})


def test_figures_draw_without_complaint(tmp_path):
    made = layers()
    routing = [{"layer": 0, "frequency": {"a": [1, 0, 3], "b": [0, 0, 0]}}]
    figures = [
        plot_bits_per_byte({"one": {"a": 1.0}}),
        plot_bits_per_byte({"one": {"a": 1.0}, "two": {"b": 2.0}, "three": {"a": 1.0}}),
        plot_kl({"a": 0.0, "b": 1e-9}),
        plot_experts(made, dark=True),
        plot_experts([{"layer": 0, "count": [0, 0], "variance": [0, 0]}]),
        plot_scores([*made, {"layer": 9, "score": [1.0, 0.0]}]),
        plot_routing_by_domain(routing, dark=True),
        plot_neuron_importance(made),
        plot_stages(stage_points(full_report()), dark=True),
        plot_confidence(confidence()),
        plot_confidence({"coverage": confidence()["coverage"]}),
        plot_confidence(confidence(num_layers=1)),
        plot_training(training()),
        plot_training({"metrics": training(records=1)["metrics"]}),
        plot_training(training(records=1000)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures:
            assert isinstance(figure, Figure)
            figure.savefig(tmp_path / "figure.png", dpi=30)


def test_figures_refuse_nothing():
    for plot in (plot_experts, plot_scores, plot_routing_by_domain, plot_neuron_importance):
        with pytest.raises(ValueError, match="at least one layer, got none"):
            plot([{"layer": 0}])
    with pytest.raises(ValueError, match="got none"):
        plot_bits_per_byte({})
    with pytest.raises(ValueError, match="got none"):
        plot_kl({})
    with pytest.raises(ValueError, match="coverage, got none"):
        plot_confidence({"verdict": "enough"})
    with pytest.raises(ValueError, match="two that were measured"):
        plot_stages(stage_points(full_report())[:2])
    with pytest.raises(ValueError, match="got none"):
        plot_training({"metrics": [{"step": 1}]})


def test_importance_curve():
    importance = np.array([[4.0, 0.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    curve = importance_curve(importance, 2)
    assert curve["rank"] == [25, 50, 75, 100]
    assert curve["cut"] == 50
    np.testing.assert_allclose(curve["kept_share"], [7 / 8, 1 / 2])
    np.testing.assert_allclose(curve["median"], [1.5, 1.25, 0.75, 0.5])
    wide = importance_curve(np.ones((3, 5000)), 5000)
    assert len(wide["rank"]) <= 101
    np.testing.assert_allclose(wide["kept_share"], 1)
    with pytest.raises(ValueError, match=r"kept_width must be in \[1, F = 4\], got 5"):
        importance_curve(importance, 5)
    with pytest.raises(ValueError, match="finite"):
        importance_curve(importance * np.nan, 2)


def test_importance_may_be_negative():
    curve = importance_curve(np.array([[4.0, 0.0, 3.0, 1.0]]) - 2, 2)
    np.testing.assert_allclose(curve["kept_share"], [7 / 8])
    assert min(curve["low"]) >= 0


def test_unreached_experts_are_named():
    layers = [{"layer": 2, "count": [0, 1, 0]}, {"layer": 3, "unreached": [1, 2, 3, 7]}]
    assert experts_named([{"layer": 0, "count": [0, 1]}], unreached_ids) == ["layer 0: expert 0"]
    named = ["layer 2: experts 0, 2", "layer 3: experts 1-3, 7"]
    assert experts_named(layers, unreached_ids) == named


def test_experts_with_fewer_tokens_than_neurons_are_named():
    layers = [{"layer": 2, "fewer_tokens_than_neurons": [0, 1, 2]}, {"layer": 3}]
    card, _, told = render({"stages": [{"method": "obs", "layers": layers}]})
    for text in (card, words(told)):
        assert "ewer tokens than neurons" in text
        assert "layer 2: experts 0-2" in text


def test_points_follow_the_stages():
    report = full_report()
    points = stage_points(report)
    assert [point.label for point in points] == [
        "original",
        "stage 0: mone text, cut",
        "stage 1: slim text, cut",
        "stage 1: distilled (2.05k tokens)",
        "stage 2: slim text, cut",
        "stage 2: distilled (2.05k tokens)",
    ]
    assert [point.tokens for point in points] == [0, 0, 0, 2048, 2048, 4096]
    bits = [point.mean("bits_per_byte") for point in points]
    assert bits == [1.0, None, 1.4, 1.2, 2.4, 1.1]
    assert points[0].evaluation is report["before"]["evaluation"]
    assert points[-1].evaluation is report["after"]["evaluation"]
    # What is not known of every point is not shown of any; the last cut leaves the result's size.
    assert [point.parameters for point in points[-2:]] == [900_000, 900_000]
    assert "parameters" not in point_rows(points)[0]
    for stage in report["stages"][:2]:
        stage["parameters"] = {"total": 1_000_000}
    assert point_rows(stage_points(report))[1][1] == "1,200,000"


def test_stages_without_training_need_no_points():
    report = full_report()
    report["stages"] = report["stages"][:1]
    assert stage_points(report) == point_rows([]) == domain_point_rows([]) == []
    card, summary, told = render(plain(report))
    assert "rom stage to stage" not in card + summary + words(told)


def test_only_trained():
    settings = {"loss": "lm", "learning_rate": 0.5}
    stage = {"method": "distill", "kept": "everything", "layers": [], "settings": {}}
    stage["training"] = training() | {"settings": settings}
    report = plain({"before": full_report()["before"], "stages": [stage]})
    assert [p.label for p in stage_points(report)] == [
        "original",
        "stage 0: trained (2.05k tokens)",
    ]
    assert stage_title(stage) == "training"
    assert stage_title({**stage, "training": training()}) == "distillation"
    card, _, told = render(report)
    assert "everything" not in card + words(told)
    assert "the original" not in training_sentences(stage["training"])
    assert "0.5" in training_sentences(stage["training"])


@pytest.mark.parametrize("key", trained_stages(1)[0].keys())
def test_every_part_of_a_stage_is_optional(key):
    for keep in (lambda name: name != key, lambda name: name == key):
        report = plain(full_report())
        report["stages"] = [{k: v for k, v in s.items() if keep(k)} for s in trained_stages()]
        check_report(plain(report))
        render(plain(report))


@pytest.mark.parametrize("key", training().keys())
def test_every_part_of_a_training_is_optional(key):
    for keep in (lambda name: name != key, lambda name: name == key):
        stage = {"method": "slim", "training": {k: v for k, v in training().items() if keep(k)}}
        report = {"stages": [stage, stage]}
        check_report(report)
        card, _, told = render(report)
        assert ("Losses on the training text" in words(told)) == keep("metrics")
        assert ("kd_full" in words(told)) == keep("settings") == ("kd_full" in card)
        assert ("2,048" in words(told)) == keep("tokens")
        assert ("988" in words(told)) == keep("tokens_per_second")


def test_stage_tables_say_what_was_measured(page):
    report = plain(full_report())
    card, summary, _ = render(report)
    lines = [re.split(r"\s{2,}", line) for line in summary.splitlines()]
    expected = [
        ["original", "1.0000", "-", "-", "0"],
        ["stage 0: mone text, cut", "-", "-", "-", "0"],
        ["stage 1: slim text, cut", "1.4000", "0.5000", "90.0%", "0"],
        ["stage 1: distilled (2.05k tokens)", "1.2000", "0.2500", "90.0%", "2,048"],
        ["stage 2: slim text, cut", "2.4000", "1.5000", "90.0%", "2,048"],
        ["stage 2: distilled (2.05k tokens)", "1.1000", "0.0625", "90.0%", "4,096"],
    ]
    start = next(n for n, line in enumerate(lines) if line[0] == "from stage to stage")
    assert lines[start + 1 : start + 7] == expected
    by_domain = ["code_python", "1.5000", "1.9000", "1.7000", "2.9000", "1.6000"]
    for row in [*expected, by_domain]:
        assert "| " + " | ".join(row) + " |" in card
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "<td>8 → 4</td>" in page
    assert "Peak learning rate: 0.001." in card


def test_wide_tables_are_for_the_page():
    card, _, told = render(plain(full_report() | {"stages": trained_stages(3)}))
    assert (
        len(domain_point_rows(stage_points(full_report() | {"stages": trained_stages(3)}))[0]) == 8
    )
    assert "Bits per byte by domain" in words(told)
    assert "Bits per byte by domain" not in card


def test_confidence_is_told():
    report = plain(full_report())
    _, summary, told = render(report)
    said = words(told)
    assert said.count("'text': 'verdict text'") == 2
    assert "120 of 16 experts were chosen by fewer than 100 tokens: layer 0: 0 (3)" in said
    assert "11 (3) and 108 more. The busiest, expert 7 of layer 1" in said
    assert "by 50.0% of the tokens (2.0 times its even share)" in said
    assert "With other text of this size, 21 experts would be on the other side" in said
    assert "layer 1 expert 3 (removed, 50%), layer 0 expert 0 (kept, 25%)" in said
    (line,) = [line for line in summary.splitlines() if "half of the text" in line]
    assert line.split("  ")[-1].strip() == "93.8%, 93.8% the same"
    report["stages"] = report["stages"][:1]
    assert "half of the text" not in summary_table(report)


@pytest.mark.parametrize("key", confidence().keys())
def test_every_part_of_confidence_is_optional(key):
    for keep in (lambda name: name != key, lambda name: name == key):
        told = {name: value for name, value in confidence().items() if keep(name)}
        report = plain({"stages": [{"method": "mone", "confidence": told}]})
        check_report(report)
        _, summary, shown = render(report)
        assert ("verdict text" in words(shown)) == keep("verdict")
        assert ("half of the text" in summary) == keep("convergence")


def test_routing_is_shown_of_every_stage():
    told = document(plain(full_report()))
    shown = [
        s.title for s in told.sections if any(e.title == "Routing by domain" for e in s.content)
    ]
    assert shown == [
        "Stage 0: mone text",
        *[f"Stage {n}: slim text and distillation" for n in (1, 2)],
    ]


def test_losses_in_words():
    settings = {"loss": "kd_topk", "top_k": 16, "lm_weight": 0.25, "router_weight": 2.0}
    words = training_sentences({"settings": settings, "tokens": 1000, "steps": 10})
    for part in ("1,000 tokens", "10 steps", "16 most likely", "25%", "2 times", "routers"):
        assert part in words
    assert "a_new_loss" in training_sentences({"settings": {"loss": "a_new_loss"}})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(3, 20), st.randoms(use_true_random=False))
def test_thinning_keeps_ends_and_means(num_records, most, random):
    metrics = [{"step": n, "loss": random.uniform(-5, 5)} for n in range(num_records)]
    thinned = thin(metrics, most)
    assert len(thinned) == min(num_records, most)
    if num_records <= most:
        assert thinned == [{"records": 1, **record} for record in metrics]
        return
    for end in (0, -1):
        assert thinned[end] == {"records": 1, **metrics[end]}
    weights = [record["records"] for record in thinned]
    assert sum(weights) == num_records
    assert max(weights[1:-1]) - min(weights[1:-1]) <= 1
    for name in ("step", "loss"):
        mean = np.average([record[name] for record in thinned], weights=weights)
        np.testing.assert_allclose(mean, np.mean([r[name] for r in metrics]), atol=1e-9)


def test_thinning_averages_what_is_there():
    metrics = [{"step": n} | ({"lm": float(n)} if n % 2 else {"lm": None}) for n in range(9)]
    assert [record.get("lm") for record in thin(metrics, 3)] == [None, 4.0, None]
    with pytest.raises(ValueError, match="most must be at least 3, got 2"):
        thin(metrics, 2)


def test_each_loss_is_drawn_once():
    records = [{"step": 1, "loss": 2.0, "distill": 2.0, "lm": 3.0, "learning_rate": 0.1}]
    assert shown_parts(records) == ["distill", "lm", "learning_rate"]
    assert shown_parts([records[0] | {"lm": 2.0}]) == ["lm", "learning_rate"]
    assert shown_parts([records[0] | {"loss": 2.5}])[:2] == ["loss", "distill"]
    assert shown_parts([{"step": 1, "loss": 2.0}]) == ["loss"]
    assert shown_parts(thin([{"step": 1, "loss": None}])) == []
    assert "4,000 logged steps, as 300 means" in training_caption(training(records=4000))
    assert training_caption(training()) == "Losses on the training text. 3 logged steps."


def test_colours_of_both_themes_pair():
    light, dark = page_colors(LIGHT), page_colors(DARK)
    assert light.keys() == dark.keys()
    pairs = set(zip(light.values(), dark.values(), strict=True))
    assert len({color for color, _ in pairs}) == len(pairs)


def test_labels_that_xml_cannot_hold():
    values = {"a\x00\x1b<b>&\ufffe": 1.0, "$x_1^{": 2.0}
    figure = plot_kl(values)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["a<b>&", r"\$x 1^{"]
    drawn = parts.Figure(lambda dark: plot_kl(values, dark=dark), '<"title">')
    page = document_html(parts.Document("", "", [parts.Section("s", [drawn])]))
    assert "<figure>" in page


def test_page_is_small():
    report = full_report()
    report["stages"] = trained_stages(1)
    for stage in report["stages"]:
        stage["layers"] = layers(num_layers=4, num_experts=64)
        stage["confidence"] = confidence(num_layers=4)
        stage["training"] = training(records=5000)
    assert len(report_html(plain(report))) < 600_000


def test_environment():
    found = environment()
    assert {"moe_jax", "jax", "transformers", "python", "platform", "device"} <= set(found)
    assert plain(found) == found
    assert 10 < peak_memory_mib() < 1e7
