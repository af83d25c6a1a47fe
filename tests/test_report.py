"""Reports: any part may be absent, nothing is loaded from elsewhere, hostile text stays text."""

import html.parser
import json
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from moe_jax.report import (
    check_report,
    environment,
    importance_curve,
    model_card,
    peak_memory_mib,
    plain,
    plot_bits_per_byte,
    plot_experts,
    plot_kl,
    plot_neuron_importance,
    plot_routing_by_domain,
    plot_scores,
    read_report,
    report_html,
    summary_table,
    write_report,
)
from moe_jax.report.tables import id_ranges, relative_change, small_number, unreached_experts

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
                "unreached": [3],
                "importance": importance_curve(rng.gamma(1, 1, (num_experts, 6)), 4),
            }
        )
    return made


def full_report(text="text"):
    books = text if text == HOSTILE else "books"
    routing = {books: np.arange(8.0), "code_python": np.arange(8.0)[::-1]}
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
            {"method": f"mone {text}", "settings": {text: text}, "kept": text, "layers": layers()}
        ],
        "routing_by_domain": [{"layer": 0, "frequency": routing, "novices": [3]}],
        "loader": {"trust_remote_code": True, "notes": [text]},
        "warnings": [f"warning {text}"],
    }


def test_round_trip(tmp_path):
    report = full_report()
    paths = write_report(report, tmp_path / "run", card_folder=tmp_path / "checkpoint")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"report.json", "report.html"}
    assert paths["card"] == tmp_path / "checkpoint" / "README.md"
    assert read_report(tmp_path / "run") == read_report(paths["json"]) == plain(report)
    assert paths["html"].read_text() == report_html(plain(report))
    assert paths["card"].read_text() == model_card(plain(report))


@pytest.mark.parametrize("key", full_report().keys())
def test_every_section_is_optional(key, monkeypatch):
    monkeypatch.setattr("moe_jax.report.page._data_uri", lambda figure: "data:,")
    for report in ({key: full_report()[key]}, {k: v for k, v in full_report().items() if k != key}):
        report = plain(report)
        check_report(report)
        assert report_html(report).endswith("</html>\n")
        assert model_card(report).startswith("---\n")
        summary_table(report)


def test_empty_report():
    assert summary_table({}) == ""
    assert "<h2>" not in report_html({})
    assert "##" not in model_card({})


def test_one_model_without_the_other():
    report = plain({"before": full_report()["before"]})
    assert "1,200,000" in summary_table(report)
    assert "1,200,000" in report_html(report)


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


def test_page_is_self_contained():
    page = report_html(plain(full_report()))
    found = parsed(page)
    assert found.loaded
    assert all(value.startswith("data:image/svg+xml;base64,") for value in found.loaded)
    assert not found.tags & {"script", "link", "iframe", "object"}
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_hostile_text_stays_text():
    report = plain(full_report(HOSTILE))
    found = parsed(report_html(report))
    assert "script" not in found.tags
    assert not any(tag.startswith("on") for tag in found.tags)
    assert "".join(found.text).count("<script>alert(1)</script>") >= 8
    card = model_card(report)
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    fields = yaml.safe_load(front)
    assert fields["license"] == HOSTILE
    assert f"mone {HOSTILE}" in fields["tags"]
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
        check_report({"routing_by_domain": [{"frequency": {}}]})
    with pytest.raises(ValueError, match="one number of experts"):
        check_report({"stages": [{"layers": [{"layer": 0, "count": [1], "score": [1, 2]}]}]})
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


@pytest.mark.parametrize("dark", [False, True])
def test_figures_draw(dark, tmp_path):
    made = layers()
    routing = [{"layer": 0, "frequency": {"a": [1, 0, 3], "b": [0, 0, 0]}}]
    figures = [
        plot_bits_per_byte({"one": {"a": 1.0}}, dark=dark),
        plot_bits_per_byte({"one": {"a": 1.0}, "two": {"b": 2.0}, "three": {"a": 1.0}}, dark=dark),
        plot_kl({"a": 0.0, "b": 1e-9}, dark=dark),
        plot_experts(made, dark=dark),
        plot_experts([{"layer": 0, "count": [0, 0], "variance": [0, 0]}], dark=dark),
        plot_scores([*made, {"layer": 9, "score": [1.0, 0.0]}], dark=dark),
        plot_routing_by_domain(routing, dark=dark),
        plot_neuron_importance(made, dark=dark),
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
    with pytest.raises(ValueError, match="not negative"):
        importance_curve(-importance, 2)


def test_unreached_experts_are_named():
    stage = {"layers": [{"layer": 2, "count": [0, 1, 0]}, {"layer": 3, "unreached": [1, 2, 3, 7]}]}
    assert unreached_experts({"layers": [{"layer": 0, "count": [0, 1]}]}) == ["layer 0: expert 0"]
    assert unreached_experts(stage) == ["layer 2: experts 0, 2", "layer 3: experts 1-3, 7"]
    assert id_ranges([8, 0, 1, 5, 6, 7]) == "0, 1, 5-8"


def test_small_numbers_keep_their_digits():
    assert [small_number(v) for v in (None, 0.0, 5.04e-7, 0.25)] == [
        "-",
        "0.0000",
        "5.0e-07",
        "0.2500",
    ]
    changes = [relative_change(*pair) for pair in ((2, 3), (2, 1.99999), (0, 1), (1, None))]
    assert changes == ["+50.0%", "+0.0%", None, None]


def test_environment():
    found = environment()
    assert {"moe_jax", "jax", "transformers", "python", "platform", "device"} <= set(found)
    assert plain(found) == found
    assert 10 < peak_memory_mib() < 1e7
