"""The report, opened in a real browser: what it shows is what was measured, its controls do what they say, names stay text."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cifarlab as cl
from cifarlab.cli import _parse_training, main
from cifarlab.config import InputError, WatchConfig
from cifarlab.recipes import RECIPES, load_recipe
from cifarlab.report import page as report_page
from cifarlab.report.charts import bundle_vega, pack_rows, to_json
from cifarlab.report.setup import show_configuration, to_command
from cifarlab.runs import load_run
from cifarlab.studies import STUDIES
from cifarlab.studies.plan import make_plan
from cifarlab.studies.reported import read_markdown

TESTS = Path(__file__).parent
HOSTILE = ["<script>window.hacked = 1</script>", '"quoted" & \'single\'', "قطة أليفة", "</script><img src=x onerror=alert(1)>",
           "\\u003cb\\u003e `code` **bold**", "{{ 7 * 7 }}"]  # fmt: skip
ALARM = {"rule": "exploding", "step": 31, "noticed": 40, "layers": [HOSTILE[0], "b.weight"],
         "evidence": f"in {HOSTILE[3]} norms grew", "cause": "too high a rate", "remedy": "lower it",
         "reference": "Pascanu 2013"}  # fmt: skip
SHAPES = {"a.weight": [8, 3, 3, 3], "a.bias": [8], "b.weight": [8, 8, 3, 3], "<b>c</b>.weight": [6, 8]}


def load_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


browsers = load_file("browser", TESTS / "browser.py")
made = load_file("benchmark_report", TESTS.parent / "benchmarks" / "report.py")


def make_run(path: Path, **changes: Any) -> Path:
    given = {"steps": 120, "per_epoch": 30, "shapes": SHAPES, "class_names": HOSTILE, "num_test": 240, "side": 16,
             "alarms": [ALARM]}  # fmt: skip
    made.make_run(path, **(given | changes))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hostile names everywhere that names can be, its folder's too."""
    return make_run(tmp_path_factory.mktemp("runs") / "run <img src=x onerror=window.hacked=2> 'a' שלום")


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    return cl.report(run)


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    found = browsers.Opened(browser, report)
    yield found
    found.close()


# ---- in the browser ------------------------------------------------------------------------------------------------------


def test_everything_is_drawn_without_an_error_or_a_request(opened: Any) -> None:
    """`close` of the fixture looks at what the page complained of and asked for."""
    opened.draw()
    page = opened.page
    places = page.locator("[data-chart]").count()
    assert places >= 12
    assert page.locator("[data-chart] .frame svg").count() == places
    empty = page.evaluate("[...cifarlab.charts.values()].filter(c => c.width() < 150).map(c => c.id)")
    assert empty == []
    for chart in page.locator("[data-chart]").all():
        assert chart.locator("summary", has_text="How to read it").count() == 1, chart.get_attribute("data-chart")
        assert len(chart.locator(".frame").get_attribute("aria-label")) > 20


def test_charts_wait_until_they_are_looked_at(browser: Any, report: Path) -> None:
    found = browsers.Opened(browser, report, viewport={"width": 1200, "height": 300})
    drawn = "[...cifarlab.charts.values()].filter(c => c.turn).length"
    at_first = found.page.evaluate(drawn)
    assert at_first < 3
    found.page.locator("#confusion").scroll_into_view_if_needed()
    found.page.wait_for_selector("[data-chart=confusion][data-drawn=yes]")
    assert found.page.evaluate(drawn) < found.page.locator("[data-chart]").count()
    found.close()


def test_the_step_slider_moves_the_frame_and_the_layers_beside_it(opened: Any, run: Path) -> None:
    page = opened.page
    opened.draw("gradient_flow_over_time")
    slider = page.locator("#gradient-flow .steps input").first
    said = page.locator("#gradient-flow .steps output").first
    assert "step 120" in said.inner_text() or "to 120" in said.inner_text()
    slider.evaluate("(e) => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    assert said.inner_text().startswith("step")
    assert said.inner_text() in page.locator("[data-chart=gradient_flow_over_time] svg").text_content()
    bins = opened.rows("gradient_flow_over_time", "bins")
    at = page.evaluate("cifarlab.charts.get('gradient_flow_over_time').view.signal('at')")
    assert bins[0]["x"] < at <= bins[0]["x2"]
    slider.press("ArrowRight")  # by keyboard too
    at = page.evaluate("cifarlab.charts.get('gradient_flow_over_time').view.signal('at')")
    assert bins[1]["x"] < at <= bins[1]["x2"]
    assert slider.get_attribute("aria-valuetext") == bins[1]["told"]
    # The layers beside the map: the one farthest from the median of that step at the top.
    table = load_run(run).tables["gradient_flow"]
    size = len(table) // len(bins)
    now = np.log10(table["mean_abs"][size : 2 * size].max(axis=0))
    worst = int(np.abs(now - np.median(now)).argmax())
    texts = "[...document.querySelectorAll('[data-chart=gradient_flow_over_time] .role-axis-label text')]"
    labels = page.evaluate(f"{texts}.map(e => [e.textContent, e.getBoundingClientRect().left, e.getBoundingClientRect().top])")
    right = [label for label in labels if label[0] in SHAPES and label[1] > 500]
    assert min(right, key=lambda label: label[2])[0] == table.items[worst]


def test_pointing_at_the_map_names_the_layer(opened: Any) -> None:
    page = opened.page
    opened.draw("gradient_flow_over_time")
    page.locator("#gradient-flow").scroll_into_view_if_needed()
    page.locator("[data-chart=gradient_flow_over_time] .mark-rect path").nth(5).hover()
    told = page.locator("#tip").inner_text()
    assert re.search(r"layer: \S+", told)
    assert "mean |g|:" in told


def test_smoothing_smooths_and_the_axis_counts_what_is_asked(opened: Any) -> None:
    page = opened.page
    opened.draw("learning-curves")
    slider = page.locator("#curves [name=smoothing]")

    def line() -> np.ndarray:
        rows = [row for row in opened.rows("learning-curves", "loss-line") if row["split"] == "train"]
        return np.array([[row["epoch"], row["value"]] for row in rows])

    assert len(line()) == 4  # as drawn: a mean for each epoch
    raw = np.array([[r["epoch"], r["value"]] for r in opened.rows("learning-curves", "loss-raw") if r["split"] == "train"])
    assert len(raw) == 120
    slider.evaluate("(e) => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    np.testing.assert_allclose(line(), raw)
    slider.evaluate("(e) => { e.value = 6; e.dispatchEvent(new Event('input')); }")
    assert page.locator("#curves output").inner_text() == "5 epochs"
    twin = [raw[np.abs(raw[:, 0] - x) <= 2.5 + 1e-9, 1].mean() for x in raw[:, 0]]
    np.testing.assert_allclose(line()[:, 1], twin, rtol=1e-9)

    page.locator("#curves input[value=step]").check()
    page.wait_for_function("document.querySelector('[data-chart=learning-curves] svg').textContent.includes('step')")
    np.testing.assert_allclose(line()[:, 0], 30 * raw[:, 0])
    page.locator("#curves input[value=time]").check()
    page.wait_for_function("document.querySelector('[data-chart=learning-curves] svg').textContent.includes('time (min)')")
    np.testing.assert_allclose(line()[:, 0], 0.05 * 30 * raw[:, 0] / 60, rtol=1e-3)
    kind = "cifarlab.charts.get('learning-curves').view.scale('concat_0_y').type"
    assert page.evaluate(kind) == "linear"
    page.locator("#curves [name=log]").check()
    page.wait_for_function(f"{kind} === 'log'")
    assert page.locator("#curves output").inner_text() == "5 epochs"  # the other controls stand as they were


def test_headings_sort_their_table(opened: Any) -> None:
    table = opened.page.locator("#cost table")

    def column(k: int) -> list[float]:
        return [float(cell.get_attribute("data-value")) for cell in table.locator(f"tbody tr > :nth-child({k})").all()]

    names = [head.inner_text() for head in table.locator("thead th").all()]
    place = next(k for k, name in enumerate(names, start=1) if name.startswith("Parameters"))
    before = column(place)
    button = table.locator("thead button", has_text="Parameters")
    button.click()
    assert column(place) == sorted(before, reverse=True)
    button.press("Enter")
    assert column(place) == sorted(before)
    heads = [head.get_attribute("aria-sort") for head in table.locator("thead th").all()]
    assert heads.count("ascending") == 1
    assert heads.count(None) == len(heads) - 1


def test_a_cell_opens_the_images_behind_it(opened: Any, run: Path) -> None:
    page = opened.page
    counts = np.array(json.loads((run / "evaluation.json").read_text())["confusion"])
    off = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    i, j = (int(k) for k in np.unravel_index(off.argmax(), off.shape))
    opened.draw("confusion")
    page.locator("#confusion").scroll_into_view_if_needed()
    cells = "[...document.querySelectorAll('[data-chart=confusion] .mark-rect path')]"
    cell = page.evaluate_handle(f"cell => {cells}.find(e => String(e.__data__.datum.cell) === cell)", f"{i},{j}")
    cell.as_element().click(force=True)
    dialog = page.locator("dialog")
    dialog.wait_for(state="visible")
    assert dialog.locator("h3").inner_text() == f"{HOSTILE[i]} taken for {HOSTILE[j]}"
    assert f"{off[i, j]} image" in dialog.locator("p").inner_text()
    pictures = dialog.locator(".picture")
    assert 1 <= pictures.count() <= off[i, j]
    assert "data:image" in pictures.first.evaluate("e => getComputedStyle(e).backgroundImage")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    button = page.locator(f"[data-cell='{i},{j}']")  # the same from the keyboard
    button.focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.keyboard.press("Escape")
    k = int(np.diag(counts).argmax())  # what was recognised, too
    page.locator(f"#classes [data-cell='{k},{k}']").focus()
    page.keyboard.press("Enter")
    assert dialog.locator("h3").inner_text() == f"{HOSTILE[k]}, recognised"
    assert dialog.locator(".picture").count() >= 1


def test_every_heading_that_sorts_has_a_name(browser: Any, run: Path, opened: Any, tmp_path: Path) -> None:
    both = browsers.Opened(browser, cl.report(run, make_run(tmp_path / "other", seed=1), path=tmp_path / "both.html"))
    for found in (opened, both):
        names = found.page.locator("th button").all_inner_texts()
        assert names
        assert all(name.strip() for name in names)
    both.close()
    assert opened.page.locator("#confusion thead th").last.locator("button").count() == 0  # a column of buttons has no order


def test_names_stay_text(opened: Any) -> None:
    page = opened.page
    opened.draw()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type])").count() == 2
    names = [cell.inner_text() for cell in page.locator("#classes tbody th").all()]
    assert names == HOSTILE
    assert page.locator("h1").inner_text() == "run <img src=x onerror=window.hacked=2> 'a' שלום"
    assert "{{ 7 * 7 }}" in page.locator("#classes").inner_text()
    assert HOSTILE[0] in page.locator("#alarms").inner_text()
    assert HOSTILE[0][:20] in page.locator("[data-chart=classes] svg").text_content()


def test_the_policy_lets_no_other_script_in(browser: Any, report: Path) -> None:
    found = browsers.Opened(browser, report)
    page = found.page
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for attempt in ("const s = document.createElement('script'); s.textContent = 'window.hacked = 3'; document.body.append(s)",
                    "document.body.innerHTML += '<img src=\"http://localhost:9/x\" onerror=\"window.hacked = 4\">'",
                    "setTimeout('window.hacked = 5')"):  # fmt: skip
        page.evaluate(attempt)
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in said for said in found.complaints)
    found.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, report: Path, scheme: str) -> None:
    found = browsers.Opened(browser, report, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    found.draw()
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert found.page.evaluate("cifarlab.charts.get('learning-curves').width()") <= 360
    background = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = found.page.evaluate("getComputedStyle(document.body).color")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (background, ink)]
    assert (brightness[0] < 120 and brightness[1] > 600) if scheme == "dark" else (brightness[0] > 700 and brightness[1] < 150)
    found.close()


@pytest.mark.parametrize("ratio", [1, 2])
def test_painted_charts_fit_a_phone_too(browser: Any, tmp_path: Path, ratio: int) -> None:
    """Charts of many rows are canvases. Their width was unknown where a point is a pixel, so 100 classes ran off the page."""
    names = [f"class number {k}" for k in range(100)]
    path = cl.report(make_run(tmp_path / "run", class_names=names, num_test=8000))
    found = browsers.Opened(browser, path, viewport={"width": 390, "height": 740}, device_scale_factor=ratio)
    found.draw("confusion", "gradient_flow_over_time")
    assert found.page.locator("[data-chart=confusion] canvas").count() == 1
    for name in ("confusion", "gradient_flow_over_time"):
        frame = found.page.locator(f"[data-chart={name}] .frame")
        assert frame.evaluate("e => [e.scrollWidth - e.clientWidth, e.clientWidth > 300]") == [0, True], name
    # The cells have become narrower than a letter is high: some names are left out, and none stands on another.
    signal = "cifarlab.charts.get('confusion').view.scenegraph().root"
    texts = f"""const found = []; const walk = item => {{
        if (item.role === 'axis-label') found.push(...item.items.filter(e => e.angle % 180 && e.opacity).map(e => e.x));
        (item.items || []).forEach(walk); }}; walk({signal}); return found.sort((a, b) => a - b)"""
    places = found.page.evaluate(f"() => {{ {texts} }}")
    assert 10 < len(places) < 100
    assert min(np.diff(places)) >= 9
    found.close()


def test_the_theme_can_be_changed(opened: Any) -> None:
    before = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.locator("#theme").click()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert opened.page.locator("#theme").get_attribute("aria-pressed") == "true"


def test_print_shows_every_chart_and_no_controls(browser: Any, report: Path, tmp_path: Path) -> None:
    found = browsers.Opened(browser, report, viewport={"width": 1000, "height": 300}, color_scheme="dark")
    assert found.page.evaluate("[...cifarlab.charts.values()].every(c => c.view)") is False
    found.page.pdf(path=tmp_path / "page.pdf")  # fires beforeprint, as the browser's own menu does
    assert found.page.evaluate("[...cifarlab.charts.values()].every(c => c.view)") is True
    found.page.emulate_media(media="print")
    assert not found.page.locator("nav").is_visible()
    assert not found.page.locator(".controls").first.is_visible()
    assert not found.page.locator("[data-cell]").first.is_visible()
    assert found.page.evaluate("getComputedStyle(document.querySelector('.picture')).printColorAdjust") == "exact"
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert found.page.evaluate("getComputedStyle(document.querySelector('.frame svg')).filter") == "none"
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
    found.close()


def test_paper_has_the_words_under_each_chart(browser: Any, report: Path) -> None:
    """A folded text cannot be unfolded on paper: it is opened for the time of printing, and as it was afterwards."""
    found = browsers.Opened(browser, report)
    folded = "document.querySelectorAll('details.how:not([open])').length"
    before = found.page.evaluate(folded)
    assert before > 10
    found.page.evaluate("dispatchEvent(new Event('beforeprint')), dispatchEvent(new Event('beforeprint'))")
    assert found.page.evaluate(folded) == 0
    found.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert found.page.evaluate(folded) == before
    found.close()


def test_a_hundred_classes_do_not_print_a_hundred_pages(browser: Any, tmp_path: Path) -> None:
    path = cl.report(make_run(tmp_path / "run", class_names=[str(k) for k in range(60)], num_test=900))
    found = browsers.Opened(browser, path)
    rows = found.page.locator("#confusion tbody tr")
    assert rows.count() > 100
    assert not found.page.locator("#confusion .printed").is_visible()
    found.page.emulate_media(media="print")
    assert found.page.locator("#confusion tbody tr:visible").count() == 50
    assert f"the first 50 of {rows.count()}" in found.page.locator("#confusion caption").inner_text()
    found.close()


def test_newer_rows_can_be_fed(browser: Any, report: Path, tmp_path: Path) -> None:
    """What a live page does: the section's data of a run that has gone on, into the page that is open."""
    from cifarlab.report.charts import pack_section
    from cifarlab.report.curves import show_curves

    longer = show_curves(load_run(make_run(tmp_path / "longer", steps=180)))
    assert longer
    found = browsers.Opened(browser, report)
    found.draw("learning-curves")
    assert max(row["epoch"] for row in found.rows("learning-curves", "loss-raw")) == 4
    data = json.loads(to_json(pack_section(longer.charts, longer.more)))
    found.page.evaluate("data => cifarlab.update('curves', data)", data)
    found.page.wait_for_function("cifarlab.charts.get('learning-curves').view?.scale('concat_0_x').domain()[1] === 6")
    assert max(row["epoch"] for row in found.rows("learning-curves", "loss-raw")) == 6
    found.close()


def test_several_runs_and_a_study_on_one_page(browser: Any, tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two <b>", seed=1)
    found = browsers.Opened(browser, cl.report(one, other, path=tmp_path / "both.html"))
    found.draw()
    text = found.page.locator("main").inner_text()
    assert "two <b>" in text
    assert "McNemar" in text
    rows = found.page.locator("#summary table").nth(1).locator("tbody tr").all_inner_texts()
    assert any(row.split() == ["seed", "0", "1"] for row in rows)
    legend = found.page.locator("[data-chart=over-train-loss] .role-legend").first.text_content()
    assert "one" in legend
    assert "two <b>" in legend
    found.close()


# ---- without a browser ---------------------------------------------------------------------------------------------------


def test_the_page_is_written_without_torch(run: Path, tmp_path: Path) -> None:
    code = "from cifarlab.cli import main; import sys; code = main(sys.argv[1:]); sys.exit(code or ('torch' in sys.modules) * 9)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, "report", str(run), "-o", str(tmp_path / "a.html")],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'a.html'}" in done.stdout


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    """A tenth of the benchmark's steps, at which every chart is thinned out already."""
    run = made.make_run(tmp_path / "long", steps=2300, per_epoch=100)
    page = report_page.build_page([load_run(run)])
    assert len(page.encode()) < 8e6 - 4 * (8e6 / 30)
    data = re.findall(r'<script type="application/json" id="data-(?:curves|[a-z]+-flow)">(.*?)</script>', page)
    assert len(data) == 4
    assert max(map(len, data)) < 300_000


def test_folders_that_lack_things_are_reported_on_all_the_same(run: Path, tmp_path: Path) -> None:
    for gone in (["result.json", "evaluation.json", "predictions.npz", "thumbnails.npz"], ["cost.json"], ["thumbnails.npz"],
                 ["probes.json", "probes", "alarms.jsonl"], ["environment.json"],
                 ["metrics.jsonl", "result.json", "probes", "alarms.jsonl"]):  # fmt: skip
        copy = tmp_path / gone[0]
        shutil.copytree(run, copy)
        for name in gone:
            path = copy / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        page = report_page.build_page([load_run(copy)])
        assert "<h2" in page, gone
        assert ('id="confusion"' in page) == ("evaluation.json" not in gone)


def test_a_search_that_has_tried_nothing_is_told(tmp_path: Path) -> None:
    """Its figures have nothing to draw: that ended as an error of numpy's. The link past the navigation leads somewhere, too."""
    make_plan(STUDIES["sensitivity"], load_recipe("quick"), {}, (0,), search={"sampler": "tpe", "trials": 4}).save(tmp_path)
    page = cl.report(studies=[tmp_path]).read_text(encoding="utf-8")
    assert "No training of it has begun yet" in page
    assert '<a class="skip" href="#study-1">' in page
    assert '<section id="study-1"' in page


def test_every_evidence_is_on_the_page(run: Path, tmp_path: Path) -> None:
    """What was not measured has no section, and a finding no link to it."""
    for gone in (["result.json", "evaluation.json", "predictions.npz", "thumbnails.npz", "metrics.jsonl"], ["cost.json"],
                 ["thumbnails.npz"], []):  # fmt: skip
        copy = tmp_path / f"without {' '.join(gone)}"
        shutil.copytree(run, copy)
        for name in gone:
            (copy / name).unlink()
        page = report_page.build_page([load_run(copy)])
        links = set(re.findall(r'<a href="#([a-z-]+)">Evidence', page))
        assert links <= set(re.findall(r'<section id="([a-z-]+)"', page)), gone
        assert links


def test_a_part_of_the_training_images_is_said(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    for changed, told in (({}, "6 classes.</p>"), ({"train_images": 640}, "classes. 640 of the training images were used.</p>"),
                          ({"val_fraction": 0.1}, "classes. 10 % of the training images were held out.</p>")):  # fmt: skip
        (copy / "config.json").write_text(json.dumps(config | changed))
        assert told in report_page.build_page([load_run(copy)])


def test_steps_that_make_no_known_epoch_are_called_steps(browser: Any, tmp_path: Path) -> None:
    """As in a watched loop, whose 30 steps read as 30 epochs."""
    path = make_run(tmp_path / "run", steps=30, per_epoch=1)
    environment = json.loads((path / "environment.json").read_text())
    del environment["steps_per_epoch"]
    (path / "environment.json").write_text(json.dumps(environment))
    found = browsers.Opened(browser, cl.report(path))
    found.draw("learning-curves", "schedule")
    for name in ("learning-curves", "schedule"):
        titles = found.page.locator(f"[data-chart={name}] .role-axis-title").all_text_contents()
        assert "step" in titles
        assert not any("epoch" in title for title in titles)
    assert "epoch" not in found.page.locator("#learning-rate .told").inner_text()
    found.close()


def test_damaged_folders_are_refused_in_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report.html"))
    for name, content in (("evaluation.json", '{"confusion": 3}'), ("cost.json", "[1]"), ("alarms.jsonl", "{\n"),
                          ("dataset.json", "{")):  # fmt: skip
        before = (copy / name).read_bytes()
        (copy / name).write_text(content)
        assert main(["report", str(copy)]) == 2, name
        told = capsys.readouterr().err
        assert "damaged" in told, name
        assert told.count("\n") == 1
        (copy / name).write_bytes(before)
    assert not list(copy.glob("*report.html*"))
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report"]) == 2
    assert main(["report", str(copy), "-o", str(tmp_path / "no" / "such" / "a.html")]) == 2
    assert "another with -o" in capsys.readouterr().err


def test_every_training_leaves_its_report(tiny: str, tmp_path: Path) -> None:
    config = cl.recipes.quick(model=tiny, epochs=1, train_images=64)
    watch = WatchConfig(runs_dir=tmp_path, name="a", progress="none", forecast=False, probes="none")
    page = (cl.train(config, watch).path / "report.html").read_text(encoding="utf-8")
    assert 'id="confusion"' in page
    assert '"receptive_fields"' in (tmp_path / "a" / "cost.json").read_text()
    assert not (cl.train(config, replace(watch, name="b", figures=False)).path / "report.html").exists()


def test_a_page_that_fails_does_no_harm(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug in\na page")

    monkeypatch.setattr(report_page, "build_page", fail)
    report_page.leave_report(load_run(run))
    told = capsys.readouterr().err
    assert "report.html could not be written (RuntimeError: a bug in a page)" in told
    assert told.count("\n") == 1


def test_the_precision_that_auto_came_to_is_no_change_of_the_recipe(tmp_path: Path) -> None:
    for precision, lr, told in (("bf16", 0.15, "Every setting is the recipe"), ("fp32", 0.1, "<code>lr</code>")):
        config = load_recipe("resnet18-cosine", precision=precision, lr=lr)
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        section = str(show_configuration(load_run(tmp_path))).partition("All settings")[0]
        assert told in section
        assert "<code>precision</code>" not in section


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_gives_the_same_settings_again(name: str) -> None:
    usual = load_recipe(name)
    config = replace(usual, seed=7, lr=usual.lr / 3, nesterov=usual.momentum > 0, data="my images/a 'b'", label_smoothing=0.1,
                     epochs=3.5, warmup_epochs=0.25)  # fmt: skip
    for given in (usual, config):
        words = shlex.split(to_command(given, {"threads": 2}))
        assert words[:2] == ["cifarlab", "train"]
        parsed = _parse_training(words[2:], "train", "")
        assert parsed.config == given
        assert parsed.watch.threads == 2


def test_json_in_a_page_cannot_end_its_script() -> None:
    text = to_json({"</script><!--": ["&", "\u2028", np.float32(0.5), np.int64(3)]})
    assert "<" not in text
    assert "&" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"</script><!--": ["&", "\u2028", 0.5, 3]}


def test_packed_rows_hold_the_same_values() -> None:
    rows: list[dict[str, Any]] = [{"layer": "ab"[k % 2], "x": k / 3, "n": k % 3, "flag": k % 2 == 0, "cell": [k, 1]}
                                  for k in range(40)]  # fmt: skip
    rows[3]["x"] = float("nan")
    del rows[4]["n"]
    packed = json.loads(json.dumps(pack_rows(rows)))
    assert packed["n"] == 40
    assert set(packed["columns"]["layer"]) == {"of", "at"}

    def value(key: str, k: int) -> Any:
        column = packed["columns"][key]
        return column[k] if isinstance(column, list) else column["of"][column["at"][k]]

    for k, row in enumerate(rows):
        for key in ("layer", "x", "n", "flag", "cell"):
            expected = row.get(key)
            assert value(key, k) == (None if expected != expected else expected)
            assert type(value(key, k)) is type(None if expected != expected else expected)


def test_a_torn_script_in_the_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bundle_vega.__wrapped__()
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path))
    assert bundle_vega.__wrapped__() == whole
    (kept,) = tmp_path.glob("vega-*.js")
    kept.write_text("window.hacked = 6;")
    assert bundle_vega.__wrapped__() == whole
    assert kept.read_text(encoding="utf-8") == whole


def test_conclusions_are_read_as_they_were_meant() -> None:
    text = ("**Best: a**, it is.\nGoes on.\n\n| arm | score |\n| --- | ---: |\n| a <b> | 1 |\n\n"
            "- first\n- second\n  goes on\n\n## Figures")  # fmt: skip
    blocks = list(read_markdown(text))
    assert [block.kind for block in blocks] == ["paragraph", "table", "list", "head"]
    assert blocks[0].text == "**Best: a**, it is. Goes on."
    assert (blocks[1].head, blocks[1].rows) == (["arm", "score"], [["a <b>", "1"]])
    assert [" ".join(entry.split()) for entry in blocks[2].entries] == ["first", "second goes on"]


def test_nothing_to_report_on_is_refused() -> None:
    with pytest.raises(InputError, match="name a run folder"):
        cl.report()
