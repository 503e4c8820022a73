"""Everything a user can get wrong about adapters: one line, the thing and the fix, no change."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedpeft as fp
from fusedpeft.errors import InputError
from fusedpeft.layers import LoraLinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, r"LoRA rank: expected a whole number >= 1, got 0"),
        ({"rank": 2.0}, r"LoRA rank: .*got 2\.0"),
        ({"rank": True}, r"LoRA rank: .*got True"),
        ({"alpha": 0}, r"LoRA alpha: expected a number other than 0, got 0"),
        ({"alpha": float("nan")}, r"LoRA alpha: .*got nan"),
        ({"alpha": "16"}, r"LoRA alpha: .*got '16'"),
        ({"dropout": 1.0}, r"LoRA dropout: expected 0 <= p < 1, got 1\.0"),
        ({"dropout": -0.1}, r"LoRA dropout: .*got -0\.1"),
        ({"dora": 1}, r"LoRA dora: expected true or false, got 1"),
        ({"rslora": "yes"}, r"LoRA rslora: expected true or false, got 'yes'"),
        ({"targets": []}, r"LoRA targets: expected \"all-linear\", a list .*got \[\]"),
        ({"targets": None}, r"LoRA targets: .*got None"),
        ({"targets": ["q_proj", 3]}, r"LoRA targets: .*3"),
        ({"targets": "("}, r"LoRA targets: expected a regular expression, got '\('"),
        ({"rank_pattern": {"q_proj": 0}}, r"LoRA rank_pattern\['q_proj'\]: .*got 0"),
        ({"alpha_pattern": {"(": 1}}, r"LoRA alpha_pattern: expected a regular expression"),
        ({"rank_pattern": [1]}, r"LoRA rank_pattern: expected \{pattern: value\}, got \[1\]"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(InputError, match=message):
        fp.LoRA(**settings)


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_porj"], r"no module is named 'q_porj'; did you mean 'q_proj'"),
        (["q_proj", "v_prj"], r"no module is named 'v_prj'; did you mean 'v_proj'"),
        (["zzz"], r"no module is named 'zzz'; there are 'down_proj'"),
        ("q_proj", r"'q_proj' matches no module's whole path; .* give a list, \[\"q_proj\"\]"),
        (r".*\.w_proj", r"matches no module's whole path; "),
        (["embed_tokens"], r"cannot adapt 'model.embed_tokens', a Embedding: expected nn.Linear"),
        (["mlp"], r"cannot adapt 'model.layers.0.mlp', a LlamaMLP"),
    ],
)
def test_targets(llama, targets, message):
    with pytest.raises(InputError, match=message):
        fp.attach(llama, fp.LoRA(targets=targets))
    untouched(llama)


def untouched(model):
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_fusedpeft")


class Quantised(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


def test_modules_that_only_look_like_linears(llama):
    cases = {"custom": Quantised(4, 4), "hooked": torch.nn.Linear(4, 4)}
    cases["hooked"].register_forward_hook(lambda *_: None)
    cases["attention"] = torch.nn.MultiheadAttention(4, 2)
    for name, message in (
        ("custom", "Quantised: expected a plain nn.Linear"),
        ("hooked", "it has hooks"),
        ("attention", "NonDynamicallyQuantizableLinear"),
    ):
        with pytest.raises(InputError, match=message):
            fp.attach(torch.nn.ModuleDict({name: cases[name]}), fp.LoRA())
    with pytest.raises(InputError, match="no nn.Linear or Conv1D in LayerNorm"):
        fp.attach(torch.nn.LayerNorm(3), fp.LoRA())


def test_names(llama):
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapter: attach or load"):
        fp.activate(llama, "default")
    for name in ("", "a.b", "keys", 3):
        with pytest.raises(InputError, match="adapter name: expected a word without dots"):
            fp.attach(llama, fp.LoRA(), name)
    fp.attach(llama, fp.LoRA(), "helpful")
    with pytest.raises(InputError, match="named 'helpful' is attached already"):
        fp.attach(llama, fp.LoRA(), "helpful")
    with pytest.raises(InputError, match="no adapter is named 'helpfull'; did you mean 'helpful'"):
        fp.activate(llama, ["helpful", "helpfull"])
    with pytest.raises(InputError, match="no adapter is named 'x'; there are 'helpful'"):
        fp.detach(llama, "x")
    with pytest.raises(InputError, match="no adapter is named 'default'"):
        fp.save_adapter(llama, "nowhere")
    fp.attach(llama, fp.LoRA(dora=True), "dora")
    with pytest.raises(InputError, match="DoRA adapter 'dora' .* activate it alone"):
        fp.activate(llama, ["helpful", "dora"])
    with pytest.raises(InputError, match=r"expected a config \(LoRA, .*FullFineTuning\), got dict"):
        fp.attach(llama, {"rank": 8}, "third")
    with pytest.raises(InputError, match="expected a model .*, got str"):
        fp.attach("gpt2", fp.LoRA())


@pytest.fixture
def saved(make_llama, tmp_path):
    folder = tmp_path / "adapter"
    fp.save_adapter(fp.attach(make_llama(), fp.LoRA(targets=["q_proj", "up_proj"])), folder)
    return folder


def refused(model, folder, message):
    with pytest.raises(InputError, match=message) as caught:
        fp.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    untouched(model)


def test_files_that_are_not_there_or_damaged(llama, saved, tmp_path):
    refused(llama, tmp_path / "no", r"expected a folder with an adapter at .*no, there is none")
    weights, config = (saved / WEIGHTS).read_bytes(), (saved / CONFIG).read_text()
    for cut in (len(weights) // 2, 20, 3, 0):
        (saved / WEIGHTS).write_bytes(weights[:cut])
        refused(llama, saved, r"safetensors is damaged or no safetensors file .*: copy or save it")
    (saved / WEIGHTS).unlink()
    refused(llama, saved, rf"expected .*{WEIGHTS}, there is no such file")
    (saved / WEIGHTS).write_bytes(weights)
    for text in (config[:30], "[]", "\x00"):
        (saved / CONFIG).write_text(text)
        refused(llama, saved, r"adapter_config.json: expected (a )?JSON")
    (saved / CONFIG).unlink()
    refused(llama, saved, rf"expected .*{CONFIG}, there is no such file")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_a_pickle_is_never_opened(llama, saved):
    (saved / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, saved / "adapter_model.bin")
    refused(llama, saved, r"adapter_model.bin is a pickle, .*convert it to adapter_model.safetens")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, r"expected peft_type 'LORA', .* got 'IA3'"),
        ({"bias": "all"}, r"bias='all' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4' is not"),
        ({"modules_to_save": ["lm_head"]}, r"has no tensors of lm_head, which its settings name"),
        ({"modules_to_save": ["embed_tokens"]}, r"only plain LoRA and DoRA are: modules_to_save"),
        ({"modules_to_save": 3}, r"modules_to_save: expected a list of names, got 3"),
        ({"modules_to_save": [["x"]]}, r"modules_to_save: expected a list of names, got \[\['x'"),
        ({"peft_type": ["LORA"]}, r"json: peft_type: expected a name, got \['LORA'\]"),
        ({"method": ["OutputLayer"]}, r"json: method: expected a name, got \['OutputLayer'\]"),
        ({"layers_to_transform": "x"}, r"layers_to_transform: expected a list of whole numbers"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "("}, r"layers_pattern: expected a li"),
        ({"lora_bias": True, "use_qalora": True}, r"lora_bias=True, use_qalora=True"),
        ({"from_the_future": 1}, r"from_the_future=1"),
        ({"r": 0}, r"adapter_config.json: LoRA rank: expected a whole number >= 1, got 0"),
        ({"r": 4}, r"8 of another shape: .*lora_A is \(8, 24\), expected \(4, 24\)"),
        ({"use_dora": True}, r"4 missing: .*q_proj.lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, r"4 extra: model.layers.0.mlp.up_proj.lora_"),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, r"4 missing: .*k_proj.lora_A"),
        ({"target_modules": ["c_attn"]}, r"for another base .*no module is named 'c_attn'"),
    ],
)
def test_settings_on_disk(llama, saved, change, message):
    settings = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**settings, **change}))
    refused(llama, saved, message)


def test_tensors_for_another_base(llama, saved):
    tensors = load_file(saved / WEIGHTS)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != key}, r"1 missing: .*1.mlp.up_proj.lora_B"),
        ({**tensors, key: tensors[key][:-1].clone()}, r"is \(39, 8\), expected \(40, 8\)"),
        ({**tensors, key: tensors[key].long()}, r"up_proj.lora_B is torch.int64"),
        ({**tensors, "base_model.model.x.lora_A.weight": torch.zeros(8, 4)}, r"1 extra: x.lora_A"),
        ({**tensors, "base_model.model.wte.lora_embedding_A": torch.zeros(8)}, r"lora_embedding_A"),
        ({**tensors, key: tensors[key] / 0}, r"expected finite numbers, base.*1.mlp.up_proj.lora"),
        (
            {**tensors, key: tensors[key] + torch.inf},
            r"expected finite numbers, base_model.model.m",
        ),
        (
            {k.replace(".layers.1.", ".layers.7."): v for k, v in tensors.items()},
            r"4 missing.*4 ex",
        ),
    ):
        save_file(changed, saved / WEIGHTS)
        refused(llama, saved, message)


@pytest.mark.parametrize(
    "config",
    [fp.LoRA(), fp.BottleneckAdapter(4), fp.PrefixTuning(4), fp.PromptTuning(4), fp.OutputLayer()],
    ids=["lora", "bottleneck", "prefix", "prompt", "output"],
)
def test_numbers_that_are_not_finite(make_llama, tmp_path, config):
    fp.save_adapter(fp.attach(make_llama(), config), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    key = list(tensors)[-1]
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, path)
    refused(make_llama(), tmp_path, f"{path.name}: expected finite numbers, {key} has NaN")


def test_saving_where_a_file_stands(llama, tmp_path):
    fp.attach(llama, fp.LoRA())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="expected a folder, .*file.* is a file"):
            fp.save_adapter(llama, folder)


def test_what_is_no_folder(llama, monkeypatch):
    fp.attach(llama, fp.LoRA())
    with pytest.raises(InputError, match="save_adapter: expected a folder's path, got None"):
        fp.save_adapter(llama, None)
    with pytest.raises(InputError, match="load_adapter: expected a folder's path, got 5"):
        fp.load_adapter(llama, 5, "other")

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot make the folder no \(Permission denied\): name"):
        fp.save_adapter(llama, "no")


@pytest.mark.parametrize("names", [5, True, 0, [["default"]], [None]])
def test_what_is_no_name(llama, names):
    fp.attach(llama, fp.LoRA())
    with pytest.raises(InputError, match="activate: expected an adapter's name, several or None"):
        fp.activate(llama, names)
    assert llama._fusedpeft.active == ("default",)
