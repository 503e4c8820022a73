"""The configuration file: each way to get it wrong is one line with the thing and the fix."""

import json
import re

import pytest
import yaml

from fusedpeft.errors import InputError
from fusedpeft.workflow.config import Config, Lora, dump_config, load_config, shortened

GOOD = """\
name: mini
base: base
sft:
  data: sft.jsonl
reward:
  data: [pairs.jsonl, more.jsonl]
  max_steps: 7
pro:
  data: lists.jsonl
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base and data files (empty: the configuration only asks whether they exist)."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in ("sft", "pairs", "more", "lists"):
        (tmp_path / f"{name}.jsonl").write_text("")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("FP_BASE", "FP_SEED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def load(folder):
    def load(text=GOOD, overrides=(), shorten=None):
        path = folder / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, shorten)

    return load


@pytest.fixture
def refuse(load, folder):
    """The one line of the error, without the file's path in front."""

    def refuse(text=GOOD, overrides=(), shorten=None):
        before = sorted(folder.rglob("*"))
        with pytest.raises(InputError) as error:
            load(text, overrides, shorten)
        line = str(error.value)
        assert "\n" not in line
        assert set(folder.rglob("*")) - set(before) <= {folder / "run.yaml"}
        return line.removeprefix(f"{folder / 'run.yaml'}").removeprefix(": ")

    return refuse


def test_a_good_file(load, folder):
    config = load()
    assert config.name == "mini" and config.stages() == ["sft", "reward", "pro", "report"]
    assert config.base == folder / "base"
    assert config.training("reward").data == [folder / "pairs.jsonl", folder / "more.jsonl"]
    assert config.training("sft").data == [folder / "sft.jsonl"]
    assert config.run_dir == folder / "elsewhere" / "runs" / "mini"
    assert config.training("reward").max_steps == 7 and config.training("sft").max_steps == -1
    assert config.lora == Lora() and config.evaluate is None


def test_paths_start_at_the_file_and_the_output_where_one_stands(load, folder, monkeypatch):
    text = GOOD + "output: out/here\nevaluate: {tasks: mmlu, data: ./x/../tasks}\n"
    config = load(text.replace("tasks: mmlu", "tasks: [mmlu]"))
    assert config.evaluate.data == folder / "tasks"
    assert config.run_dir == folder / "elsewhere" / "out" / "here"
    monkeypatch.setenv("HOME", str(folder))
    config = load(GOOD.replace("base: base", "base: ~/base") + "output: ~/runs/x\n")
    assert config.base == folder / "base" and config.run_dir == folder / "runs" / "x"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("base: base", "bsae: base"),
            "unknown key 'bsae' in the top level: did you mean 'base'? (and 1 more problem)",
        ),
        (
            ("  max_steps: 7", "  max_step: 7"),
            "unknown key 'max_step' in section 'reward': did you mean 'max_steps'?",
        ),
        (
            ("  max_steps: 7", "  lerning_rate: 7"),
            "unknown key 'lerning_rate' in section 'reward': did you mean 'learning_rate'?",
        ),
        (
            ("  max_steps: 7", "  answers: 7"),
            "unknown key 'answers' in section 'reward': expected one of data, holdout, ",
        ),
        (
            ("sft:", "lora: {zzz: 1}\nsft:"),
            "unknown key 'zzz' in section 'lora': expected one of rank, alpha, dropout, targets, "
            "rslora, dora",
        ),
        (("sft:", "7: x\nsft:"), "7: Keys should be strings, got "),
        (("base: base\n", ""), "expected a value for 'base', there is none"),
        (("  data: sft.jsonl", "  max_steps: 1"), "expected a value for 'sft.data', there is none"),
        (("name: mini", "name: .."), "name: String should match pattern"),
        (("name: mini", "name: a/b"), "name: String should match pattern"),
        (("name: mini", "name: [a]"), "name: Input should be a valid string, got ['a']"),
        (
            ("name: mini", "name: mini\nseed: -1"),
            "seed: Input should be greater than or equal to 0",
        ),
        (
            ("name: mini", "name: mini\nseed: 1.5"),
            "seed: Input should be a valid integer, got a num",
        ),
        (
            ("name: mini", "name: mini\nseed: 4294967296"),
            "seed: Input should be less than 4294967296, got 4294967296",
        ),
        (
            ("name: mini", "name: mini\nthreads: 100000"),
            "threads: Input should be less than or equal to 1024, got 100000",
        ),
        (("name: mini", "name: mini\nseed: true"), "seed: expected another value than true or fal"),
        (
            ("name: mini", "name: mini\nthreads: 0"),
            "threads: Input should be greater than or equal",
        ),
        (("data: sft.jsonl", "data: []"), "sft.data: expected a file or a list of files, got []"),
        (("data: sft.jsonl", "data: 3"), "sft.data: expected a file or a list of files, got 3"),
        (("max_steps: 7", "max_steps: many"), "reward.max_steps: Input should be a valid integer"),
        (
            ("max_steps: 7", "eval_steps: yes"),
            "reward.eval_steps: expected another value than true",
        ),
        (("max_steps: 7", "holdout: 0"), "reward.holdout: Input should be greater than 0, got 0"),
        (("max_steps: 7", "holdout: 1"), "reward.holdout: Input should be less than 1, got 1"),
        (("max_steps: 7", "learning_rate: .inf"), "reward.learning_rate: Input should be a finite"),
        (("max_steps: 7", "learning_rate: .nan"), "reward.learning_rate: Input should be a finite"),
        (
            ("max_steps: 7", "learning_rate: 0"),
            "reward.learning_rate: Input should be greater than 0",
        ),
        (("max_steps: 7", "truncate: 3"), "reward.truncate: Input should be a valid boolean"),
        (("sft:", "lora: {rank: many}\nsft:"), "lora.rank: Input should be a valid integer"),
        (("sft:", "lora: {targets: [1]}\nsft:"), "lora.targets.0: Input should be a valid string"),
        (("sft:", "lora: 3\nsft:"), "lora: Input should be a valid dictionary or instance of Lora"),
        (
            ("sft:", "evaluate: {tasks: [arc]}\nsft:"),
            "evaluate.tasks.0: Input should be 'mmlu' or ",
        ),
    ],
)
def test_wrong_values_are_named(refuse, change, line):
    old, new = change
    assert old in GOOD
    found = refuse(GOOD.replace(old, new, 1))
    assert found.startswith(line), found


def test_one_wrong_value_is_one_problem(refuse):
    line = refuse(GOOD.replace("sft:", "lora: {targets: 3}\nsft:", 1))
    assert line == "lora.targets: Input should be a valid string, got 3"
    line = refuse("name: x\nbase: base\nseed: -1\nthreads: 0\nsft: {data: x, holdout: 2}\n")
    assert line.startswith("seed: ") and line.endswith("(and 2 more problems)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GOOD + "name: again\n", " line 10: not valid YAML: key 'name' stands here twice"),
        (
            "name: x\nsft:\n  data: a\n  holdout: 0.1\n  data: b\n",
            " line 5: not valid YAML: key 'data' stands here twice",
        ),
        ("name: [1, 2\n", "not valid YAML"),
        ("name: x\n  base: y\n", " line 2: not valid YAML: mapping values are not allowed here"),
        ("name: a\x07b\n", "not valid YAML: unreadable"),
        ("? [a, b]\n: 1\n", " line 1: not valid YAML: found unhashable key"),
        (
            "name: !!python/object:os.system x\n",
            "not valid YAML: could not determine a constructor",
        ),
        ("- a\n- b\n", "expected a mapping with name, base, sft, …, got ['a', 'b']"),
        ("", "expected a mapping with name, base, sft, …, got None"),
    ],
)
def test_broken_yaml_is_named_with_its_line(refuse, text, line):
    found = refuse(text)
    assert line in found, found


def test_anchors_and_merges_are_yaml_and_no_duplicates(load, folder):
    text = (
        "name: x\nbase: base\n"
        "sft: &s {data: sft.jsonl, max_steps: 3, save_steps: 2}\n"
        "reward: {<<: *s, data: pairs.jsonl, max_steps: 5}\n"
    )
    reward = load(text).reward
    assert (reward.data, reward.max_steps, reward.save_steps) == ([folder / "pairs.jsonl"], 5, 2)


def test_a_file_that_cannot_be_read(folder):
    with pytest.raises(InputError, match="none.yaml: expected a YAML file, there is none"):
        load_config(folder / "none.yaml")
    with pytest.raises(InputError, match="base: expected a YAML file, there is none"):
        load_config(folder / "base")
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match="latin.yaml: expected UTF-8 text"):
        load_config(folder / "latin.yaml")


def test_variables(load, refuse, folder, monkeypatch):
    text = GOOD.replace("base: base", "base: ${FP_BASE:-ba}${FP_TAIL:-se}\nseed: ${FP_SEED:-3}")
    text = text.replace("[pairs.jsonl,", "['${FP_FILE:-pairs}.jsonl',")
    config = load(text)
    assert (config.base, config.seed) == (folder / "base", 3)
    assert config.reward.data[0] == folder / "pairs.jsonl"
    monkeypatch.setenv("FP_SEED", "11")
    assert load(text).seed == 11
    monkeypatch.setenv("FP_SEED", "")
    assert load(text).seed == 3  # empty is unset, as in a shell's :-
    line = refuse(GOOD.replace("base: base", "base: ${FP_BASE}/x"))
    assert line == "${FP_BASE}: the environment variable FP_BASE is not set"
    monkeypatch.setenv("FP_SEED", "many")
    assert refuse(text).startswith("seed: Input should be a valid integer")


def test_an_override_is_expanded_too(load, monkeypatch):
    monkeypatch.setenv("FP_SEED", "5")
    assert load(overrides=["seed=${FP_SEED}"]).seed == 5


def test_overrides(load, folder):
    config = load(
        overrides=[
            "sft.learning_rate=1e-3", "sft.max_steps=3", "lora.targets=[q_proj, v_proj]",
            "lora.dora=true", "evaluate.tasks=[mmlu]", f"evaluate.data={folder / 'tasks'}",
            "pro=", "name=other", "sft.max_steps=4",
        ]
    )  # fmt: skip
    assert config.sft.learning_rate == 1e-3 and config.sft.max_steps == 4
    assert config.lora.targets == ["q_proj", "v_proj"] and config.lora.dora is True
    assert config.stages() == ["sft", "reward", "evaluate", "report"] and config.pro is None
    assert config.run_dir.name == "other"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set: expected KEY=VALUE such as sft.max_steps=10, got 'seed'"),
        ("=3", "--set: expected KEY=VALUE such as sft.max_steps=10, got '=3'"),
        ("sft..x=3", "--set: expected KEY=VALUE such as sft.max_steps=10, got 'sft..x=3'"),
        ("seed.x=3", "--set seed.x: 'seed' is a value, not a section"),
        ("sft.data.x=3", "--set sft.data.x: 'data' is a value, not a section"),
        ("lora.targets=[q", "--set lora.targets: not valid YAML: '[q'"),
        ("sft.lr=3", "unknown key 'lr' in section 'sft': expected one of data"),
        ("sft.max_step=3", "unknown key 'max_step' in section 'sft': did you mean 'max_steps'?"),
        ("reward.data=no.jsonl", "reward.data: there is no file "),
    ],
)
def test_wrong_overrides_are_named(refuse, override, line):
    found = refuse("seed: 1\n" + GOOD, [override])
    assert found.startswith(line), found


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("base: base", "base: nowhere", r"base: expected a folder with a model's config.json, got"),
        ("base: base", "base: tasks", r"base: expected a folder with a model's config.json, got"),
        ("data: sft.jsonl", "data: no.jsonl", r"sft.data: there is no file .*/no.jsonl$"),
        ("more.jsonl", "tasks", r"reward.data: there is no file .*/tasks$"),
        (
            "name: mini",
            "name: mini\nevaluate: {tasks: [mmlu, hellaswag]}",
            r"evaluate.data: expected the folder with the files of mmlu, hellaswag, got None$",
        ),
        (
            "name: mini",
            "name: mini\nevaluate: {tasks: [mmlu], data: gone}",
            r"evaluate.data: expected the folder with the files of mmlu, got .*/gone$",
        ),
        (
            "name: mini",
            "name: mini\noutput: ../sft.jsonl",
            r"output: expected a folder, .* a file$",
        ),
    ],
)
def test_missing_files_are_named(refuse, old, new, line):
    found = refuse(GOOD.replace(old, new, 1))
    assert re.match(line, found), found


def test_an_evaluation_without_tasks_needs_no_data(load, refuse):
    assert load(GOOD + "evaluate: {}\n").evaluate.tasks == []
    line = refuse(GOOD + "evaluate: {}\n", ["sft="])
    assert line.startswith("evaluate: expected tasks (mmlu, hellaswag), or a section sft")


def test_a_stage_without_a_section(load):
    config = load(overrides=["reward="])
    with pytest.raises(InputError, match="the configuration has no section 'reward': add it"):
        config.training("reward")


def test_shortened(load, folder):
    text = GOOD + f"evaluate: {{tasks: [mmlu], data: {folder / 'tasks'}, limit: 3}}\n"
    overrides = ["sft.eval_steps=2", "pro.answers=9", "sft.save_steps=1", "report.samples=1"]
    whole, short = load(text, overrides), load(text, overrides, shorten=10)
    assert short.run_dir == whole.run_dir.with_name("mini-short") and short.name == whole.name
    assert (short.sft.max_steps, short.reward.max_steps, short.pro.max_steps) == (10, 7, 10)
    assert (short.sft.save_steps, short.pro.save_steps) == (1, 5)
    assert short.sft.eval_steps is None and short.sft.logging_steps == 1
    assert short.sft.max_eval_rows == 40 and short.pro.answers == 9
    assert short.evaluate.limit == 3 and short.report.samples == 1
    assert load(text, ["reward.max_eval_rows=2"], shorten=10).reward.max_eval_rows == 2
    one = load(text, overrides, shorten=1)
    assert (one.sft.max_steps, one.sft.save_steps, one.pro.answers) == (1, 1, 1)
    assert one.evaluate.limit == 1
    assert short.sft.learning_rate == whole.sft.learning_rate and short.sft.data == whole.sft.data


def test_shortened_to_nothing(refuse):
    assert refuse(shorten=0) == "--shorten: expected a number of steps >= 1, got 0"


def test_what_is_written_beside_the_results_can_be_run_again(load, folder, monkeypatch):
    text = GOOD + f"evaluate: {{tasks: [mmlu], data: {folder / 'tasks'}}}\n"
    config = load(text, ["lora.targets=[q_proj]", "name=실험"], shorten=3)
    dumped = dump_config(config)
    assert "실험" in dumped and "${" not in dumped
    again = folder / "config.yaml"
    again.write_text(dumped, encoding="utf-8")
    monkeypatch.chdir("/")
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dumped


def test_a_default_that_is_written_out_changes_nothing(load):
    """Runs are told apart by these values: 16 and 16.0 must not look like two settings."""
    plain = load()
    explicit = {
        "lora": json.loads(plain.lora.model_dump_json()),
        "sft": plain.sft.model_dump(mode="json"),
        "report": plain.report.model_dump(mode="json"),
    }
    text = yaml.safe_dump(yaml.safe_load(GOOD) | explicit)
    assert dump_config(load(text)) == dump_config(plain)
    whole = load(overrides=["lora.alpha=16", "sft.warmup_steps=0", "sft.num_train_epochs=1"])
    assert dump_config(whole) == dump_config(plain)


def test_a_configuration_cannot_be_changed_in_place(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert shortened(config, 2) is not config and config.sft.max_steps == -1


def test_the_examples_load(folder, shared_data, monkeypatch):
    from pathlib import Path

    monkeypatch.setenv("FUSEDPEFT_DATA", str(shared_data))
    examples = Path(__file__).resolve().parents[2] / "examples"
    config = load_config(examples / "hh.yaml")
    assert isinstance(config, Config)
    assert config.stages() == ["sft", "reward", "pro", "evaluate", "report"]
    assert all(0.15 < getattr(config, s).holdout < 0.25 for s in ("sft", "reward", "pro"))
