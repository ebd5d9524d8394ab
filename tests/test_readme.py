"""README and its fellows say what is true: commands parse, numbers are those of the committed result files."""

import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "latex" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = (RESULTS / "README.md").read_text(encoding="utf-8")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a published run, from the archive that holds its records."""
    folder = tmp_path_factory.mktemp("records")

    def unpacked(name: str) -> Path:
        if not (folder / name).exists():
            with tarfile.open(RESULTS / f"{name}.tar.xz") as packed:
                packed.extractall(folder, filter="data")
        return folder / name

    return unpacked


def results_line(name: str, found: dict[str, Any]) -> str:
    """A data set's line in README's table of results."""
    methods = {method: percent(summary["accuracy"]) for method, summary in found["methods"].items()}
    low, high = map(percent, found["methods"]["bridge"]["ci"])
    p = "< 1e-30" if found["p"] < 1e-30 else f"{found['p']:.1g}"
    return (
        f"| {name} ({found['n']:,}) | **{methods['bridge']}** | {low}–{high} | {methods['probe']} | {methods['text']} "
        f"| {methods[found['best_control']]} | {percent(found['best_constant'])} | {p} |"
    )


def demo_sentence(found: dict[str, Any]) -> str:
    """README's sentence on the demo."""
    methods = {method: percent(s["accuracy"]) for method, s in found["methods"].items()}
    return (
        f"{methods['bridge']} % of {found['n']:,} held-out reviews right, against {methods[found['best_control']]} % for the "
        f"best control and {methods['probe']} % for a linear probe on the sender itself."
    )


def bytes_sentence(found: dict[str, Any]) -> str:
    """README's sentence on bytes."""
    methods = found["methods"]
    return (
        f"a review of the demo has {methods['text']['bytes']:.0f} bytes of UTF-8 on average, its message "
        f"{methods['bridge']['bytes']:.0f}."
    )


def mixed_sentence(found: dict[str, Any]) -> str:
    """README's sentence on words and latents in one message."""
    f1 = {method: percent(summary["f1"]) for method, summary in found["methods"].items()}
    size = found["compression"]
    return (
        f"At {size['sequence']:.1f} times fewer positions than the context, and {size['message_bytes']:.0f} bytes for "
        f"{size['utf8_bytes']:.0f} of text, F1 is **{f1['bridge']}** on {found['n']} questions. The whole text has "
        f"{f1['text']}, the best sentences {f1['extractive']}, both read zero-shot; these sentences after a trained prompt "
        f"{f1['extractive+prompt_tuning']}. Another text's latents among the same words: {f1['parts:other_latents']}, so they "
        f"prepare the reader and carry nothing that is shown."
    )


def notes_sentence(found: dict[str, Any]) -> str:
    """README's sentence on the demo's second half."""
    f1 = {method: percent(summary["f1"]) for method, summary in found["methods"].items()}
    return (
        f"Then content: notes of made-up facts, each sent once in {found['compression']['message_bytes']:.0f} bytes and asked "
        f"four questions afterwards: F1 {f1['bridge']}. Words alone in as many positions have {f1['parts:words_budget']} and "
        f"the whole note {f1['text']}, both read zero-shot; another note's latents among the words {f1['parts:other_latents']}."
    )


def mixed_table(found: dict[str, Any]) -> str:
    """The table of such an evaluation."""
    lines = ["| method | F1 | 95 % CI | positions | bytes |", "|---|--:|--:|--:|--:|"]
    for name, summary in found["methods"].items():
        low, high = map(percent, summary["ci"])
        tokens, size = ("–" if summary[key] is None else f"{summary[key]:.0f}" for key in ("tokens", "bytes"))
        lines.append(f"| `{name}` | {percent(summary['f1'])} | {low}–{high} | {tokens} | {size} |")
    return "\n".join(lines)


def benchmark_table() -> str:
    """The table of latency and throughput, from the file."""
    found = load("benchmark")
    heads = [
        f"{n} tokens, ms" if n else "scored, ms" for n in dict.fromkeys(r["answer_tokens"] for r in found["latency"])
    ]
    sizes = [size for size in dict.fromkeys(row["batch"] for row in found["batched"]) if size in (1, 16)]
    lines = [
        f"| from text to answer | {' | '.join(heads)} | {' | '.join(f'texts/s, batch {size}' for size in sizes)} |",
        "|---" + "|--:" * (len(heads) + len(sizes)) + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in found["latency"]):
        own = [row for row in found["latency"] if row["arm"] == arm]
        cells = [f"{row['median_ms']:.0f} ({row['roofline']:.0%})" for row in own]
        cells += [
            f"{row['texts_per_s']:.1f}" for row in found["batched"] if row["arm"] == arm and row["batch"] in sizes
        ]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def benchmark_sentence() -> str:
    """What is said of that table, from the file."""
    found = {row["arm"]: row["median_ms"] for row in load("benchmark")["latency"] if row["answer_tokens"] == 0}
    return (
        f"on this machine the receiver reads {load('benchmark')['input_tokens']} tokens of text in {found['text']:.0f} ms, and "
        f"the way over the bridge takes {found['bridge']:.0f} ms, or {found['bridge:cached']:.0f} ms where the sender's states "
        f"are there already. What latents save is writing: a note of 50 tokens makes the answer "
        f"{found['relay:50'] / found['bridge']:.0f} times slower."
    )


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def made_again(run: Path) -> dict[str, Any]:
    """The results that a published run's records give, which must be those that stand beside them."""
    facts = json.loads((run / "evaluation.json").read_text())
    wanted = facts["provenance"]["record_keys"]
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in facts["order"]}
    for row in lw.records_in(run / "records.jsonl"):
        if wanted.get(row["method"]) == row["key"]:
            rows[row["method"]].append(row)
    found = json.loads(json.dumps(lw.results_from(facts, rows, lw.details_in(run))))
    kept = (run / "results.json").read_text()
    # sums of floating-point numbers differ in their last digit from CPU to CPU
    again, before = (
        json.loads(text, parse_float=lambda number: f"{float(number):.9g}") for text in (json.dumps(found), kept)
    )
    assert again == before
    assert {len(own) for own in rows.values()} == {found["n"]}
    return found


def test_words_and_latents_are_published_with_their_records(kept):
    """V9: the only F1 of these pages; the verdict says which part communicates, and the pages say no more."""
    found = made_again(kept("mixed"))
    assert mixed_sentence(found) in unwrapped(README) and mixed_table(found) in TABLES
    assert found["communication"] and found["leaks"] == []
    assert "carry nothing that is shown" in found["verdict"] and "one seed" in unwrapped(TABLES)


def test_a_second_seed_is_published_with_its_records(kept):
    """It is behind the trained reader of the best sentences, and both pages say so."""
    found = made_again(kept("mixed123"))
    f1 = {method: percent(summary["f1"]) for method, summary in found["methods"].items()}
    low, high = map(percent, found["methods"]["bridge"]["ci"])
    rival = f1["extractive+prompt_tuning"]
    assert f"A second seed: {f1['bridge']} and {rival}." in unwrapped(README)
    tables = unwrapped(TABLES)
    assert f"has {f1['bridge']} ({low}–{high}), and its trained prompt {rival}: there" in tables
    assert f"have {f1['parts:other_latents']}." in tables and f"({f1['extractive']} and {f1['text']})" in tables
    assert f"p {found['p_bridge_vs']['extractive+prompt_tuning']:.3f}".replace("0.", ".") in tables
    assert "carry nothing that is shown" in found["verdict"]


def agnostic_sentence(found: dict[str, Any]) -> str:
    """README's sentence on a sender that does not know the question."""
    f1 = {method: percent(summary["f1"]) for method, summary in found["methods"].items()}
    return (
        f"Where only the receiver knows the question: **{f1['bridge']}**, the text cut off {f1['token_budget']}, the best "
        f"sentences {f1['extractive']}, after a trained prompt {f1['extractive+prompt_tuning']}."
    )


def test_words_chosen_before_the_question_are_published_with_their_records(kept):
    """Ahead of every untrained choice in as many positions, and no more is said than that."""
    found = made_again(kept("agnostic"))
    assert agnostic_sentence(found) in unwrapped(README) and mixed_table(found) in TABLES
    assert found["communication"] and found["leaks"] == []
    assert "carry nothing that is shown" in found["verdict"]
    p, f1 = found["p_bridge_vs"], {method: summary["f1"] for method, summary in found["methods"].items()}
    rivals = ("token_budget", "extractive", "extractive:windows", "random_words", "selective", "llmlingua")
    assert max(p[name] for name in rivals) <= 0.0002 and p["extractive+prompt_tuning"] > 0.05
    assert f1["bridge"] >= 0.9 * f1["text"]


def store_sentence(rows: list[dict[str, Any]]) -> str:
    """README's sentence on a store of latents beside a store of texts."""
    cells = {name: more for name, *more in lw.table_of_reading(rows, "").rows}
    (ours, _, read, ms, _), (text, _, length, longer, _) = cells["latents"], cells["text"]
    return (
        f"A store keeps what the sender read: of 1,000 SQuAD paragraphs three are read for each of {len(rows) // 3} questions, as "
        f"latents F1 {ours} ({read} tokens, {ms} ms; a half-trained bridge), as text {text} ({length}, {longer} ms)."
    )


def test_a_store_is_published_with_its_records(kept):
    [path] = kept("store").glob("compare-top3-*.jsonl")
    rows = lw.read_rows(path)
    assert store_sentence(rows) in unwrapped(README)
    table = lw.table_of_reading(rows, "")
    assert table.markdown().strip() in TABLES
    found = [row["found"] for row in rows if row["method"] == "latents"]
    assert f"the right one is among them for {percent(sum(found) / len(found))} %" in unwrapped(TABLES)


def test_notes_are_published_with_their_records(kept):
    """One message, four questions; nothing but the message can answer, and it is not the latents that do."""
    found = made_again(kept("notes"))
    assert notes_sentence(found) in unwrapped(README) and mixed_table(found) in TABLES
    assert found["communication"] and found["leaks"] == [] and found["overlap"] == 0
    assert "carry nothing that is shown" in found["verdict"]


@pytest.mark.parametrize("name", ["demo", "sst2", pytest.param("agnews", marks=pytest.mark.slow), "trec"])
def test_published_results_follow_from_their_records(name, kept):
    """V9: made again from the records, they are the results that were published, and README shows them."""
    found = made_again(kept(name))
    accuracy = {method: summary["accuracy"] for method, summary in found["methods"].items()}
    assert found["communication"] and found["p"] < 0.01 and found["n"] >= 500
    assert accuracy["bridge"] >= accuracy["probe"] - (0.03 if name == "demo" else 0.01)
    assert found["leaks"] == [], "a control beats the best constant answer"
    if name == "demo":
        assert demo_sentence(found) in unwrapped(README) and bytes_sentence(found) in unwrapped(README)
    else:
        assert results_line(name, found) in README


def test_readme_is_short():
    assert len(README.split()) <= 1500


def test_the_tables_show_the_numbers_of_the_files():
    assert benchmark_table() in TABLES
    assert benchmark_sentence() in unwrapped(TABLES)
    assert (ROOT / ".github" / "assets" / "demo.png").read_bytes().startswith(b"\x89PNG")


def commands() -> list[list[str]]:
    """Every LATENTWIRE.py command in the shell blocks of the READMEs, and in the examples of help, as words."""
    pages = [README, TABLES, *((ROOT / name / "README.md").read_text(encoding="utf-8") for name in ("slurm", "latex"))]
    blocks = re.findall(r"```bash\n(.*?)```", "".join(pages), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    typed = [words[2:] for words in found if words[:2] in (["python", "LATENTWIRE.py"], ["bash", "RUN.sh"])]
    return typed + [shlex.split(line) for text in lw.EXAMPLES.values() for line in re.findall(r"(?m)^  (\w.*)", text)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_documents_parses(words, capsys):
    assert words[0] in lw.COMMANDS
    if words[0] in ("train", "eval", "demo", "experiment", "slurm"):
        assert lw.main([*words, "--dry_run", "full"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", lw.EXAMPLES)
def test_examples_travel_with_the_file(command, capsys):
    assert lw.main([command, "--help-all"]) == 0
    assert unwrapped(lw.EXAMPLES[command].splitlines()[-1]) in unwrapped(capsys.readouterr().out)


def test_python_blocks_run_what_they_import():
    plugin = "".join(re.findall(r"(?m)^    (.*\n)", lw.EXAMPLES["train"]))
    for block in [plugin, *re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)]:
        compile(block, "README.md", "exec")
        for name in re.findall(r"(?:lw\.|from LATENTWIRE import )(\w+)", block):
            assert hasattr(lw, name), name


def test_readme_names_every_older_script_family_through_the_table():
    assert "list scripts" in README
    assert {words.split()[0] for words in lw.SCRIPTS.values()} <= set(lw.COMMANDS)


@pytest.fixture(scope="module")
def comparison(kept: Callable[[str], Path]) -> lw.ReportInputs:
    """The comparison of all rivals, from the records that are kept of it."""
    return lw.ReportInputs.below(kept("comparison"))


def test_the_comparison_follows_from_its_records(comparison):
    """V9: its table, the statistics and the paper's numbers are made again from them; one program made them all."""
    assert comparison.left == [] and lw.groups_table(comparison.groups).split("\n\n")[0] in TABLES
    kept = {
        (g["dataset"], name): m["mean"]
        for g in load("aggregated_results")["groups"]
        for name, m in g["methods"].items()
    }
    assert kept == {(c.key["dataset"], name): m["mean"] for c in comparison.groups for name, m in c.summaries.items()}
    told = [json.loads(json.dumps(lw.compared(column))) for column in comparison.groups]
    assert [own["comparisons"] for own in load("statistical_report")["columns"]] == [own["comparisons"] for own in told]
    numbers = (ROOT / "latex" / "tables" / "numbers.tex").read_text()
    count = sum(len(own) for c in comparison.groups for seeds in c.methods.values() for own in seeds.values())
    assert f"nrecords}}{{{count}}}" in numbers
    made = [member.facts["provenance"] for column in comparison.groups for member in column.members]
    assert len(made) == 3 * len(comparison.groups) and len({one["source_sha256"] for one in made}) == 1


def test_everything_that_was_trained_had_the_same_budget(comparison):
    """V5: updates, rows, and a choice between two learning rates on the same held-out rows; the paper says so."""
    for column in comparison.groups:
        for member in column.members:
            run, made = member.file.parent, member.facts["provenance"]
            config = json.loads((run / "config.json").read_text())
            assert (config["steps"], config["batch_size"], made["task"]["train_rows"]) == (120, 16, 192)
            words, usual = made["command"], lw.EvalSettings.fields()["rival_batch"].default
            assert int(words[words.index("--rival_epochs") + 1]) * 192 == 120 * usual
            tried = {row["method"]: row.get("validation_loss", {}) for row in lw.details_in(run).values()}
            assert all(len(tried[name]) == 2 for name in ("lora", "control:prompt_tuning"))
            others = run.parents[1] / "tries" / run.parent.name / run.name
            best = {folder.name: best_validation(folder) for folder in others.iterdir()}
            assert len(best) == 2 and best_validation(run) == max(best.values())
    assert "two learning rates" in unwrapped(TABLES)


def best_validation(run: Path) -> float:
    """What a training is chosen by: accuracy on held-out rows, then loss."""
    rows = lw.read_rows(run / "diagnostics.jsonl")
    return max(row["val_accuracy"] - 1e-3 * row["val_loss"] for row in rows if "val_loss" in row)


def test_readme_says_what_its_numbers_are_worth(kept):
    """V9: no number whose records are not kept; no claim beyond one seed."""
    found = json.loads((kept("mixed") / "results.json").read_text())
    words = unwrapped(README + TABLES)
    assert "One seed says nothing about the spread over seeds" in words and "is ahead of its probe" not in words
    notes = json.loads((kept("notes") / "results.json").read_text())
    others = words.replace(mixed_sentence(found), "").replace(notes_sentence(notes), "")
    agnostic = json.loads((kept("agnostic") / "results.json").read_text())
    others = others.replace(agnostic_sentence(agnostic), "")
    [answers] = kept("store").glob("*.jsonl")
    others = others.replace(store_sentence(lw.read_rows(answers)), "")
    for table in map(mixed_table, (found, notes, agnostic)):
        others = others.replace(unwrapped(table), "")
    assert not re.search(r"\bF1\b[^.|]*\d\d\.\d", others), "of other question answering no records were kept"
    assert "wherever more than one was tried" in (ROOT / "latex" / "main.tex").read_text()


FAULT = re.compile(r"\b[VSMDJU]\d+\b")


def test_every_known_fault_has_a_test():
    """The table of tests/README.md names for each fault a test whose docstring names it back."""
    rows = dict(re.findall(r"^\| ([VSMDJU]\d+) \| .* \| `(\S+)` \|$", (ROOT / "tests" / "README.md").read_text(), re.M))
    counts = {"V": 13, "S": 8, "M": 11, "D": 8, "J": 11, "U": 9}
    assert {*rows} == {f"{group}{n}" for group, count in counts.items() for n in range(1, count + 1)}
    for fault, place in rows.items():
        file, name = place.split("::")
        found = re.search(rf'def {name}\(.*?"""(.*?)"""', (ROOT / "tests" / file).read_text(), re.S)
        assert found and fault in FAULT.findall(found[1]), (fault, place)
