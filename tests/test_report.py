"""The page of a run, in a real browser: pictures, health, lists; whatever a model wrote stays text."""

import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure
from small_run import rows_of

from trl_larpo import DataError
from trl_larpo.report import charts
from trl_larpo.report.numbers import with_error
from trl_larpo.report.page import MAX_DATA_BYTES, write_report
from trl_larpo.report.statistics import lists_of_prompt, statistics_of

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script><!--",
    "<img src=x onerror='window.hacked = 1'>",
    "**bold** [link](javascript:hacked) & &lt;b&gt; {{data}}",
    "👩‍🚀 \u202eright to left\u202c שלום العالم \u0000 \ud800",
    "x" * 50_000,
]


def candidate(rank, **about):
    return {
        "iteration": 1, "source": "policy", "temperature": 1.0, "finished": True, "num_tokens": 3, "count": 1,
        "rank": rank, "of_prompt": None,
    } | about  # fmt: skip


def list_row(prompt, completions):
    return {
        "prompt_id": prompt, "prompt": [{"role": "user", "content": prompt}], "problem": None, "left_out": [],
        "completions": [[{"role": "assistant", "content": text}] for text in completions],
        "rewards": [float(len(completions) - i) for i in range(len(completions))],
        "candidates": [candidate(i + 1) for i in range(len(completions))],
    }  # fmt: skip


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to change."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def set_lists(run, rows):
    path = run / "iteration_2" / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_pictures_and_tables_tell_what_happened(run):
    page = write_report(run).read_text()
    monitored = {"monitor_reward.png", "monitor_answers.png"}  # where the training took long enough
    found = {path.name for path in (run / "plots").iterdir()}
    assert found - monitored == {
        "held_out_reward.png", "best_of_n.png", "reward_distribution.png", "tokens.png", "ranking_metrics.png",
        "sources.png", "list_sizes.png",
    }  # fmt: skip
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == len(found) and all(ET.fromstring(picture) is not None for picture in pictures)
    evaluation = json.loads((run / "iteration_2/evaluation.json").read_text())
    assert with_error(evaluation["reward"]) in page
    assert str(run.parent) not in page  # nothing of the machine
    assert not re.search(r"(src|href)=[\"']?http|@import|url\(http", page)  # nothing from the network
    assert write_report(run).read_text() == page


def test_a_run_that_has_only_begun_has_a_page(run):
    for number in (1, 2):
        shutil.rmtree(run / f"iteration_{number}")
    page = write_report(run).read_text()
    assert "0 of 2 iterations done" in page and "No iteration is finished yet." in page


@pytest.mark.parametrize(
    "mean, error, sign, text",
    [
        (0.6548, 0.0337, "", "0.655 ± 0.034"),
        (0.00024, 0.000031, "+", "+0.000240 ± 0.000031"),  # was +0.000 ± 0.000
        (-0.00024, None, "+", "-0.00024"),
        (0.5, 0.0, "", "0.500 ± 0.000"),
        (0.5, 1e-17, "", "0.500 ± 0.000"),
        (0.0, None, "", "0.000"),
        (3e-12, 1e-12, "", "3.0e-12 ± 1.0e-12"),
        (None, None, "", "unknown"),
        (math.nan, math.nan, "", "nan ± nan"),
        (math.inf, None, "+", "+inf"),
    ],
)
def test_small_numbers_keep_their_digits(mean, error, sign, text):
    assert with_error({"mean": mean, "standard_error": error}, sign) == text


def test_samples_without_a_reward_are_counted_in_the_table(run):
    assert "without a reward</th>" not in write_report(run, with_plots=False).read_text()
    evaluation = json.loads((run / "iteration_1/evaluation.json").read_text())
    (run / "iteration_1/evaluation.json").write_text(json.dumps(evaluation | {"unrewarded": 17}))
    page = write_report(run, with_plots=False).read_text()
    assert "without a reward</th>" in page and "<td class=number>17</td>" in page


@pytest.mark.parametrize("rewards", [[0.3, 0.1 + 0.2], [0.3, 0.3], [-1.7e308, 1.7e308], [1e17, 1e17 + 16]])
def test_rewards_that_differ_by_rounding_or_by_everything(tmp_path, rewards):
    # numpy found too many bins, and the run got no report
    row = {"candidates": [candidate(1), candidate(2)], "rewards": rewards}
    (tmp_path / "rewarded.jsonl").write_text(json.dumps(row) + "\n")
    found = statistics_of(tmp_path, 1)
    assert sum(found["rewards"]["counts"]) == 2
    charts._reward_distribution(Figure().subplots(), {1: {"statistics": found}})


def test_many_iterations_stay_readable():
    """With a colour for each that is shown, and names beside the curves rather than over them."""

    def made(n):
        sources = {f"iteration {k}": 2 for k in range(1, n + 1)}
        return {"sources": sources, "sizes": [[8, n]], "rewards": {"low": 0, "high": 1, "counts": [n, 9]}}

    reward = {"mean": 0.1, "standard_error": 0.1}
    iterations = {
        n: {"evaluation": {"best_of_n": [0.1, 0.2], "reward": reward}, "statistics": made(n) if n else {}}
        for n in range(25)
    }
    axes = {name: Figure().subplots() for name in ("_best_of_n", "_reward_distribution", "_sources", "_list_sizes")}
    for name, ax in axes.items():
        getattr(charts, name)(ax, iterations)
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert len(names) <= 6 and len({c.get_label() for c in ax.containers or ax.lines}) <= 6
        assert names[-1] == ("older ones" if name == "_sources" else "iteration 24")
    assert axes["_best_of_n"].get_title().endswith("(6 of 25 iterations)")
    assert list(axes["_list_sizes"].get_xticks()) == [8]
    few = {
        n: {"statistics": {"sources": {f"iteration {k}": 1 for k in (10, 2, 9)} | {"low temperature": 1}}}
        for n in (1, 2)
    }
    charts._sources(ax := Figure().subplots(), few)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["iteration 2", "iteration 9", "iteration 10", "low temperature"]


def test_what_an_unfinished_iteration_has_set_aside_is_told(run):
    (run / "iteration_2/evaluation.json").unlink()
    aside = {"prompt_id": "0", "prompt": "a <hard> one", "reason": "the server refuses it"}
    (run / "iteration_2/samples.set_aside.jsonl").write_text(json.dumps(aside) + "\n")
    page = write_report(run, with_plots=False).read_text()
    assert "1 of 2 iterations done · iteration 2 has begun" in page and "a &lt;hard&gt; one" in page


def test_a_training_that_did_not_end_with_its_last_weights_is_told(run):
    monitor = {"points": [], "explanation": "The last step is worse than the best. Kept: step <4>."}
    (run / "iteration_2/monitor.json").write_text(json.dumps(monitor))
    (run / "iteration_1/monitor.json").unlink(missing_ok=True)
    page = write_report(run, with_plots=False).read_text()
    assert page.count("Iteration 2: The last step is worse than the best. Kept: step &lt;4&gt;.") == 1
    assert "Iteration 1: " not in page


def test_copies_of_iterations_are_left_alone(tmp_path):
    for name in ("iteration_1", "iteration_2_backup", "iteration_old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lists.jsonl").write_text(json.dumps(list_row("p", ["a", "b"])) + "\n")
    assert [number for number, _ in lists_of_prompt(tmp_path, "p")] == [1]


def test_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is no folder of a run: it has no run\.yaml"):
        write_report(tmp_path)


def random_lists(num_lists, list_size, num_words):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(5000)]
    text = lambda: " ".join(rng.choice(words) for _ in range(num_words))  # noqa: E731
    return [list_row(f"{i} {text()[:200]}", [text() for _ in range(list_size)]) for i in range(num_lists)]


@pytest.mark.slow
def test_long_texts_are_cut_where_the_page_would_get_too_large(run):
    set_lists(run, [list_row("p", [random.Random(i).randbytes(2**21).hex() for i in range(4)])])
    page = write_report(run)
    assert page.stat().st_size < MAX_DATA_BYTES + 1_000_000
    assert re.search(r"Texts of more than \d+ characters are cut; the run.{1,6}s lists.jsonl has all", page.read_text())


# In a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-quic"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def open_page(browser, path, width=1200):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.set_window_size(width, 900)
    browser.get(path.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.querySelector('details.list')"))


def open_lists(browser):
    """Opens all lists that are shown. Returns the texts of their completions, as a person sees them."""
    browser.execute_script("document.querySelectorAll('details.list').forEach(d => { d.open = true; })")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    return browser.execute_script(
        "return [...document.querySelectorAll('details.list')].map("
        "d => [...d.querySelectorAll('.completion')].map("
        "c => c.textContent.toWellFormed()))"
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_hostile_texts_stay_text(run, browser, width):
    set_lists(run, [list_row(text[:3000], HOSTILE) for text in HOSTILE])
    open_page(browser, write_report(run), width)
    shown = open_lists(browser)
    assert len(shown) == len(HOSTILE)
    expected = [text.replace("\ud800", "\ufffd") for text in HOSTILE]  # half a character cannot be handed over
    assert all(texts == expected for texts in shown)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('.completion *, .prompt *').length") == 0
    assert not browser.get_log("browser")
    # Nothing is wider than the window
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert len(browser.get_screenshot_as_png()) > 10_000


@pytest.mark.slow
def test_lists_are_found_and_sorted(run, browser):
    rows = [list_row("about bees", ["honey", "wax"]), list_row("about trains", ["rails", "steam", "late", "never"])]
    rows.append(list_row("about nothing", ["a"]) | {"problem": "too_few"})
    set_lists(run, rows)
    open_page(browser, write_report(run))

    def prompts():
        return browser.execute_script(
            "return [...document.querySelectorAll('details.list .prompt')].map(p => p.textContent)"
        )

    def choose(name, value):
        browser.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
            "e.dispatchEvent(new Event('input'))",
            name,
            value,
        )

    bees, trains, nothing = (f"user: about {x}" for x in ("bees", "trains", "nothing"))
    assert prompts() == [bees, trains, nothing]
    choose("order", "gap")
    assert prompts()[:2] == [trains, bees]
    choose("kind", "none")
    assert prompts() == [nothing]
    choose("kind", "all")
    choose("search", "HONEY")
    assert prompts() == [bees]
    choose("search", "")
    choose("iteration", "1")
    first = rows_of(run / "iteration_1/lists.jsonl")
    assert len(prompts()) == len(first)
    assert not browser.get_log("browser")


@pytest.mark.slow
def test_two_thousand_lists_are_a_usable_page(run, browser):
    set_lists(run, random_lists(2000, 8, 110))
    path = write_report(run)
    assert path.stat().st_size < 15_000_000
    open_page(browser, path)
    assert browser.execute_script("return document.querySelectorAll('details.list').length") == 50  # the rest on demand
    browser.execute_script("document.getElementById('more').click()")
    assert browser.execute_script("return document.querySelectorAll('details.list').length") == 100
    browser.execute_script(
        "const e = document.getElementById('search'); e.value = '1999 '; e.dispatchEvent(new Event('input'))"
    )
    assert "of 2006 prompts" in browser.execute_script("return document.getElementById('about-lists').textContent")
    assert 0 < browser.execute_script("return document.querySelectorAll('details.list').length") < 50
    assert not browser.get_log("browser")
