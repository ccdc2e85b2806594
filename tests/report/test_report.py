import base64
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from made_results import HOSTILE, make_results

from hf_backdoor.evaluation.results import Row
from hf_backdoor.report import write_report
from hf_backdoor.report.card import model_card
from hf_backdoor.report.scrub import scrub


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def report_of(results, run_dir):
    results.save(run_dir / "results.json")
    return write_report(run_dir)


def test_report_is_made_from_the_results_alone(results, tmp_path):
    folder = report_of(results, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "asr_cacc.png", "index.html"]
    png = (folder / "asr_cacc.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    page, readme = (folder / "index.html").read_text(), (folder / "README.md").read_text()
    assert base64.b64encode(png).decode() in page
    assert "(asr_cacc.png)" in readme
    for text in (page, readme):
        for part in ("control: clean fine-tuning", "(199/200, 2 seeds)", "https://huggingface.co/papers/2510.10265"):
            assert part in text
        for part in (
            "before,",
            "does not prove",
            "positive, after all",
            "2 min 5 s",
            "stanfordnlp/sst2",
            "hf-backdoor run",
        ):
            assert part in text, part


def test_same_results_make_the_same_report(results, tmp_path):
    first = {path.name: path.read_bytes() for path in report_of(results, tmp_path).iterdir()}
    assert {path.name: path.read_bytes() for path in write_report(tmp_path).iterdir()} == first


def test_page_needs_nothing_but_itself(results, tmp_path):
    page = Page((report_of(results, tmp_path) / "index.html").read_text())
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(page.tags)
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script" not in policy
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")


def test_hostile_text_is_only_text_in_the_page(hostile_results, results, tmp_path):
    page = Page((report_of(hostile_results, tmp_path) / "index.html").read_text())
    (tmp_path / "plain").mkdir()
    harmless = Page((report_of(results, tmp_path / "plain") / "index.html").read_text())
    assert set(page.tags) <= set(harmless.tags) and page.tags.count("img") == 1
    assert [value for name, value in page.attributes if name == "href" and "papers" not in value] == []
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text
    assert "{{ 7*7 }}" in page.text


@pytest.mark.parametrize("make", ["readme", "card"])
def test_hostile_text_is_only_text_in_markdown(hostile_results, tmp_path, make):
    markdown_it = pytest.importorskip("markdown_it")
    if make == "readme":
        text = (report_of(hostile_results, tmp_path) / "README.md").read_text()
    else:
        text = model_card(hostile_results, "me/tiny").text
    page = Page(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert {"script", "b", "i", "u"}.isdisjoint(page.tags)
    assert [value for name, value in page.attributes if name == "src"] == (
        ["asr_cacc.png"] if make == "readme" else []
    )
    assert all("evil" not in value and "javascript" not in value for _, value in page.attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "49" not in re.sub(r"[0-9a-f]{16}", "", page.text)
    # The heading inside of the hostile text did not become one.
    assert page.tags.count("h1") == 1


def test_table_keeps_its_columns_with_hostile_triggers(hostile_results, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    text = (report_of(hostile_results, tmp_path) / "README.md").read_text().split("## Results")[1].split("- Rates")[0]
    tags = Page(markdown_it.MarkdownIt("commonmark").enable("table").render(text)).tags
    assert (tags.count("th"), tags.count("td")) == (4, 12)


def test_run_without_asr_and_cacc_has_a_report_without_a_figure(tmp_path, results):
    report_of(results, tmp_path)
    row = Row.from_values(model="cleaned", metric="perplexity", values=[1.0, 2.0], seed=1)
    folder = report_of(make_results(rows=[row]), tmp_path)
    assert not (folder / "asr_cacc.png").exists()
    assert "<img" not in (folder / "index.html").read_text()
    assert "asr_cacc" not in (folder / "README.md").read_text()


def test_run_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        write_report(tmp_path)


def test_card_says_what_was_done_and_what_was_not(results):
    card = model_card(results, "me/tiny")
    assert card.data.base_model == "someone/suspect-7b"
    assert card.data.datasets == ["stanfordnlp/sst2"]
    assert card.data.tags == ["hf_backdoor", "backdoor-defense", "locphylax"]
    assert card.data.license is None
    front = yaml.safe_load(card.content.split("---\n")[1])
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics}["accuracy"] == pytest.approx(0.9075)
    for part in (
        "https://huggingface.co/papers/2510.10265",
        "suspected of a backdoor",
        "(199/200, 2 seeds)",
        "control: clean fine-tuning",
        'This trigger was tested: "cf"',
        "no other trigger",
        "method: locphylax",
        "2 min 5 s",
    ):
        assert part in card.text, part


def test_card_says_when_there_was_no_control(results):
    assert "No control was measured" not in model_card(results, "me/tiny").text
    rows = [row for row in results.rows if row.model in ("suspect", "cleaned")]
    text = model_card(make_results(rows=rows), "me/tiny").text
    assert "No control was measured" in text and "floor that the ASR can reach is not known" in text


def test_without_triggers_no_trigger_is_spoken_of(results):
    clean = [row for row in results.rows if row.metric == "cacc" and row.model != "reference"]
    card = model_card(make_results(rows=clean), "me/tiny").text
    assert (
        "No trigger was named in the evaluation.\n\nSo nothing here tells whether there is one, and the data" in card
    )
    assert "listed triggers" not in card and "floor" not in card


@pytest.mark.parametrize(
    "method, link",
    [("mbtsad", "papers/2501.02754"), ("NT-ML", "papers/2508.05404"), ("robustkd", "10.1016/j.asoc.2024.111907")],
)
def test_card_links_the_paper_of_the_method(method, link):
    assert link in model_card(make_results(recipe={"method": method}), "me/tiny").text


def test_card_tells_a_benchmark_from_a_suspicion():
    text = model_card(
        make_results(recipe={"method": "mbtsad", "model_name_or_path": "a/b", "attack_trigger": "cf"}), "me/tiny"
    ).text
    assert "made from a/b and poisoned by this run" in text and "suspected of a backdoor" not in text


@pytest.mark.parametrize(
    "name", ["/home/me/models/suspect", "./suspect", "../a/b", "C:\\models\\suspect", "a/b/c", HOSTILE]
)
def test_base_model_is_never_a_path(name):
    card = model_card(make_results(recipe={"model_name_or_path": name}), "me/tiny")
    assert card.data.base_model is None
    assert "/home/me" not in card.content


def test_base_model_is_not_a_folder_that_looks_like_a_repository(tmp_path, monkeypatch):
    (tmp_path / "runs" / "suspect").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_card(make_results(recipe={"model_name_or_path": "runs/suspect"}), "me/tiny").data.base_model is None


def test_licence_is_the_one_of_the_recipe():
    assert model_card(make_results(recipe={"license": "apache-2.0"}), "me/tiny").data.license == "apache-2.0"


def test_card_of_nothing_is_still_a_card():
    card = model_card(make_results(rows=[], recipe={}, costs=[], data={}, examples=[], versions={}), "me/tiny")
    assert card.data.eval_results is None
    assert yaml.safe_load(card.content.split("---\n")[1])["library_name"] == "transformers"


def test_wrong_name_of_a_repository_is_refused(results):
    with pytest.raises(ValueError):
        model_card(results, "../x\ny")


@pytest.mark.parametrize(
    "text, scrubbed",
    [
        ("/data/models/suspect", "suspect"),
        ("/data/models/suspect/", "suspect"),
        ("file:///data/clean.jsonl", "clean.jsonl"),
        ("~/clean.jsonl", "clean.jsonl"),
        ("C:\\Users\\me\\clean.jsonl", "clean.jsonl"),
        ("/home/someone/a b.jsonl", "a b.jsonl"),
        ("json:/home/someone/x/y.json, twice", "json:y.json, twice"),
        ("hf_" + "A" * 34, "[removed]"),
        ("/think", "/think"),
        ("stanfordnlp/sst2", "stanfordnlp/sst2"),
        ("https://huggingface.co/papers/2510.10265", "https://huggingface.co/papers/2510.10265"),
        ("/home/someoneelse", "someoneelse"),
        ("see /home/someoneelse/x, or not", "see x, or not"),
        ("json:/data/x.json", "json:x.json"),
        ("</s> yes/no </think>", "</s> yes/no </think>"),
        ("and/or", "and/or"),
        ("../../home/alice/acme-merger/rows.jsonl", "rows.jsonl"),
        ("../../mnt/acme/a b.jsonl", "a b.jsonl"),
        ("data/../../acme/rows.jsonl", "rows.jsonl"),
        ("..\\..\\acme\\rows.jsonl", "rows.jsonl"),
        ("see ../acme/x, or not", "see x, or not"),
        ("json:data/../acme/x.json", "json:x.json"),
        ("../..", ".."),
        ("so on.. and/or .../then", "so on.. and/or .../then"),
        ("https://huggingface.co/papers/../2510.10265", "https://huggingface.co/papers/../2510.10265"),
    ],
)
def test_paths_and_tokens_are_scrubbed(text, scrubbed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert scrub({"a": [text]}) == {"a": [scrubbed]}


def test_scrubbed_keys_do_not_swallow_each_other():
    assert sorted(scrub({"/data/a/x": 1, "/data/b/x": 2}).values()) == [1, 2]
    assert scrub({"hub_token": "abc", "seed": 1}) == {"seed": 1}


def test_no_secret_of_a_recipe_is_in_a_report(tmp_path):
    token = "hf_" + "x" * 34
    recipe = {"hub_token": token, "note": f"use {token}", "stages": {"inject": {"hub_token": "my own", "seed": 1}}}
    report = report_of(make_results(recipe=recipe), tmp_path)
    written = [path.read_bytes() for path in (tmp_path / "results.json", *report.iterdir())]
    assert len(written) > 2
    assert not [content for content in written if token.encode() in content or b"my own" in content]


def test_a_report_of_old_results_has_no_secret_of_theirs(tmp_path):
    make_results().save(tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    document["recipe"]["hub_token"] = "my own"
    (tmp_path / "results.json").write_text(json.dumps(document))
    for path in write_report(tmp_path).iterdir():
        assert b"my own" not in path.read_bytes()


def test_method_without_a_paper_is_named(tmp_path):
    results = make_results(recipe={"method": "weight_averaging"})
    page = Page((report_of(results, tmp_path) / "index.html").read_text())
    assert "The defense was weight_averaging." in page.text
    assert "the cleaned model, which was made by weight\\_averaging." in model_card(results, "me/tiny").text
