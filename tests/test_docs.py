"""The site's pages say what is there: commands parse, snippets compile, names exist, notebooks match their pairs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml

import prefopt
from prefopt.cli import COMMANDS, METHODS, arguments_of, main, method_of, with_current_names, with_positional
from prefopt.launch import LAUNCH_KEYS, launch_words, split_launch_settings
from prefopt.pipelines.run import read_pipeline
from prefopt.recipes.legacy import LEGACY_KEYS
from prefopt.recipes.recipe import build, load_settings, parse_settings
from prefopt.recipes.source import packaged_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import check_links  # noqa: E402
import generated_pages  # noqa: E402
from markdown_docstrings import to_rst  # noqa: E402

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if not {"generated", "_build"} & set(path.relative_to(ROOT).parts)
}
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
# what stands for a word of the reader's in a command
PLACEHOLDERS = {"NAME": "deepspeed_zero3", "DIR": "outputs", "STAGE": "iteration-2", "N": "2", "P": "16"}
RECIPES = {"pipeline": "pipelines/sppo_llama3_8b", "sweep": "qwen2.5-0.5b/multi_reference_study"}
# programs whose own words nobody here can check
FOREIGN = (
    ".ci/run",
    "trl",
    "bash",
    "source",
    "pip",
    "git",
    "hf",
    "python -m venv",
    ".venv-vllm/bin/pip",
    "ACCELERATE_LOG_LEVEL",
)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page, those within lists included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for _, body in found]


def commands_of(page: str) -> list[str]:
    fenced = [
        line
        for language in ("bash", "console")
        for block in blocks(page, language)
        for line in re.sub(r" *\\\n *", " ", block).splitlines()  # a command over several lines
    ]
    indented = re.findall(r"^    ((?:prefopt|python|accelerate) .+)$", PAGES[page], flags=re.MULTILINE)
    in_text = re.findall(r"`(prefopt [a-z][^`]* [^`]+)`", PAGES[page])
    return [line.strip() for line in (*fenced, *indented, *in_text) if line.strip() and not line.startswith("#")]


COMMAND_LINES = sorted({(page, line) for page in PAGES for line in commands_of(page)})
SNIPPETS = [(page, text) for page in PAGES for text in blocks(page, "python")]
YAMLS = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


def known_keys() -> set[str]:
    fields = {field.name for name in COMMANDS for cls in arguments_of(name) for field in dataclasses.fields(cls)}
    return fields | LAUNCH_KEYS | LEGACY_KEYS | {"base_recipe", "env"}


def test_there_is_something_to_check():
    assert len(COMMAND_LINES) > 60 and len(SNIPPETS) > 15 and len(YAMLS) > 5 and len(NOTEBOOKS) == 4


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_a_command_is_understood(page, line):
    if line.startswith(FOREIGN):
        return
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True) if word != "..."]
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    program, *words = words
    if program in ("sbatch", "srun"):
        assert any(word.endswith((".slurm", ".sh")) and (ROOT / word).is_file() for word in words), line
    elif program == "make":
        words = [word for word in words if "=" not in word]
        assert subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "python":
        place = ROOT / (words[1].replace(".", "/") if words[0] == "-m" else words[0])
        assert any(path.is_file() for path in (place, place.with_suffix(".py"), place / "__main__.py")), line
    elif program == "accelerate":
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file() or page.endswith("migrating.md"), line
    else:
        assert program == "prefopt" and words[0] in COMMANDS, line
        recipe = RECIPES.get(words[0], "llama3/wpo")
        read(*(recipe if word == "RECIPE" else word for word in words), whole=page.startswith("docs/how_to/"))


def read(name: str, *words: str, whole: bool) -> None:
    """Read a command's words as the command line does, short of needing the files that they name."""
    words = tuple(with_positional(COMMANDS[name], [*words]))
    if words and (not words[0].startswith("-")) and words[0] not in packaged_names("training_configs"):
        assert words[0].endswith(".yaml"), words[0]
        words = words if (ROOT / words[0]).is_file() else words[1:]
    if name in ("recipes", *(["help"] if not words else [])) or "--help" in words:
        return
    if name == "pipeline":
        read_pipeline(*load_settings([*words]))
        return
    recipe_name, settings = load_settings([*words])
    launch, settings = split_launch_settings(settings)
    launch_words(launch)
    if name in ("check", "score-references"):
        named = [setting for setting in settings if setting.key == "method"]
        name = method_of(settings) if named else "wpo"
    elif launch:
        assert COMMANDS[name].launched or name in METHODS
    recipe = parse_settings(recipe_name, with_current_names(name, settings), arguments_of(name))
    if whole and recipe_name and name in METHODS:
        assert recipe.values["output_dir"]
    elif whole and name not in METHODS:
        build(recipe, arguments_of(name))


@pytest.mark.parametrize(("page", "text"), SNIPPETS)
def test_a_snippet_compiles_and_imports_what_it_names(page, text):
    if "(path, name=None" in text:  # signatures, not calls
        text = re.split(r"\n\n", text)[0]
    check_python(ast.parse(text))


def check_python(tree: ast.AST) -> None:
    """Imports of ours exist, and configs are given settings that they have."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("prefopt", "trl"):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and dataclasses.is_dataclass(names.get(node.func.id))
        ):
            fields = {field.name for field in dataclasses.fields(names[node.func.id])}
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= fields, ast.unparse(node)


def test_a_ranker_of_your_own_is_not_read_as_the_published_one():
    (line,) = (
        line for line in commands_of("docs/how_to/sppo_with_a_preference_model.md") if "--ranking.model_name" in line
    )
    ranking = yaml.safe_load(read_pipeline(*load_settings(shlex.split(line)[2:]))[2])["ranking"]
    assert (ranking["released_format"], ranking["policy_template"]) == ("trained", None)


def test_the_adversarial_guide_makes_the_files_that_its_recipe_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "downloaded").mkdir()

    def dialogue(name: str) -> str:
        return f"\n\nHuman: a question for {name}\n\nAssistant:"

    def comparison(name: str) -> dict[str, object]:
        return {"text": [f"{dialogue(name)}<sep> yes", f"{dialogue(name)}<sep> no"], "scores": [1.0, 0.0]}

    files = {
        "hh_split_rm.golden": [{"query_id": 0, "query": dialogue("rewards"), "golden": " yes"}],
        "hh_split_rm_alpaca_v0.sample": [{"query_id": 0, "query": dialogue("rewards"), "sample_0": " no"}],
        "hh_split_llm_alpaca_v0.sample": [{"query_id": 0, "query": dialogue("policies"), "sample_0": " no"}],
        "hh_split_rm.train": [comparison("training")],
        "hh_cleaned_origin.test": [comparison("tests"), comparison("tests")],
        "hh_cleaned_origin.train": [comparison("all")],
    }
    for name, rows in files.items():
        (tmp_path / "downloaded" / f"{name}.json").write_text(json.dumps(rows))
    (snippet,) = blocks("docs/how_to/apo_on_hh.md", "python")
    exec(compile(snippet, "apo_on_hh.md", "exec"), {})
    lines = (tmp_path / "data/hh_split/eval/test_prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt_id": "test-0", "prompt": dialogue("tests")}]
    assert main(["pipeline", "pipelines/adversarial_llama_7b", "--dry_run"]) == 0, capsys.readouterr().err
    assert "adversarial-reward-model" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "text"), YAMLS)
def test_a_recipe_on_a_page_is_read(page, text, tmp_path):
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    if "pipeline" in values:
        known = {f.name for loop in generated_pages.LOOPS.values() for f in dataclasses.fields(loop.keys)}
        assert set(values) <= known | {f.name for f in dataclasses.fields(generated_pages.PipelineArguments)}
        return
    name, settings = load_settings([str(path)])
    if any(setting.key == "method" for setting in settings):
        parse_settings(name, settings, arguments_of(method_of(settings)))
    assert {setting.key.partition(".")[0] for setting in settings} <= known_keys()


def test_json_on_pages_is_json():
    for page in PAGES:
        for text in blocks(page, "json"):
            json.loads(text)


def test_every_recipe_config_and_file_that_a_page_names_exists():
    recipes, configs = set(packaged_names("training_configs")), set(packaged_names("accelerate_configs"))
    folders = {name.partition("/")[0] for name in recipes if "/" in name}
    for page, text in PAGES.items():
        for name in re.findall(r"`([a-z0-9.-]+/[a-z0-9_]+)`", text):
            if name.partition("/")[0] in folders and name.partition("/")[0] != "pipelines":
                assert name in recipes, f"{page}: {name}"
        for name in re.findall(r"`(deepspeed_zero\w+|fsdp2(?:_hsdp)?|cpu_\w+_2ranks|single_gpu|multi_gpu)`", text):
            assert name in configs, f"{page}: {name}"
        for path in re.findall(
            r"`((?:examples|benchmarks|scripts|tests|docs)/[\w./]+\.(?:py|sh|yaml|slurm|md))`", text
        ):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_first_page_names_every_extra_of_a_user():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [
        name for name in extras if name not in ("dev", "docs") and f"`{name}` for " not in PAGES["docs/index.md"]
    ]


def test_an_error_message_that_troubleshooting_quotes_is_one_of_ours():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message goes over several lines
    first = PAGES["docs/how_to/troubleshooting.md"].split("## It does not start")[1].split("\n## ")[0]
    quoted = [text for row in re.findall(r"^\| (.+?) \|", first, re.M) for text in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(quoted) >= 6
    assert not [text for text in quoted if text not in source]


def test_the_paper_index_has_every_paper():
    mentioned = set()
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "training_configs").rglob("*.yaml")):
        mentioned |= set(re.findall(r"\b2[0-9]{3}\.[0-9]{5}\b", path.read_text()))
    for page, text in PAGES.items():
        if page != "docs/reference/papers.md":
            mentioned |= set(re.findall(r"\b2[0-9]{3}\.[0-9]{5}\b", text))
    listed = set(re.findall(r"\[(2[0-9]{3}\.[0-9]{5})\]", PAGES["docs/reference/papers.md"]))
    assert listed == mentioned


def test_every_metric_that_a_trainer_records_is_in_the_glossary():
    recorded = set()
    for path in (ROOT / "src" / "prefopt" / "trainers").glob("*.py"):
        recorded |= set(re.findall(r'\.add_(?:mean|min|max)\(\s*f?"([^"_][^"]*)"', path.read_text()))
    recorded -= {"not_finite"}
    assert len(recorded) > 30
    glossary = PAGES["docs/reference/metrics.md"]
    patterns = [
        re.escape(name).replace(r"\*", ".+") for name in re.findall(r"`([a-z_0-9]+(?:/[a-z_*0-9]+)*\*?)`", glossary)
    ]
    said = {"side": "chosen", "kind": "human", "suffix": ""}
    filled = {re.sub(r"\{(\w+)\}", lambda found: said.get(found[1], "x"), name) for name in recorded}
    assert not [name for name in filled if not any(re.fullmatch(pattern, name) for pattern in patterns)]


# --- the API pages

API_PAGES = {page: text for page, text in PAGES.items() if page.startswith("docs/reference/api_")}
NOT_FOR_USERS = ("docs/extending.md", "docs/architecture.md")  # they show how the library itself is changed


def found(dotted: str) -> tuple[str, object]:
    """The module of a dotted name, and what the name stands for: a module, or a name in one."""
    try:
        return dotted, importlib.import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        return module, getattr(importlib.import_module(module), name)


def documented_modules(text: str) -> set[str]:
    """The modules that an API page describes, in whole or in some of their names."""
    modules = set()
    for kind, dotted, options in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", text, re.M):
        module, value = found(dotted)
        modules.add(module if kind == "module" else value.__module__)
        if ":imported-members:" in options:
            modules |= {getattr(value, name).__module__ for name in value.__all__}
    return modules


def public_modules() -> set[str]:
    """Those of what `prefopt` exports, all of evaluation, and those that pages and notebooks import from or name."""
    exported = [name for name in prefopt.__all__ if not name.endswith("Config")]  # settings have pages of their own
    modules = {found(f"prefopt.{name}")[1] for name in exported}
    modules = {getattr(value, "__module__", None) or value.__name__ for value in modules}
    modules |= {f"prefopt.evaluation.{path.stem}" for path in (ROOT / "src/prefopt/evaluation").glob("[a-z]*.py")}
    texts = [text for page, text in PAGES.items() if page not in (*NOT_FOR_USERS, *API_PAGES)]
    for text in (*texts, *(path.read_text() for path in NOTEBOOKS)):
        imported = re.findall(r"^from (prefopt\.[\w.]+) import", text, re.M)
        named = re.findall(r"`(prefopt\.[a-z_.]+\w*)", text)
        modules |= {found(name)[0] for name in (*imported, *named)}
    return modules - {"prefopt", "prefopt.evaluation"}


def test_every_public_module_is_on_one_api_page():
    pages = {page: documented_modules(text) for page, text in API_PAGES.items()}
    public = public_modules()
    assert len(public) > 40 and "prefopt.evaluation.judge" in public and "prefopt.trainers.samples" in public
    places = {module: [page for page in pages if module in pages[page]] for module in sorted(public)}
    assert {module: pages for module, pages in places.items() if len(pages) != 1} == {}
    listed = re.findall(r"^(api_\w+)$", PAGES["docs/reference/index.md"], re.M)
    assert sorted(API_PAGES) == sorted(f"docs/reference/{name}.md" for name in listed)


# --- pages from the code


def test_every_setting_of_a_method_is_on_exactly_one_page():
    pages = "\n".join([generated_pages.settings_of_methods(), generated_pages.settings_shared()])
    libraries = generated_pages.settings_of_libraries()
    for name in METHODS:
        for cls in arguments_of(name):
            for field in dataclasses.fields(cls):
                if field.init and field.name not in generated_pages.WITHOUT_EFFECT:
                    assert f"| `{field.name}` |" in pages + libraries, f"{name}: {field.name}"
    assert "| `max_weight` | `1.0` | Largest weight of a pair" in pages
    assert "rows longer than `max_length` under any model" in pages
    assert "| `beta` | `0.01` |" in pages.split("`WPOConfig`")[1].split("\n## ")[0]


def test_recipes_and_older_keys_are_listed():
    page = generated_pages.recipes()
    for name in packaged_names("training_configs"):
        assert name.startswith("fragments/") or f"| `{name}` |" in page
    row = next(line for line in page.splitlines() if line.startswith("| `gemma2/wpo` |"))
    assert "`google/gemma-2-9b-it`" in row and "`HuggingFaceH4/ultrafeedback_binarized`" in row
    older = generated_pages.older_keys()
    assert all(f"`{key}" in older for key in LEGACY_KEYS)


def test_other_defaults_are_those_of_a_swap():
    rows = generated_pages.other_defaults()
    assert "| `beta` | `0.1` | `0.1` | `0.01` |" in rows and "learning_rate" not in rows


def test_a_page_without_a_place_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_pages, "HERE", tmp_path)
    (tmp_path / "index.md").write_text("```{toctree}\n:hidden:\n\nplaced\n```\n")
    (tmp_path / "explanation.md").write_text("")
    for name in ("placed", "lost"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n")
    assert generated_pages.unlisted(tmp_path).splitlines()[-2:] == ["lost", "```"]


def test_docstrings_become_restructuredtext():
    lines = [
        "Do *this* with `x|y`.",
        "",
        "    L = a * b",
        "",
        "Args:",
        "    x: one of `a`s.",
        "",
        "```python",
        "f(*x)",
        "```",
    ]
    to_rst(lines)
    text = "\n".join(lines)
    assert "Do \\*this\\* with ``x|y``." in text and "::\n\n    L = a * b" in text
    assert ".. code-block:: python\n\n    f(*x)" in text and "``a``\\ s" in text


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">x</a><a href="b.html#there">y</a><img src="no.png"><a href="https://x.y">z</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here">x</p>')
    assert check_links.broken_links(tmp_path) == [
        "a.html: b.html#there: no such anchor",
        "a.html: no.png: no such file",
    ]


# --- notebooks


def cells(path: Path) -> list[str]:
    """The cells of a jupytext file in the percent format, Markdown without its comment marks."""
    parts = re.split(r"^# %%(.*)\n", path.read_text().split("# ---\n", 2)[2], flags=re.MULTILINE)[1:]
    found = []
    for kind, body in zip(parts[::2], parts[1::2]):
        text = body.strip("\n")
        found.append(re.sub(r"^# ?", "", text, flags=re.MULTILINE) if "markdown" in kind else text)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_has_outputs_and_is_its_pair(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    assert ["".join(cell["source"]).strip("\n") for cell in notebook["cells"]] == cells(path), "run `make notebooks`"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert any("## On a GPU" in line for line in notebook["cells"][-1]["source"])
    check_python(ast.parse(path.read_text()))
    for name in re.findall(
        r"`(?:prefopt [a-z-]+ )?((?:pipelines|llama3|llama-7b|qwen2.5-0.5b)/\w+)", path.read_text()
    ):
        assert name in packaged_names("training_configs"), name


def test_the_site_has_a_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    makefile, script = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    assert steps == ["make docs", "make notebooks"]
    assert all(f"\n{step.split()[1]}: $(DOCS_READY)" in makefile and step in script for step in steps)
    assert workflow["jobs"]["publish"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert prefopt.__version__
