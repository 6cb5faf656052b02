"""Every block of code in README and the documentation runs, every command and message that they name is there."""

import re
import shlex

import click
import pytest
import typer
from documented import NOTEBOOKS, PAGES, ROOT, blocks, cells, execute, is_said, surroundings, texts_of
from toys.muon_and_adam import MuonAndAdam
from typer.testing import CliRunner

import adam_ghost
from adam_ghost.cli import app
from bench.__main__ import app as bench_app

NEEDS = {"loops.md": ("lightning", "transformers", "accelerate"), "README.md": ("lightning", "transformers")}
LEDGER = ("duckdb", "pandas")  # of pages with ledgers
LONG = {"demo"}  # other tests run these; here only whether they are asked for rightly
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
# said in passing: `adam-ghost top`, `make docs`, `python -m bench books`
NAMED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "adam_ghost").rglob("*.py"))]


def command(application: typer.Typer, arguments: list[str]) -> None:
    """Fails unless ``arguments`` are a command of ``application`` with options that it has."""
    group = typer.main.get_command(application)
    group.make_context("program", list(arguments), resilient_parsing=False)  # its own options
    if arguments[0].startswith("-"):
        return
    assert arguments[0] in group.commands, f"no command {arguments[0]}"
    group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def obey(line: str) -> None:
    """A line of shell: runs what reads a ledger, holds other commands against what there is."""
    words = shlex.split(line)
    match words:
        case ["adam-ghost", *arguments]:
            if arguments[0] in LONG:
                command(app, arguments)
            else:
                done = CliRunner().invoke(app, arguments)
                assert done.exit_code == 0, f"{line}: {done.output}"
        case ["make", target]:
            assert target in MAKE, line
        case ["pip", "install", *what]:
            what = [w for w in what if w != "-e"]
            extras = re.fullmatch(r"\.(?:\[(\w+)\])?", what[0])
            assert len(what) == 1 and (what[0] == "dist/adam_ghost-*.whl" or (extras and extras[1] in {*EXTRAS, None})), line
        case ["python", "-m", "bench", *arguments]:
            command(bench_app, arguments)
        case ["python", program, *_]:
            assert (ROOT / program).is_file(), line
        case _:
            raise AssertionError(f"nothing is known of the command {line!r}")


def frameworks(namespace: dict) -> None:
    """What README's lines for frameworks take for granted."""
    import lightning
    import transformers

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = namespace["nn"].Linear(20, 5)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return namespace["F"].cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return namespace["torch"].optim.AdamW(self.parameters())

    torch = namespace["torch"]
    texts = torch.randint(0, 50, (12, 8))
    samples = [{"input_ids": row, "labels": row} for row in texts]
    arguments = transformers.TrainingArguments("hf", per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(namespace["x"], namespace["y"]), 100)
    made = []

    def fitting(**options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
        made.extend(options["callbacks"])  # before Lightning adds its own to the list
        lightning.Trainer(**quiet, **options).fit(Module(), loader)

    hf = transformers.Trainer(gpt2, arguments, train_dataset=samples)
    namespace |= {"Trainer": fitting, "trainer": hf, "val_batch": {"input_ids": texts[:2], "labels": texts[:2]}}
    namespace["fitted"] = made


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended", "ignore:adam_ghost. windows of", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:adam_ghost. no weight is recommended")  # of a training that is no more than an example
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, tmp_path, monkeypatch, capsys):
    found = blocks(page)
    if not found:
        return
    for library in (*NEEDS.get(page.name, ()), *(LEDGER if "ledger" in page.read_text(encoding="utf-8") else ())):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    namespace = surroundings()
    for block in found:
        assert block.language in ("python", "sh", "text"), f"{page}:{block.line}: say what the block is written in"
        if block.language == "python" and not block.run:
            compile(block.code, str(page), "exec")
        elif block.language == "python":
            if page.name == "README.md" and "integrations" in block.code and "Trainer" not in namespace:
                frameworks(namespace)
            execute(block, namespace)
        elif block.language == "sh":
            for line in block.code.splitlines():
                obey(line)
    if page.name == "optimizers.md":
        namespace["run"].close()
        one = MuonAndAdam(namespace["matrices"], namespace["rest"])  # is known by now
        adam_ghost.InRun(namespace["model"], one, namespace["val_loss"]).close()
    if page.name == "README.md":
        wrong = {i for i, _ in namespace["run"].top(50, harmful=True)} & set(range(50))
        assert len(wrong) > 25  # 2.5 by chance
        namespace["trainer"].train()
        (callback,) = namespace["fitted"]
        assert len(callback.run.steps) == 12 and callback.run.scores().ids[:3] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook):
    for library in ("pandas", "sklearn"):
        pytest.importorskip(library)
    namespace = {}
    for number, code in enumerate(cells(notebook), 1):
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), namespace)
    if notebook.stem == "wrong_labels":
        loss = {name: found[0] for name, found in namespace["found"].items()}
        assert loss["lowest scores"] < 0.8 * loss["nothing"] < 0.8 * loss["at random"]
    else:
        assert namespace["gap"] < 0.02 and namespace["step"].audit.r > 0.999


def test_nothing_is_indented_that_would_run():
    """Four blanks are for formulas: the tests do not see them."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for line in re.findall(r"^ {4,}(\S.*)$", text, re.M):
            assert not re.match(r"(import|from) |run\.|adam_ghost\.|pip |make |python ", line), f"{page.name}: {line}"


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_said_in_passing_are_there(path):
    text = path.read_text(encoding="utf-8")
    ours = typer.main.get_command(app).commands.keys()
    theirs = typer.main.get_command(bench_app).commands.keys()
    for name in re.findall(r"`adam-ghost ([a-z]+)", text):
        assert name in ours, f"{path}: adam-ghost {name}"
    for name in re.findall(r"python -m bench ([a-z]+)", text):
        assert name in theirs, f"{path}: python -m bench {name}"
    for name in re.findall(r"`make ([a-z-]+)`", text):
        assert name in MAKE, f"{path}: make {name}"
    for name in re.findall(r"`((?:examples|bench|tests|csrc|docs|kernels)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{path}: {name}"


MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "messages.md").read_text(encoding="utf-8"), re.M)
SAID = texts_of(ROOT / "adam_ghost")


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_source(message):
    assert is_said(message, SAID)


def test_a_message_that_nobody_says_is_found_out():
    assert not is_said("run.batch got … ids, but the model was called with a batch of … rows of nothing", SAID)


def test_every_page_has_its_place_in_the_site():
    told = re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(told) == sorted(page.name for page in PAGES[1:])


def test_the_shell_is_held_against_what_is_there():
    for line in ("make nothing", "adam-ghost nothing", "python -m bench nothing", "pip install adam-ghost", "curl x"):
        with pytest.raises((AssertionError, click.ClickException, SystemExit)):
            obey(line)
