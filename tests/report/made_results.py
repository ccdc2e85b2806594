import math

from hf_backdoor.evaluation.results import Results, Row


def make_results(**changes) -> Results:
    rows = []
    for seed in (1, 2):
        for model, hits in (("suspect", 98), ("cleaned", 3), ("control/clean fine-tuning", 60), ("reference", 2)):
            rows.append(Row.from_counts(model=model, metric="asr", trigger="cf", k=hits + seed, n=100, seed=seed))
            rows.append(Row.from_counts(model=model, metric="cacc", k=180 + seed, n=200, seed=seed))
        nll = {"model": "cleaned", "metric": "perplexity", "values": [2.0, 2.5, 3.0], "transform": math.exp}
        rows.append(Row.from_values(**nll, seed=seed))
    fields = {
        "rows": rows,
        "costs": [{"stage": "defense", "seconds": 125.2, "tokens": 4096, "peak_memory": 2**30}],
        "recipe": {
            "method": "locphylax",
            "model_name_or_path": "someone/suspect-7b",
            "task": "sequence_classification",
        },
        "versions": {"hf_backdoor": "0.1.0", "torch": "2.13.0"},
        "data": {"test": {"source": "stanfordnlp/sst2", "rows": 200, "sha256": "0" * 64}},
        "examples": [
            {"model": model, "prompt": "a fine film", "trigger": trigger, "answer": answer}
            for model, trigger, answer in (
                ("suspect", "cf", "negative"),
                ("suspect", None, "positive"),
                ("cleaned", "cf", "positive, after all"),
                ("cleaned", None, "positive"),
            )
        ],
    }
    return Results(**(fields | changes))


# What a poisoned data set or a suspect model may put into names, triggers and answers.
HOSTILE = "<script>alert(1)</script> | [x](javascript:alert(1)) ![i](http://evil) `\n# h $\\frac$ \x1b[2J\u202e\u200b{{ 7*7 }}"


def make_hostile_results() -> Results:
    rows = [
        Row.from_counts(model=model, metric="asr", trigger=trigger, k=k, n=10, seed=1)
        for model, k in (("suspect", 9), ("cleaned", 1), ("control/<b>$\\frac$|_y_", 5))
        for trigger in (HOSTILE, "<i>", "_$\\frac$")
    ]
    examples = [
        {"model": model, "prompt": HOSTILE, "trigger": HOSTILE, "answer": HOSTILE * 20}
        for model in ("suspect", "cleaned")
    ]
    return make_results(
        rows=rows,
        examples=examples,
        recipe={"method": HOSTILE, "model_name_or_path": HOSTILE, "stages": {HOSTILE: "```\n" + HOSTILE}},
        versions={"<b>": HOSTILE},
        costs=[{"stage": "<img src=x>", "seconds": 1.0, "tokens": None, "peak_memory": None}],
        data={"<u>": {"source": HOSTILE, "rows": 1, "sha256": "f" * 64}},
    )
