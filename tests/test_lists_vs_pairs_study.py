"""The study of lists and pairs: its intervals, its arms, and that it runs, resumes and repeats itself exactly."""

import json
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from trl_larpo import DataError
from trl_larpo.candidates import Candidate

FOLDER = Path(__file__).parents[1] / "examples" / "studies" / "lists_vs_pairs"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("arms", "claims", "effects", "experiment", "figures", "publish", "results", "study", "tasks", "workers")
    yield lambda name: __import__(name)
    for name in names:
        sys.modules.pop(name, None)


def test_interval_covers_the_truth_as_often_as_it_says(modules):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        of_seeds, of_prompts = rng.normal(0, 0.05, (4, 1)), rng.normal(0, 0.3, (1, 40))
        effect = modules("effects").effect(0.1 + of_seeds + of_prompts + rng.normal(0, 0.2, (4, 40)))
        covered += effect.low <= 0.1 <= effect.high
    assert 0.93 <= covered / 500 <= 0.99


def test_two_seeds_give_no_interval(modules):
    effect = modules("effects").effect(np.random.default_rng(0).normal(0.2, 0.01, (2, 30)))
    assert effect.verdict == "too few seeds" and str(effect) == f"{effect.mean:+.3f}"


def test_interval_of_prompts_without_noise_is_that_of_the_seeds_alone(modules):
    of_seeds = np.array([0.1, 0.3, 0.2])
    effect = modules("effects").effect(np.repeat(of_seeds[:, None], 50, axis=1))
    assert (effect.low, effect.high) == pytest.approx(stats.ttest_1samp(of_seeds, 0).confidence_interval(0.95))


def test_interval_covers_the_truth_where_one_arm_varies_more_than_others(modules):
    """And where seeds have groups of arms in common: an estimate from all arms together covers it less often."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        baseline, arm = rng.normal(0, 0.12, (5, 1)), rng.normal(0, 0.02, (5, 1))
        effect = modules("effects").effect(arm - baseline + rng.normal(0, 0.1, (1, 16)) + rng.normal(0, 0.1, (5, 16)))
        covered += effect.low <= 0 <= effect.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_seeds_needed_are_enough(modules):
    effects, rng = modules("effects"), np.random.default_rng(0)

    def draw(num_seeds):
        return rng.normal(0, 0.05, (num_seeds, 1)) + rng.normal(0, 0.1, (num_seeds, 200))

    needed = effects.seeds_needed(draw(200), 0.03)
    assert effects.effect(draw(needed)).half_width == pytest.approx(0.03, rel=0.5)
    assert effects.seeds_needed(rng.normal(0, 1, (5, 1)) + rng.normal(0, 3, (1, 9)), 0.01) is None


REWARDS = [1.0, 0.75, 0.75, 0.5, 0.25, 0.0]


def chosen(modules, arm, rewards=REWARDS):
    ranked = [Candidate(f"text {place}", reward) for place, reward in enumerate(rewards)]
    lists = modules("arms").ARMS[arm].choose(ranked, random.Random(0))
    assert all(candidate in ranked for made in lists for candidate in made)
    return [[candidate.reward for candidate in made] for made in lists]


def test_what_the_arms_train_on(modules):
    assert chosen(modules, "best_worst") == [[1.0, 0.0]]
    assert chosen(modules, "nested_pairs") == [[1.0, 0.0], [0.75, 0.25], [0.75, 0.5]]
    assert chosen(modules, "nested_pairs", [1.0, 0.5, 0.5, 0.0]) == [[1.0, 0.0]]
    assert chosen(modules, "contrastive_1_3") == [[1.0, 0.5, 0.25, 0.0]]
    assert chosen(modules, "lambdarank_2_2") == [[1.0, 0.75, 0.25, 0.0]]
    assert chosen(modules, "lambdarank_2_2", [1.0, 0.5, 0.0]) == [[1.0, 0.5, 0.0]]
    assert chosen(modules, "lambdarank") == [REWARDS]
    [[better, worse]] = chosen(modules, "random_pair")
    assert better > worse


def test_low_candidate_is_at_the_mean_minus_two_standard_deviations(modules):
    rewards = [2.0, *[0.0] * 20, -3.0, -10.0]  # mean -0.48, standard deviation 2.16: nearest to -4.8
    assert chosen(modules, "best_low", rewards) == [[2.0, -3.0]]
    assert chosen(modules, "best_low") == [[1.0, 0.0]]  # mean 0.54, standard deviation 0.34: nearest to -0.14


def test_arms_are_options_that_the_trainer_takes(modules, tmp_path):
    from trl_larpo.run.options import RunTrainingConfig

    experiment = modules("experiment")
    for name, arm in modules("arms").ARMS.items():
        found = experiment.Experiment("four_rules", name, 1e-5, 0)
        RunTrainingConfig(str(tmp_path), **found.settings)
        assert found.settings.items() >= arm.options.items() and found.file_name.endswith("_seed0.json")


def test_tasks_hold_out_what_they_do_not_train_on(modules):
    tasks, size = modules("tasks"), modules("experiment").WHOLE
    for name, make in tasks.GRADED_TASKS.items():
        task = make()
        assert len(task.train) >= size.prompts and len(task.held_out) >= size.held_out, name
        parts = (task.train, task.held_out, task.tuning, task.tuning_train)
        assert len(task.tuning) == 64 and len(task.tuning_train) >= size.prompts, name
        numbers = [{frozenset(re.findall(r"\d+", str(row["prompt"]))) for row in part} for part in parts]
        topics = [{row.get("topic") for row in part} for part in parts]
        kept_apart = numbers if name == "close_sums" else topics
        assert sum(map(len, kept_apart)) == len(set().union(*kept_apart)), name


def test_topic_is_a_word_of_the_answer(modules):
    is_about, topics = modules("tasks").is_about, modules("tasks").TOPICS
    assert all(is_about(f"We like {topic}.", topic) for topic in topics)
    for topic, text in {"tomatoes": "A tomato", "wolves": "The wolf's", "butterflies": "Butterfly"}.items():
        assert is_about(text, topic)
    for topic, text in {"ants": "important", "rain": "the brain", "ice": "nice", "tea": "a teacher"}.items():
        assert not is_about(text, topic)
    rewards = modules("tasks").rules_about_topic(
        [""] * 2, ["We all like snow and ice", "We all like rain and hail"], topic=["snow"] * 2, finished=[True] * 2,
        instructions=[["no_commas", "min_words"]] * 2, values=[["", "9"]] * 2,
    )  # fmt: skip
    assert rewards == [0.5, 0.0]


def test_closeness(modules):
    texts, right = ["It is 8.", "8 + 1 = 9", "ten", "It is 8"], [8, 8, 10, 8]
    rewards = modules("tasks").closeness([""] * 4, texts, answer=right, finished=[True, True, True, False])
    assert rewards == [1.0, 0.5, 0.0, 0.0]


@pytest.fixture
def tiny_study(modules, project, talkative_model, monkeypatch):
    """The study with a tiny model, a task that it can get better at, and in this process."""
    study, experiment, tasks = modules("study"), modules("experiment"), modules("tasks")
    rows = [{"prompt": [{"role": "user", "content": f"{i} why is the dog blue"}]} for i in range(24)]
    task = tasks.Task(rows[:8], rows[8:16], "run_rewards:vowels", 24, rows[16:], rows[:8])
    monkeypatch.setattr(experiment, "GRADED_TASKS", {"four_rules": lambda: task})
    monkeypatch.setattr(study, "MODEL", talkative_model)
    monkeypatch.setattr(study, "LEARNING_RATES", (1e-3, 2e-3))
    no_warm_up = {"lr_scheduler_type": "constant", "warmup_steps": 0}  # its two lists are one step
    monkeypatch.setattr(experiment, "SETTINGS", experiment.SETTINGS | no_warm_up)
    monkeypatch.setattr(study, "FIRST_RATES", slice(0, 2))

    def run(*words):
        monkeypatch.setattr(
            sys, "argv", ["study.py", "--small", "--workers", "0", "--device", "cpu", "--tasks", "four_rules", *words]
        )
        study.main()
        return {path.name: path.read_bytes() for path in Path("outputs/lists_vs_pairs_small").rglob("*_seed*.json")}

    return run


def test_claims_compare_runs_that_there_are(modules):
    claims, config = modules("claims"), modules("claims").RunConfig
    compared = {name for claim in claims.CLAIMS.values() for name in claim}
    assert compared == claims.RUNS.keys()
    train = modules("tasks").four_rules().train
    for name, options in claims.RUNS.items():
        assert claims.num_prompts(options) <= len(train), name
        config(**claims.Variation("four_rules", name, 0).options)
    # At equal numbers of samples
    of = {name: claims.num_prompts(options) * options["num_samples"] for name, options in claims.RUNS.items()}
    assert of["list_8"] == of["list_2_more_prompts"]
    assert of["fresh_none"] == of["iterations_1"] == of["iterations_6"] == of["reference_initial"]


def write_results(folder, gains, num_seeds=3):
    """Results of the arms and runs with given gains over a reward of 0.5, on 20 prompts."""
    budget = {"steps": 4, "samples": 8, "candidates": 8, "tokens": 99}
    for seed in range(num_seeds):
        for name, gain in gains.items():
            rewards = list(np.linspace(0.4, 0.6, 20) + gain)
            measured = {"reward": float(np.mean(rewards)), "finished": 1.0, "tokens": 20.0}
            result = {
                "seed": seed,
                "settings": {"learning_rate": 1e-5},
                "basis": {},
                "budget": budget,
                "rewards": rewards,
            }
            result |= {"start": measured, "end": measured}
            path = folder / (
                f"{name}_seed{seed}.json"
                if name.startswith("claims/")
                else f"reported/four_rules_{name}_seed{seed}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))


def test_tables_and_pictures_show_the_differences(modules, tmp_path, capsys):
    gains = {"best_worst": 0.0, "lambdarank": 0.1, "listmle": -0.05, "best_worst_sums": 0.02}
    of_claims = {"claims/memory_none": 0.0, "claims/memory_all": 0.04}
    write_results(tmp_path, gains | of_claims)
    results = modules("results").Results(tmp_path)
    assert "| LambdaRank | 3 | 1e-05 | 0.600 | +0.100 [+0.100, +0.100] | 4 | 99 | 100% | 20 |" in results.table(
        "four_rules"
    )
    assert "| LambdaRank |  |  | 0.600, 0.600, 0.600 |" in results.seeds_table("four_rules")
    modules("claims").print_tables(results, ["memory", "reference"])
    printed = capsys.readouterr().out
    assert (
        "| all | 3 | 0.540 | +0.040 [+0.040, +0.040] | 8 | 8 | 4 | 99 | 20 |" in printed and "reference" not in printed
    )
    publish = modules("publish")
    pictures = publish.draw(results, tmp_path / "pictures")
    assert [path.name for path in pictures] == ["lists_vs_pairs_four_rules.png", "lists_vs_pairs_claims.png"]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    page = "# A\n\n<!-- results: effects four_rules -->\nold\n<!-- end of results -->\n\nB\n"
    page += "<!-- results: claim list_size -->\n<!-- end of results -->\n"
    once = publish.filled(page, results)
    assert "| LambdaRank | +0.10, +0.10, +0.10 | +0.100 [+0.100, +0.100] | better | 2 |\n" in once
    assert "Not run yet." in once and "old" not in once and once.count("<!--") == page.count("<!--")
    assert publish.filled(once, results) == once
    assert publish.more_steps_table(results, "four_rules") == []
    write_results(tmp_path, {"nested_pairs": 0.2})
    assert "| LambdaRank | -0.100 [-0.100, -0.100] | worse |" in publish.more_steps_table(results, "four_rules")


def test_seeds_that_chose_an_arm_do_not_count_for_it(modules, tmp_path):
    arms, results = modules("arms"), modules("results").Results(tmp_path)
    screened, promising = arms.SCREENING_SEEDS, arms.PROMISING_SEEDS
    all_seeds = (*screened, *promising)
    of_arms = {"best_worst": all_seeds, "listnet": all_seeds, "lambdarank": screened, "approx_ndcg": screened}
    for arm, seeds in of_arms.items():
        for seed in seeds:
            gain = 0.0 if arm == "best_worst" else 0.5 if seed in screened else 0.1
            path = tmp_path / "reported" / f"four_rules_{arm}_seed{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"settings": {}, "basis": {}, "rewards": [gain] * 4}))
    assert results.effect("four_rules", "listnet").mean == pytest.approx(0.1)
    assert results.effect("four_rules", "listnet").num_seeds == len(promising)
    assert results.effect("four_rules", "lambdarank").mean == results.effect("four_rules", "approx_ndcg").mean == 0.5
    assert results.effect("four_rules", "lambdarank", other="listnet") is None  # nor where others are compared with it


def test_results_of_several_kinds_are_not_averaged(modules, tmp_path):
    results = modules("results").Results(tmp_path)
    for arm, seed, settings, basis in (("best_worst", 0, 1, 1), ("listnet", 0, 1, 1), ("listnet", 1, 2, 1),
                                       ("listmle", 0, 1, 2)):  # fmt: skip
        path = tmp_path / "reported" / f"four_rules_{arm}_seed{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "basis": basis, "rewards": [0.5]}))
    assert results.rewards("four_rules", "listnet", [0]) == [[0.5]]
    for arm, seeds in (("listnet", [0, 1]), ("listmle", [0])):
        with pytest.raises(DataError, match=f"Results of {arm} on four_rules in .* are of several kinds"):
            results.rewards("four_rules", arm, seeds)


def test_negatives_of_the_claim_are_those_that_it_names(modules):
    """Also beside truncated samples, which would come last otherwise."""
    from trl_larpo.candidates import CandidatePool, Selection, build_list
    from trl_larpo.prompts import Prompt

    candidates = [Candidate("good", 0.75), Candidate("bad", 0.0), Candidate("cut", finished=False)]
    candidates += [Candidate("negative", 0.0, source="random_prompt")]
    for name in modules("claims").CLAIMS["negatives"]:
        options = modules("claims").RUNS[name]
        of_selection = {key: options[key] for key in ("num_best", "num_worst", "truncated_completions")}
        made = build_list(CandidatePool(Prompt.of("why"), candidates), Selection(**of_selection))
        assert [candidate.completion for candidate in made.selected] == ["good", "negative"]


def test_verdict_is_what_the_interval_allows(modules):
    def verdict(low, high, num_seeds=5):
        return modules("effects").Effect((low + high) / 2, low, high, num_seeds).verdict

    assert verdict(0.01, 0.02) == "better" and verdict(-0.3, -0.1) == "worse"
    assert verdict(-0.02, 0.03) == "no difference" and verdict(-0.02, 0.04) == "cannot tell"
    assert verdict(0.1, 0.2, num_seeds=2) == "too few seeds"


def test_tables_of_the_docs_are_those_of_the_results(modules):
    publish, results = modules("publish"), modules("results").Results(FOLDER / "results")
    for path in publish.PAGES:
        text = path.read_text(encoding="utf-8")
        assert publish.filled(text, results) == text, f"{path}: run publish.py"
        assert text.count("<!-- results: ") == text.count("<!-- end of results -->") > 0


def test_pictures_of_the_docs_can_be_drawn_again(modules, tmp_path):
    publish, results = modules("publish"), modules("results").Results(FOLDER / "results")
    images = publish.DOCS / "images"
    drawn = publish.draw(results, tmp_path)
    assert {path.name for path in drawn} == {path.name for path in images.glob("lists_vs_pairs_*.png")}
    for path in drawn:
        old, new = (image.imread(folder / path.name) for folder in (images, tmp_path))
        assert old.shape == new.shape and np.abs(old - new).mean() < 0.02, f"{path.name}: run publish.py"


@pytest.fixture
def setup(modules, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return modules("experiment").Setup(modules("experiment").WHOLE, tmp_path, str(tmp_path))


def write_result(results, each, setup, reward=0.5):
    rewards = {"start": {"reward": 0.0}, "end": {"reward": reward}}
    result = {"settings": each.settings, "basis": setup.basis(each.task)} | rewards
    results.path(each).write_text(json.dumps(result | {"rewards": [reward]}))


@pytest.fixture
def plan(modules, tmp_path, setup):
    """Of the study on one task, with results as they are written."""
    results, experiment = modules("results").Results(tmp_path), modules("experiment").Experiment

    class Plan(modules("study").Study):
        def __init__(self, arms, **options):
            super().__init__(results, setup, tasks=["four_rules"], arms=arms, **options)

        def to_do(self):
            """Arms with the learning rates to try, or the seeds."""
            found = self.missing()
            return [(each.arm, each.learning_rate if each.tuning else each.seed) for each in found]

        def write(
            self, arm, seeds=None, rates=(3e-5, 1e-4, 3e-4), reward_of=lambda rate: 1 - abs(rate - 1e-4), setup=setup
        ):
            for each in self.each(arm, seeds, rates):
                write_result(results, each, setup, reward_of(each.learning_rate))

        def fail(self, arm, seeds=None, rates=(3e-5, 1e-4, 3e-4)):
            results.failed |= set(self.each(arm, seeds, rates))

        def each(self, arm, seeds, rates):
            if seeds is None:
                return [experiment("four_rules", arm, rate, 100, tuning=True) for rate in rates]
            return [experiment("four_rules", arm, 1e-4, seed) for seed in seeds]

    return Plan


def test_the_best_learning_rate_is_never_at_the_edge_of_those_tried(plan):
    def try_all(arm, reward_of):
        tried, study = [], plan([arm], stages=["tune"])
        while experiments := study.rates_to_try("four_rules", arm):
            tried += [each.learning_rate for each in experiments]
            study.write(arm, None, tried, reward_of)
        return tried

    first, study = [3e-5, 1e-4, 3e-4], plan(["lambdarank", "approx_ndcg"])
    assert try_all("lambdarank", lambda rate: 1 - abs(rate - 1e-4)) == first
    assert study.rate("four_rules", "lambdarank") == 1e-4
    assert try_all("listmle", lambda rate: 1 - abs(rate - 1e-3)) == [*first, 1e-3, 3e-3]
    assert try_all("listnet", lambda rate: 1 - abs(rate - 1e-5)) == [*first, 1e-5, 3e-6]
    # Chance is best where all of them are too high: a lower one follows as long as the lowest makes the model worse
    assert try_all("random_pair", lambda rate: {3e-6: 0.5, 1e-4: 0.1}.get(rate, -0.1)) == [*first, 1e-5, 3e-6, 1e-6]
    assert try_all("approx_ndcg", lambda rate: rate) == [*first, 1e-3, 3e-3]
    assert study.rate("four_rules", "approx_ndcg") is None
    assert (
        study.remarks()[0] == "four_rules: the best rate of approx_ndcg is at an end of `LEARNING_RATES`: add others."
    )
    assert "approx_ndcg" not in [arm for arm, _ in study.to_do()]


def test_an_arm_is_measured_as_soon_as_it_is_tuned(plan):
    arms, rates = ["best_worst", "lambdarank", "listnet"], [3e-5, 1e-4, 3e-4]
    study = plan(arms)
    of_main = [(arm, rate) for rate in rates for arm in arms[:2]]
    of_others = [("listnet", rate) for rate in rates]
    assert study.to_do() == of_main + of_others
    assert study.samples_ahead() == [("four_rules", seed, False) for seed in (10, 11, 12, 13, 14)]
    study.write("best_worst")
    of_pairs = [("best_worst", seed) for seed in (10, 11, 12, 13, 14)]
    assert study.to_do() == [("lambdarank", x) for x in rates] + of_pairs + [("listnet", x) for x in rates]
    study.write("best_worst", (10, 11, 12))
    study.fail("lambdarank", rates=[3e-4])
    study.write("lambdarank", rates=[3e-5, 1e-4])
    of_lists = [("lambdarank", 10), ("lambdarank", 11), ("lambdarank", 12)]
    of_lists += [(arm, seed) for seed in (13, 14) for arm in arms[:2]]
    assert study.to_do() == [*of_lists, *(("listnet", rate) for rate in rates)]
    assert study.samples_ahead() == [("four_rules", seed, False) for seed in (10, 11)]
    study.write("listnet")
    assert study.to_do() == [*of_lists, ("listnet", 10), ("listnet", 11)]
    assert study.samples_ahead() == []
    assert plan(["lambdarank"], more_seeds=1).to_do()[-2:] == [("best_worst", 15), ("lambdarank", 15)]


def test_the_best_others_are_confirmed_once_all_are_screened(plan, modules):
    others = [arm for arm in modules("arms").ARMS if arm not in modules("arms").ALWAYS_CONFIRMED]
    study = plan(["listnet", "approx_ndcg"])
    for arm in others[2:]:
        study.write(arm)
        study.write(arm, (10, 11), reward_of=lambda rate, arm=arm: {"listnet": 0.9, "listmle_2_2": 0.9}.get(arm, 0.1))
    assert study.promising_arms("four_rules") == []
    assert "the best others are confirmed once all arms are tuned and screened" in study.remarks()[0]
    study.fail(others[0])  # cannot be tuned
    study.write(others[1])
    study.write(others[1], (10,))
    assert study.promising_arms("four_rules") == []
    study.fail(others[1], (11,))
    assert study.promising_arms("four_rules") == ["listmle_2_2", "listnet"]  # in the order of the arms
    study.fail("listnet", (13,))  # that does not change the choice
    study.write("best_worst")
    assert study.seeds("confirm", "four_rules") == dict.fromkeys(["best_worst", "listnet"], (12, 13, 14, 15, 16))
    assert [arm for arm, seed in study.to_do() if seed == 13] == ["best_worst"]
    assert study.remarks() == []


def test_results_of_other_weights_are_computed_again_also_where_arms_were_screened(plan, modules, setup, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"other weights")
    other = replace(setup, model=str(tmp_path / "other"))
    study = plan(list(modules("arms").ARMS))
    for arm in modules("arms").ARMS:
        study.write(arm, setup=other)
        study.write(arm, (10, 11), setup=other)
    assert len(study.to_do()) == 3 * len(modules("arms").ARMS)
    study.write("best_worst")
    study.write("best_worst", (10,))
    assert ("best_worst", 11) in study.to_do() and ("listnet", 1e-4) in study.to_do()


def test_rates_are_needed_only_of_what_is_measured(plan):
    study = plan(["lambdarank", "listnet"], stages=["confirm"])
    with pytest.raises(SystemExit, match="No learning rate was chosen for best_worst, lambdarank on four_rules"):
        study.check_rates()
    for arm in ("best_worst", "lambdarank"):
        study.write(arm)
    study.check_rates()
    assert {arm for arm, _ in study.to_do()} == {"best_worst", "lambdarank"} and study.samples_ahead() == []


def test_a_result_of_another_kind_is_computed_again(modules, tmp_path, setup):
    results, experiment = modules("results").Results(tmp_path), modules("experiment").Experiment
    same, other = (experiment("four_rules", "lambdarank", rate, 0) for rate in (1e-5, 3e-5))
    run = modules("claims").Variation("four_rules", "list_2", 0)
    assert results.missing([same, other, run], setup) == [same, other, run]
    for each in (same, run):
        write_result(results, each, setup)
    assert results.missing([same, other, run], setup) == [other]
    smaller = replace(setup, size=modules("experiment").SMALL)
    assert results.missing([same, run], replace(setup, device="cuda")) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"other weights")
    for changed in (smaller, replace(setup, model=str(tmp_path / "other"))):
        assert results.missing([same, run], changed) == [same, run]
        assert changed.folder_of_samples("four_rules", 0, False) != setup.folder_of_samples("four_rules", 0, False)
    modules("claims").RUNS["list_2"]["num_samples"] = 3
    assert results.missing([run], setup) == [run]


@pytest.fixture
def threads(modules, monkeypatch):
    """Workers are threads. Returns what they have done, in order."""
    workers, order = modules("workers"), []
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda count, *_, **__: ThreadPoolExecutor(count))
    monkeypatch.setattr(workers, "prepare", lambda task, seed, tuning, setup: order.append(f"samples {seed}"))
    return order


def test_results_of_the_first_seeds_come_before_the_samples_of_the_last(modules, threads):
    def run(each, setup):
        time.sleep(0.01)
        threads.append(f"result {each.seed}")
        return each.arm

    arms, experiment = list(modules("arms").ARMS)[:5], modules("experiment").Experiment
    asked = [experiment("four_rules", arm, 1e-5, seed) for seed in range(4) for arm in arms]
    done = {}
    for each, result in modules("workers")._results_of(lambda: [x for x in asked if x not in done], None, 2, run):
        done[each] = result
    assert list(map(done.get, asked)) == arms * 4
    for seed in range(4):
        assert threads.index(f"samples {seed}") < threads.index(f"result {seed}")
        assert threads.count(f"samples {seed}") == 1
    assert threads.index("samples 3") > threads.index("result 1")
    assert threads.count("result 3") == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_fails_is_left_out_and_named(modules, threads, tmp_path, setup, capsys, monkeypatch, num_workers):
    workers, results = modules("workers"), modules("results").Results(tmp_path)
    asked = [modules("experiment").Experiment("four_rules", "listnet", 1e-5, seed) for seed in range(5)]

    def prepare(task, seed, tuning, setup):
        if seed == 3:
            raise OSError("no space is left")

    def run(each, setup):
        if each.seed == 1:
            raise FloatingPointError("the loss is NaN")
        result = {"settings": each.settings, "basis": setup.basis(each.task)}
        if each.seed == 4:
            result["basis"] = {"model": "that a worker has read meanwhile"}
        return result | {"start": {"reward": 0.1}, "end": {"reward": 0.2}}

    monkeypatch.setattr(workers, "prepare", prepare)
    with pytest.raises(SystemExit) as stop:
        workers.run_all(lambda: results.missing(asked, setup), setup, results, num_workers, run)
    assert str(stop.value) == (
        "Failed: four_rules_listnet_seed1.json, four_rules_listnet_seed3.json, four_rules_listnet_seed4.json. "
        "The same again retries."
    )
    printed = capsys.readouterr().out
    assert "FloatingPointError: the loss is NaN" in printed and "OSError: no space is left" in printed
    assert "four_rules_listnet_seed4.json is of another kind: did the scripts or the model change?" in printed
    results = modules("results").Results(tmp_path)  # the next start
    assert results.missing(asked, setup) == [asked[1], asked[3], asked[4]]


def test_samples_are_drawn_ahead_while_results_are_missing(modules, threads, tmp_path, setup):
    workers, results = modules("workers"), modules("results").Results(tmp_path)
    asked = [modules("experiment").Experiment("four_rules", "listnet", 1e-5, 0)]

    def run(each, setup):
        time.sleep(0.05)
        result = {"settings": each.settings, "basis": setup.basis(each.task)}
        return result | {"start": {"reward": 0.1}, "end": {"reward": 0.2}}

    def run_all():
        missing = lambda: results.missing(asked, setup)  # noqa: E731
        workers.run_all(missing, setup, results, 2, run, ahead=lambda: [("four_rules", 9, False)])

    run_all()
    assert sorted(threads) == ["samples 0", "samples 9"]
    threads.clear()
    run_all()
    assert threads == []


class Ends:
    """A result whose worker ends, as where the system is out of memory."""

    task, seed, tuning = "four_rules", 0, False


def _end(each, setup):
    os._exit(1)


def _prepare_nothing(*args):
    pass


def test_a_worker_that_ends_is_said(modules, monkeypatch):
    workers = modules("workers")
    monkeypatch.setattr(workers, "prepare", _prepare_nothing)
    with pytest.raises(SystemExit, match="A worker has ended; is the memory too small"):
        list(workers._results_of(lambda: [Ends()], None, 1, _end))


@pytest.mark.slow
def test_a_claim_runs_resumes_and_repeats_itself(tiny_study, modules, monkeypatch, capsys):
    claims = modules("claims")
    monkeypatch.setattr(claims, "GRADED_TASKS", modules("experiment").GRADED_TASKS)
    monkeypatch.setattr(claims, "LEARNING_RATE", 1e-2)

    def run():
        monkeypatch.setattr(
            sys, "argv", ["claims.py", "--small", "--workers", "0", "--device", "cpu", "--claims", "reference"]
        )
        claims.main()
        return {path.name: path.read_bytes() for path in Path("outputs/lists_vs_pairs_small/results/claims").iterdir()}

    whole = run()
    table = capsys.readouterr().out
    assert "| start of the iteration | 1 |" in table and "| initial model | 1 |" in table
    policy, initial = (json.loads(whole[f"{name}_seed10.json"]) for name in ("fresh_none", "reference_initial"))
    assert policy["start"] == initial["start"] and policy["rewards"] != initial["rewards"]
    assert policy["budget"]["samples"] == initial["budget"]["samples"] == 2 * 2 * 4
    assert not list(Path("outputs").rglob("*.safetensors"))
    next(Path("outputs").rglob("reference_initial_seed10.json")).unlink()
    assert run() == whole
    assert "1 results to compute now" in capsys.readouterr().out


@pytest.mark.slow
def test_smallest_form_runs_resumes_and_repeats_itself(tiny_study, capsys):
    whole = tiny_study()
    assert "lambdarank" in capsys.readouterr().out
    assert len(whole) == 2 * 2 + 2 + 2  # two arms: two learning rates, a seed, and one more
    for name in sorted(whole)[::5]:
        next(Path("outputs").rglob(name)).unlink()
    assert tiny_study() == whole
    assert "2 results to compute now" in capsys.readouterr().out
    # Arms of a seed share samples and evaluation
    pairs, lists = (json.loads(whole[f"four_rules_{arm}_seed10.json"]) for arm in ("best_worst", "lambdarank"))
    assert pairs["start"] == lists["start"] and pairs["rewards"] != lists["rewards"]
    assert pairs["budget"]["samples"] == lists["budget"]["samples"] <= 8 * 4  # without empty ones
    assert pairs["budget"]["steps"] == lists["budget"]["steps"]
    assert pairs["budget"]["candidates"] == 2 * pairs["budget"]["lists"] < lists["budget"]["candidates"]
