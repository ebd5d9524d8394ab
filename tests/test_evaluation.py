"""Evaluation: one door for all methods, controls that carry nothing, resumable records, the verdict, the page."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOY, edit_state

import LATENTWIRE as lw

pytestmark = pytest.mark.trains


@pytest.fixture
def run(toy_run, tmp_path) -> Path:
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


@pytest.fixture
def channel(toy_run) -> lw.EvalContext:
    settings = lw.EvalSettings(checkpoint=toy_run, num_samples=60, state_cache="memory")
    return lw.open_context(settings, lw.Checkpoint.open(toy_run))


def evaluate(run: Path, *flags: str) -> dict:
    return lw.eval_main(["--checkpoint", str(run), "--num_samples", "60", "--state_cache", "memory", *flags])


def test_toy_bridge_beats_every_control(run):
    results = evaluate(run)
    bridge = results["methods"]["bridge"]
    assert results["communication"] and results["verdict"].startswith("communication shown")
    assert bridge["accuracy"] > 0.9 and bridge["ci"][0] <= bridge["accuracy"] <= bridge["ci"][1]
    controls = [name for name in results["methods"] if lw.METHODS[name].control]
    assert len(controls) == 5 and all(results["methods"][name]["accuracy"] < 0.6 for name in controls)
    assert results["latent"]["f1"] == bridge["f1"] and results["text"] == results["methods"]["text"]
    assert json.loads((run / "results.json").read_text())["schema"] == 2


def test_results_follow_from_the_records(run):
    results = evaluate(run)
    rows = [row for row in lw.read_rows(run / "records.jsonl") if row["method"] == "bridge"]
    assert len(rows) == results["n"] == 60
    assert sum(row["correct"] for row in rows) / 60 == results["methods"]["bridge"]["accuracy"]
    assert all(row["correct"] == (row["scores"].index(max(row["scores"])) == row["label"]) for row in rows)


def test_killed_evaluation_goes_on_where_it_stopped(run, monkeypatch):
    whole = evaluate(run)
    path = run / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:50]) + lines[50][:20])  # killed inside a write
    answered = []
    answers = lw.Receiver.answers

    def counting(self, examples, data, text=False):
        answered.extend(examples)
        return answers(self, examples, data, text)

    monkeypatch.setattr(lw.Receiver, "answers", counting)
    again = evaluate(run)
    methods = len(whole["methods"]) - 1  # the probe does not listen
    assert len(answered) == methods * 60 - 50
    for name in whole["methods"]:
        assert again["methods"][name]["accuracy"] == whole["methods"][name]["accuracy"]
    assert path.read_bytes().startswith(b"".join(lines[:50]))
    answered.clear()
    evaluate(run)
    assert answered == []
    evaluate(run, "--fresh_eval")
    assert len(answered) == methods * 60


def test_what_is_heard_counts_from_the_next_method_on(run, monkeypatch):
    """Batches of one method know nothing of each other, so that processes can share them and change no bit."""
    sizes, listen = [], lw.Receiver.listen

    def counting(self, examples, *rest):
        sizes.append(len(examples))
        return listen(self, examples, *rest)

    monkeypatch.setattr(lw.Receiver, "listen", counting)
    evaluate(run, "--methods", "bridge,control:zero,control:shuffled", "--batch_size", "20")
    bridge, zero, shuffled = sizes[:3], sizes[3:6], sizes[6:]
    assert bridge == [20, 20, 20] and max(zero) <= 4 and sum(zero) > 4  # once for each class and batch
    assert 0 < sum(shuffled) < 60  # another text's message with the same answer was the bridge's


def test_an_evaluation_done_anew_goes_on_when_it_was_stopped(run, monkeypatch):
    """J11: --fresh_eval threw away what it had computed minutes before, and under a time limit never ended."""
    evaluate(run, "--methods", "bridge,control:zero,text")
    first = (run / "records.jsonl").read_text().splitlines()
    plain = lw.ZeroControl.message
    monkeypatch.setattr(lw.ZeroControl, "message", lambda *_: lw.os.kill(lw.os.getpid(), lw.signal.SIGTERM))
    with pytest.raises(lw.Interrupted):
        evaluate(run, "--fresh_eval", "--methods", "bridge,control:zero,text")
    assert {row["method"] for row in lw.read_rows(run / "records.jsonl")} == {"bridge"}
    monkeypatch.setattr(lw.ZeroControl, "message", plain)
    monkeypatch.setattr(lw.BridgeMethod, "message", lambda *_: 1 / 0)  # its rows are there
    results = evaluate(run, "--fresh_eval", "--methods", "bridge,control:zero,text")
    assert "failed" not in results and len(lw.read_rows(run / "records.jsonl")) == 180
    assert (run / "records-replaced.jsonl").read_text().splitlines() == first
    assert not (run / "fresh_eval.json").exists()


def test_a_control_that_lost_a_row_is_not_forgotten(run, capsys):
    """V2: a later evaluation of other methods left it out of the verdict without a word."""
    evaluate(run)
    path = run / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = next(line for line in lines if '"control:mean"' in line)
    path.write_text("".join(line for line in lines if line != lost))
    with pytest.raises(
        lw.LatentWireError, match="has 59 of 60 rows of control:mean, a control of the evaluation before"
    ):
        evaluate(run, "--methods", "bridge,control:shuffled")
    row = json.loads(lost)
    kept = {name: row[name] for name in ("key", "method", "id", "gold", "label")}
    path.write_text(path.read_text() + json.dumps(lw.sealed(kept | {"error": "out of memory"})) + "\n")
    found = evaluate(run, "--methods", "bridge,control:shuffled")
    assert found["failed"] == {"control:mean": 1} and found["verdict"].startswith("not tested: rows failed")


def test_records_without_their_sums_are_not_taken_over(run):
    """S5: all of a method's sums removed, its answers changed."""
    evaluate(run, "--methods", "bridge,control:shuffled")
    path = run / "records.jsonl"
    rows = [{k: v for k, v in row.items() if k != "sum"} for row in lw.read_rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(lw.LatentWireError, match="of bridge lost its sum; remove that line or add --fresh_eval"):
        evaluate(run, "--methods", "bridge,control:shuffled")
    bare = lw.sealed({k: v for k, v in rows[0].items() if k not in ("prediction", "correct", "scores")})
    path.write_text("".join(json.dumps(lw.sealed(row)) + "\n" for row in rows[1:]) + json.dumps(bare) + "\n")
    with pytest.raises(lw.LatentWireError, match=r"record of bridge on example .* has no 'correct'; evaluate again"):
        lw.open_evaluation(run)


def test_a_failed_example_is_a_row_with_its_error(run, monkeypatch):
    def broken(self, example):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lw.ZeroControl, "message", broken)
    results = evaluate(run)
    zero = results["methods"]["control:zero"]
    assert zero["errors"] == 60
    assert results["failed"] == {"control:zero": 60}
    assert not results["communication"]
    assert results["verdict"].startswith("not tested: rows failed")
    assert "out of memory" in lw.read_rows(run / "records.jsonl")[60]["error"]


def test_a_bridge_that_carries_nothing_gets_no_credit(run, monkeypatch):
    monkeypatch.setattr(lw.BridgeMethod, "message", lw.MeanControl.message)
    results = evaluate(run)
    assert not results["communication"] and results["verdict"].startswith("no communication shown")


def test_controls_do_not_use_their_own_text_and_the_bridge_does(channel):
    method = {
        name: lw.METHODS[name](channel) for name in ("bridge", "control:shuffled", "control:zero", "control:mean")
    }
    first, second = channel.examples[:2]
    assert method["bridge"].message(first) == channel.messages[0] != method["bridge"].message(second)
    assert method["control:zero"].message(first) == method["control:zero"].message(second)
    assert method["control:mean"].message(first) == method["control:mean"].message(second)
    partner = method["control:shuffled"].partner
    assert sorted(partner) == list(range(60)) and all(i != p for i, p in enumerate(partner))


def test_gaussian_control_has_the_size_of_the_message(channel):
    noise = lw.Message.from_bytes(lw.GaussianControl(channel).message(channel.examples[3])).latents
    assert noise.square().mean().sqrt() == pytest.approx(float(channel.latents[3].square().mean().sqrt()), rel=0.1)
    assert not torch.equal(noise[0], channel.latents[3])


def test_probe_equals_scikit_learn_called_directly(channel):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = lw.METHODS["probe"](channel)
    train, part = channel.setup.splits["train"], channel.setup.part
    chosen = probe.best[0][-1].C

    def mean_state(example):
        ids = [lw.sender_ids(channel.setup.sender, part.sender_text(example), 256)]
        return channel.setup.sender.states(ids, channel.bridge.shape.layers).hidden[0].mean(1).flatten().numpy()

    direct = make_pipeline(StandardScaler(), LogisticRegression(C=chosen, max_iter=1000))
    direct.fit([mean_state(e) for e in train], [e.label for e in train])
    wanted = direct.predict([mean_state(e) for e in channel.examples])
    assert [lw.argmax(answer.scores) for answer in probe.answers(channel.examples)] == list(wanted)


def test_the_probe_reads_the_states_that_training_kept(toy_run, tmp_path, monkeypatch):
    stores, collect = [], lw.collect_states
    monkeypatch.setattr(lw, "collect_states", lambda *a: stores.append(collect(*a)) or stores[-1])
    lw.evaluate(toy_run, methods=["probe"], num_samples=9, output_dir=tmp_path)
    of_training = max(stores, key=lambda store: len(store.index))
    assert len(of_training.index) > 9 and of_training.source.startswith("cached in")


def test_bytes_are_those_of_the_message(channel):
    answer = lw.BridgeMethod(channel).answers(channel.examples[:1])[0]
    assert (
        answer.nbytes
        == len(channel.messages[0])
        > channel.bridge.shape.settings.latent_len * channel.bridge.shape.settings.d_z * 2
    )


@pytest.mark.parametrize(
    "spelling", ["", "checkpoint", "checkpoint/best", "bridge_toy.pt", "bridge.pt", "epoch24", "checkpoint/bridge.pt"]
)
def test_every_spelling_of_a_checkpoint_resolves(run, spelling):
    assert lw.resolve_checkpoint(run / spelling) == run / "checkpoint" / "best"


def test_runs_checkpoint_means_the_newest_run(run):
    assert lw.resolve_checkpoint(run.parent / "checkpoint") == run / "checkpoint" / "best"
    assert lw.resolve_checkpoint(run.parent / "ru*" / "epoch24") == run / "checkpoint" / "best"


def test_checkpoint_killed_between_renames_is_recovered(run):
    best = run / "checkpoint" / "best"
    best.rename(best.with_name(".best.old"))
    assert lw.resolve_checkpoint(run) == best and best.exists()


@pytest.mark.slow
def test_report_and_figures_are_drawn_from_the_records(run):
    evaluate(run)
    page = lw.write_report(run).read_text()
    assert page.count("data:image/png;base64,") == 5 and "communication shown" in page and "<script" not in page
    for name in ("methods.png", "learning_curve.png"):
        assert (run / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_report_without_results_says_what_to_type(run):
    with pytest.raises(lw.LatentWireError, match="eval --checkpoint"):
        lw.write_report(run)


def test_seed_folders_are_evaluated_together(toy_run, tmp_path):
    for seed in (1, 2):
        shutil.copytree(toy_run, tmp_path / "sweep" / f"seed{seed}")
    merged = lw.eval_main(
        ["--checkpoint", str(tmp_path / "sweep"), "--num_samples", "20", "--methods", "bridge,control:zero"]
    )
    assert merged["seeds"] == ["seed1", "seed2"] and merged["methods"]["bridge"]["sd"] == 0.0
    assert (tmp_path / "sweep" / "results.json").exists()


def test_seeds_of_which_one_has_more_methods_are_evaluated_together(toy_run, tmp_path):
    """J9: what an earlier evaluation of one seed had was looked for in all of them."""
    for seed in (1, 2):
        shutil.copytree(toy_run, tmp_path / "sweep" / f"seed{seed}")
    few = ["--num_samples", "12", "--methods"]
    lw.eval_main(["--checkpoint", str(tmp_path / "sweep" / "seed1"), *few, "bridge,control:zero,text"])
    merged = lw.eval_main(["--checkpoint", str(tmp_path / "sweep"), *few, "bridge,control:zero"])
    assert {name: len(found["values"]) for name, found in merged["methods"].items()} == {
        "bridge": 2, "text": 1, "control:zero": 2,
    }  # fmt: skip


def test_a_second_seed_computes_only_what_depends_on_it(tmp_path, monkeypatch):
    flags = [*TOY, "--steps", "4", "--width", "32", "--seeds", "1,2", "--output_dir", str(tmp_path / "runs")]
    lw.train_main(flags)
    asked: list[tuple[str, int]] = []
    compute = lw.compute_rows

    def watched(method, examples, size, save):
        asked.append((method.name, len(examples)))
        compute(method, examples, size, save)

    monkeypatch.setattr(lw, "compute_rows", watched)
    methods = ["--methods", "bridge,text,control:none,control:mean,probe", "--num_samples", "24"]
    merged = lw.eval_main(["--checkpoint", str(tmp_path / "runs"), *methods])
    assert sorted(asked) == sorted(
        [(name, 24) for name in ("bridge", "control:mean") for _ in "12"]
        + [(name, 24) for name in ("text", "control:none", "probe")]
    )
    rows = [lw.read_rows(tmp_path / "runs" / f"seed{seed}" / "records.jsonl") for seed in (1, 2)]
    for name in ("text", "control:none", "probe"):
        assert [r for r in rows[0] if r["method"] == name] == [r for r in rows[1] if r["method"] == name]
        assert merged["methods"][name]["sd"] == 0
    told = [run["details"]["probe"] for run in merged["runs"]]
    assert told[0] == told[1] and told[0]
    asked.clear()
    lw.eval_main(["--checkpoint", str(tmp_path / "runs"), *methods, "--fresh_eval"])
    assert len(asked) == 10


def test_a_line_that_another_seed_is_writing_is_left_alone(tmp_path):
    ours, theirs = tmp_path / "seed1", tmp_path / "seed2"
    for folder in (ours, theirs):
        folder.mkdir()
    written = b'{"method": "text", "key": "k", "id": "1", "gold": ["a"], "f1": 0.5}\n{"method": "text", "ke'
    (theirs / "records.jsonl").write_bytes(written)
    assert [row["id"] for row in lw.rows_of_other_seeds(ours)] == ["1"]
    assert (theirs / "records.jsonl").read_bytes() == written
    assert not [*lw.rows_of_other_seeds(tmp_path / "other")]


@pytest.mark.slow
def test_question_answering_task_trains_and_scores_f1(tmp_path):
    rows = [{"context": f"the {c} cat sat", "question": "colour", "answer": c} for c in ("red", "blue", "green") * 40]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({**r, "context": f"{i} {r['context']}"}) + "\n" for i, r in enumerate(rows)))
    base = ["--sender", "tiny-llama", "--receiver", "tiny-gemma", "--device", "cpu", "--state_cache", "memory"]
    plugin = tmp_path / "plug.py"
    plugin.write_text(
        "import json, pathlib, LATENTWIRE as lw\n"
        "@lw.task('colours')\n"
        "class Colours(lw.QuestionAnswering):\n"
        "    '''Colours: a plug-in task.'''\n"
        "    def load(self, split):\n"
        f"        rows = [json.loads(l) for l in pathlib.Path({str(data)!r}).read_text().splitlines()]\n"
        "        found = [lw.Example(str(i), r['context'], r['question'], (r['answer'],)) for i, r in enumerate(rows)]\n"
        "        return (found[:30] if split == 'test' else found[30:]), 'plug-in'\n"
    )
    run = ["--dataset", "colours", "--plugin", str(plugin), "--steps", "30", "--output_dir", str(tmp_path / "run")]
    lw.train_main([*base, *run])
    results = lw.eval_main(["--checkpoint", str(tmp_path / "run"), "--state_cache", "memory"])
    assert results["headline"] == "f1" and "probe" not in results["methods"]
    assert 0 <= results["latent"]["f1"] <= 1 and results["latent"]["nll_per_token"] > 0


DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder at {DATA}")
@pytest.mark.parametrize(
    "dataset",
    [
        name if name in ("sst2", "gsm8k") else pytest.param(name, marks=pytest.mark.slow)
        for name in lw.TASKS
        if lw.TASKS[name].folder
    ],
)
def test_every_published_dataset_trains_and_evaluates(dataset, tmp_path):
    base = ["--data_dir", str(DATA), "--device", "cpu", "--state_cache", "memory"]
    pair = ["--sender", "tiny-llama", "--receiver", "tiny-gemma", "--dataset", dataset, "--max_tokens", "48"]
    size = ["--samples", "24", "--val_samples", "8", "--steps", "2", "--batch_size", "4", "--width", "32"]
    lw.train_main([*base, *pair, *size, "--output_dir", str(tmp_path / "run")])
    methods = "bridge,control:none,probe"
    results = lw.eval_main([*base, "--checkpoint", str(tmp_path / "run"), "--num_samples", "6", "--methods", methods])
    bridge = results["latent"]
    assert bridge["errors"] == 0
    assert bridge[results["headline"]] is not None
    assert ("probe" in results["methods"]) is bool(lw.make_task(lw.TrainSettings(dataset=dataset)).words)


def test_a_run_without_validation_rows_still_has_a_best_checkpoint(tmp_path):
    tiny = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--dataset", "toy", "--device", "cpu"]
    flags = ["--steps", "2", "--val_samples", "0", "--state_cache", "memory", "--output_dir", str(tmp_path / "run")]
    lw.train_main([*tiny, *flags])
    assert lw.resolve_checkpoint(tmp_path / "run").name == "best"


def test_a_data_set_is_never_reported_by_a_run_trained_on_its_relative(run):
    edit_state(run / "checkpoint" / "best", lambda state: state["settings"].update(dataset="rotten_tomatoes"))
    with pytest.raises(lw.LatentWireError, match="share texts"):
        evaluate(run, "--dataset", "sst2")


def own_csv(path: Path, count: int, salt: str) -> Path:
    words = ("good", "bad")
    lines = [f"{salt}{i} {'abcd'[i % 2] * 5},{words[i % 2]}" for i in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


def test_another_own_file_is_evaluated_whole_and_training_rows_are_refused(tmp_path):
    train, other = own_csv(tmp_path / "train.csv", 100, "x"), own_csv(tmp_path / "other.csv", 30, "y")
    pair = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu", "--state_cache", "memory"]
    lw.train_main([*pair, "--dataset", str(train), "--steps", "2", "--output_dir", str(tmp_path / "run")])
    results = lw.eval_main(["--checkpoint", str(tmp_path / "run"), "--dataset", str(other), "--state_cache", "memory"])
    assert (results["n"], results["overlap"]) == (30, 0)
    assert "probe" not in results["methods"]
    assert not (tmp_path / "run" / "results.json").exists()
    copy = tmp_path / "copy.csv"
    copy.write_text(train.read_text())
    with pytest.raises(lw.LatentWireError, match="are training rows"):
        lw.eval_main(["--checkpoint", str(tmp_path / "run"), "--dataset", str(copy), "--state_cache", "memory"])


def test_results_of_another_bridge_are_never_overwritten(run, tmp_path):
    evaluate(run)
    kept = json.loads((run / "results.json").read_text())
    kept["provenance"]["bridge"] = "another"
    (run / "results.json").write_text(json.dumps(kept))
    with pytest.raises(lw.LatentWireError, match="another bridge"):
        evaluate(run)
