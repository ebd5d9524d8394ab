"""README says what is true: its commands parse, its numbers are those of the committed result files."""

import json
import re
import shlex
from pathlib import Path

import pytest

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "latex" / "results"
TABLE = ("sst2", "agnews", "trec")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def results_table() -> str:
    """README's table of results, from the files."""
    head = (
        "| data set (test rows) | **bridge** | 95 % CI | probe | full text | best control | best constant | largest p |"
    )
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name in TABLE:
        found = load(name)
        methods = {method: percent(s["accuracy"]) for method, s in found["methods"].items()}
        low, high = map(percent, found["methods"]["bridge"]["ci"])
        p = "< 1e-30" if found["p"] < 1e-30 else f"{found['p']:.1g}"
        lines.append(
            f"| {name} ({found['n']:,}) | **{methods['bridge']}** | {low}–{high} | {methods['probe']} | {methods['text']} "
            f"| {methods[found['best_control']]} | {percent(found['best_constant'])} | {p} |"
        )
    return "\n".join(lines)


def squad_table() -> str:
    """README's table of the interlingua on SQuAD, from the file: every method with its interval and p against the bridge."""
    found = load("squad")
    head = ("method", "F1", "95 % CI", "EM", "nats per answer token", "p against the latents")
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in found["methods"].items():
        low, high = map(percent, row["ci"])
        p = found["p_bridge_vs"].get(name)
        shown = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
        lines.append(
            f"| {lw.PLAIN_NAMES[name]} | {percent(row['f1'])} | {low}–{high} | {percent(row['em'])} "
            f"| {row['nll_per_token']:.2f} | {shown} |"
        )
    return "\n".join(lines)


def squad_sentence() -> str:
    """README's sentence on what was compressed, from the file."""
    c = load("squad")["compression"]
    return (
        f"{c['tokens']:.0f} receiver tokens become {c['latents']:.0f} latents, {c['sequence']:.1f} times fewer; in bytes "
        f"{c['utf8_bytes']:.0f} become {c['message_bytes']:.0f}, an expansion."
    )


def effects_table() -> str:
    """README's table of what each feature and loss does, from the file, largest gain first."""
    found = load("effects")
    rows = sorted(found["effects"].items(), key=lambda item: (-item[1]["difference"], item[0]))
    lines = ["| alone | accuracy | difference | 95 % CI | q |", "|---|--:|--:|--:|--:|"]
    for name, row in rows:
        low, high = (f"{100 * x:+.1f}" for x in row["ci"])
        q = "< 0.001" if row["q"] < 0.001 else f"{row['q']:.2g}"
        lines.append(
            f"| `{name}` | {percent(row['accuracy'])} | {100 * row['difference']:+.1f} | {low} to {high} | {q} |"
        )
    return "\n".join(lines)


def benchmark_table() -> str:
    """README's table of latency and throughput, from the file."""
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
    """README's reading of that table, from the file."""
    found = {row["arm"]: row["median_ms"] for row in load("benchmark")["latency"] if row["answer_tokens"] == 0}
    return (
        f"on this machine the receiver reads {load('benchmark')['input_tokens']} tokens of text in {found['text']:.0f} ms, and "
        f"the way over the bridge takes {found['bridge']:.0f} ms, or {found['bridge:cached']:.0f} ms where the sender's states "
        f"are there already. What latents save is writing: a note of 50 tokens makes the answer "
        f"{found['relay:50'] / found['bridge']:.0f} times slower."
    )


def compressors_table() -> str:
    """README's table of prompt compressors beside the latents, from the file."""
    lines = ["| method | times fewer tokens | F1 | 95 % CI | EM | p against the latents |", "|---|--:|--:|--:|--:|--:|"]
    for method, row in load("compressors")["rows"].items():
        p = row["p_bridge"]
        shown = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
        low, high = (percent(x) for x in row["ci"])
        name = lw.PLAIN_NAMES.get(method, method)
        lines.append(
            f"| {name} | {row['ratio']:.2f} | {percent(row['f1'])} | {low}–{high} | {percent(row['em'])} | {shown} |"
        )
    return "\n".join(lines)


def rivals_table() -> str:
    """README's table of all rivals over seeds, from the file."""
    groups = load("aggregated_results")["groups"]
    names = lw.in_order(name for group in groups for name in group["methods"])
    rows = []
    for name in names:
        told = [(group["methods"][name], group["methods"]["bridge"]["mean"]) for group in groups]
        cells = [lw.cell(own) + (" ↑" if own["mean"] > bridge else "") for own, bridge in told]
        rows.append([lw.PLAIN_NAMES.get(name, name), *cells])
    return lw.markdown(["method", *(f"{group['title']}, n {group['n']}" for group in groups)], rows)


def receivers_sentence() -> str:
    """README's sentence on several receivers, from the file."""
    runs = {name: percent(run["accuracy"]) for name, run in load("receivers")["runs"].items()}
    count = load("receivers")["runs"]["qwen2.5-coder-1.5b joined later"]["n"]
    return (
        f"On TREC, Gemma-3-270M and SmolLM2 reach {runs['gemma-3-270m together']} % and {runs['smollm2-135m together']} % "
        f"of {count} test questions when they are trained together ({runs['gemma-3-270m alone']} % and "
        f"{runs['smollm2-135m alone']} % each alone); Qwen2.5-Coder-1.5B, which joined later with the shared part frozen, "
        f"{runs['qwen2.5-coder-1.5b joined later']} % (300 steps, one seed)."
    )


def seeds_sentence() -> str:
    """README's warning about seeds, from the file."""
    others = load("effects")["other_seeds_of_base"]
    return f"other seeds of the plain bridge gave {', '.join(percent(value) for value in others.values())},"


def demo_sentence() -> str:
    """README's sentence on the demo, from the file."""
    found = load("demo")
    methods = {method: percent(s["accuracy"]) for method, s in found["methods"].items()}
    return (
        f"{methods['bridge']} % of {found['n']:,} held-out reviews right, against {methods[found['best_control']]} % for the "
        f"best control and {methods['probe']} % for a linear probe on the sender itself."
    )


def bytes_sentence() -> str:
    """README's sentence on bytes, from the file."""
    methods = load("demo")["methods"]
    return (
        f"a review of the demo has {methods['text']['bytes']:.0f} bytes of UTF-8 on average, its message "
        f"{methods['bridge']['bytes']:.0f}."
    )


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["demo", *TABLE])
def test_the_committed_results_hold_what_is_claimed(name):
    found = load(name)
    accuracy = {method: summary["accuracy"] for method, summary in found["methods"].items()}
    assert found["communication"]
    assert found["p"] < 0.01
    assert accuracy["bridge"] >= accuracy["probe"] - (0.03 if name == "demo" else 0.01)
    assert min(found["p_above_constant"].values()) > 0.05, "a control beats the best constant answer"
    assert found["n"] >= 500
    assert found["provenance"]["source_sha256"]


def test_readme_shows_the_numbers_of_the_files():
    assert results_table() in README
    assert demo_sentence() in unwrapped(README)
    assert bytes_sentence() in unwrapped(README)
    assert seeds_sentence() in unwrapped(README)
    assert effects_table() in README
    assert f"plain bridge ({percent(load('effects')['base']['accuracy'])} %)" in unwrapped(README)
    assert squad_table() in README
    assert benchmark_table() in README
    assert benchmark_sentence() in unwrapped(README)
    assert receivers_sentence() in unwrapped(README)
    assert compressors_table() in README
    assert squad_sentence() in unwrapped(README)
    assert rivals_table() in README
    assert (ROOT / ".github" / "assets" / "demo.png").read_bytes().startswith(b"\x89PNG")


def commands() -> list[list[str]]:
    """Every LATENTWIRE.py command in README's shell blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[2:] for words in found if words[:2] in (["python", "LATENTWIRE.py"], ["bash", "RUN.sh"])]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_readme_parses(words, capsys):
    assert words[0] in lw.command_names()
    if words[0] in ("train", "eval", "demo", "experiment", "slurm"):
        assert lw.main([*words, "--dry_run"]) == 0, capsys.readouterr().err


def test_readme_python_block_runs_what_it_imports():
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(block, "README.md", "exec")
        for name in re.findall(r"(?:lw\.|from LATENTWIRE import )(\w+)", block):
            assert hasattr(lw, name), name


def test_readme_names_every_older_script_family_through_the_table():
    assert "list scripts" in README
    assert {words.split()[0] for words in lw.SCRIPTS.values()} <= set(lw.command_names())
