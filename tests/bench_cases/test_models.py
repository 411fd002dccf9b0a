"""The models: seeded, padded, pooled where the text ends, cut where the head begins."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    FNetConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    T5Config,
)

from bench_cases import ARCHITECTURES, TASKS, Architecture
from bench_cases.models import ModelError, ModelRequest, WeightsUnavailable, build_model, padded_vocabulary, weights_sha256
from bench_cases.own import case_for_model
from bench_cases.transformers_models import _sized_configuration

VOCABULARY = 1_000


def request(arch="gpt2", task="clm", **changes) -> ModelRequest:
    outputs = 7 if task.endswith("cls") else None
    plain = ModelRequest(
        ARCHITECTURES[arch],
        TASKS[task],
        "tiny",
        VOCABULARY,
        pad_id=1,
        bos_id=0,
        eos_id=2,
        outputs=outputs,
        weights="scratch",
        dropout=0.0,
        seed=0,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("arch", "task", "width"),
    [
        ("gpt2", "clm", padded_vocabulary(VOCABULARY)),
        ("roberta", "mlm", padded_vocabulary(VOCABULARY)),
        ("gpt2", "multi_cls", 7),
        ("roberta", "single_cls", 7),
    ],
)
def test_shapes_and_padded_vocabulary(arch, task, width):
    model = build_model(request(arch, task))
    logits = model(torch.full((2, 9), 5), last_token=torch.tensor([3, 8]))
    assert logits.shape == ((2, 9, width) if task in ("clm", "mlm") else (2, width))
    assert width == 1_024 or task.endswith("cls")
    assert getattr(model, model.encoder_name).get_input_embeddings().weight.shape[0] == 1_024


def test_gpt2s_real_vocabulary_pads_to_50304():
    assert padded_vocabulary(50_258) == padded_vocabulary(50_265) == 50_304


def test_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(123)
    first = weights_sha256(build_model(request(seed=3)))
    torch.manual_seed(456)
    assert weights_sha256(build_model(request(seed=3))) == first
    assert weights_sha256(build_model(request(seed=4))) != first


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_model(request())
    assert torch.equal(torch.rand(3), expected)


def test_the_causal_head_is_tied_and_equals_the_librarys_model():
    model = build_model(request())
    library = GPT2LMHeadModel(model.transformer.config).eval()
    library.transformer.load_state_dict(model.transformer.state_dict())
    library.tie_weights()
    ids = torch.randint(3, VOCABULARY, (2, 12))
    assert torch.equal(model(ids), library(input_ids=ids).logits)
    assert model.head.model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("task", ["multi_cls", "single_cls"])
def test_gpt2_pools_the_last_real_token_whatever_the_padding_holds(task):
    model = build_model(request(task=task))
    ids = torch.randint(3, VOCABULARY, (3, 10))
    lengths = torch.tensor([4, 10, 1])
    alone = torch.cat(
        [model(ids[row : row + 1, :n], last_token=torch.tensor([n - 1])) for row, n in enumerate(lengths.tolist())]
    )
    for filler in (1, 2, 777):
        padded = ids.clone()
        for row, n in enumerate(lengths.tolist()):
            padded[row, n:] = filler
        torch.testing.assert_close(model(padded, last_token=lengths - 1), alone, rtol=0, atol=1e-6)


def test_roberta_does_not_see_masked_padding():
    model = build_model(request("roberta", "multi_cls"))
    ids = torch.randint(3, VOCABULARY, (2, 10))
    ids[0, 6:] = 1
    mask = (ids != 1)[:, None, None, :]
    with_padding = model(ids, mask)
    torch.testing.assert_close(with_padding[0], model(ids[:1, :6])[0], rtol=0, atol=1e-6)


def test_dropout_is_off_unless_asked_for():
    ids = torch.full((1, 8), 5)
    model = build_model(request("roberta", "mlm", dropout=0.5))
    assert not torch.equal(model(ids), model(ids))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    model = build_model(request("roberta", "mlm"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_the_head_runs_in_its_own_dtype_under_autocast():
    model = build_model(request())
    ids = torch.full((1, 8), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
        model.head_dtype = torch.float32
        assert model(ids).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            ),
            "clm",
        ),
        (
            OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            ),
            "clm",
        ),
        (DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4), "mlm"),
    ],
    ids=["llama", "opt", "distilbert"],
)
def test_any_transformers_architecture_can_be_a_case(tmp_path, config, task):
    config.save_pretrained(tmp_path)
    for task_id, outputs in ((task, None), ("multi_cls", 5), ("single_cls", 5)):
        case = case_for_model(str(tmp_path), task_id)
        assert case.architecture.causal == (task == "clm")
        model = build_model(ModelRequest(case.architecture, case.task, "tiny", VOCABULARY, 1, 0, 2, outputs, "scratch", 0.0, 0))
        ids = torch.randint(5, VOCABULARY, (2, 8))
        logits = model(ids, last_token=torch.tensor([3, 7]))
        assert logits.shape[0] == 2 and logits.isfinite().all()
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_weights_from_a_folder_keep_their_values_and_get_a_padded_embedding(tmp_path):
    saved = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY - 1, n_layer=1, n_head=2, n_embd=16, n_positions=32))
    saved.save_pretrained(tmp_path)
    model = build_model(request(weights=str(tmp_path)))
    embedding = model.transformer.wte.weight
    assert embedding.shape == (1_024, 16)
    assert torch.equal(embedding[: VOCABULARY - 1], saved.transformer.wte.weight)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, saved.transformer.h[0].mlp.c_fc.weight)


def test_pretrained_weights_refuse_another_tokenizer(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="know 500 tokens and the data's tokenizer 1000"):
        build_model(request(weights=str(tmp_path)))


def test_weights_of_another_architecture_are_refused(tmp_path):
    DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="are a distilbert, and the case wants gpt2"):
        build_model(request(weights=str(tmp_path)))


def test_weights_that_are_not_there_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment when it was imported
    with pytest.raises(WeightsUnavailable, match="--weights scratch"):
        build_model(request(weights=str(tmp_path / "nothing")))


def case_of(tmp_path, config, task):
    config.save_pretrained(tmp_path)
    case = case_for_model(str(tmp_path), task)
    return build_model(
        ModelRequest(
            case.architecture, case.task, "tiny", VOCABULARY, 1, 0, 2, 5 if task.endswith("cls") else None, "scratch", 0.0, 0
        )
    )


def test_a_bidirectional_model_becomes_causal_for_a_causal_lm(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = case_of(tmp_path, config, "clm")
    ids = torch.randint(5, VOCABULARY, (1, 8))
    changed = ids.clone()
    changed[0, 5:] = 7
    torch.testing.assert_close(model(ids)[0, :5], model(changed)[0, :5], rtol=0, atol=1e-6)


def test_a_model_that_sees_the_future_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bench_cases.transformers_models.hasattr", lambda *_: False, raising=False)
    with pytest.raises(ModelError, match="sees the tokens it is to predict"):
        case_of(tmp_path, BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), "clm")


@pytest.mark.parametrize("task", ["clm", "single_cls"])
def test_a_model_without_attention_runs(tmp_path, task):
    model = case_of(tmp_path, MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1), task)
    assert model(torch.randint(5, VOCABULARY, (2, 8)), last_token=torch.tensor([3, 7])).isfinite().all()
    assert model.attention is None


@pytest.mark.parametrize("arch", ["gpt2", "roberta"])
@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_sizes_given_to_the_constructor_change_no_registered_model(arch, preset):
    """As `config.update` gave them: nothing of GPT-2's and RoBERTa's configurations follows from these sizes."""
    architecture = ARCHITECTURES[arch]
    updated = CONFIG_MAPPING[arch]()
    setattr(updated, architecture.position_key, architecture.max_positions + architecture.position_offset)
    updated.update(dict(architecture.sizes.get(preset, {})))
    assert _sized_configuration(architecture, architecture.sizes.get(preset, {})).to_dict() == updated.to_dict()


def test_what_follows_from_a_size_follows(tmp_path):
    """Mamba's inner width and time-step rank, from the registry and from a file that has the old ones written out."""
    registered = Architecture("mamba", "Mamba", True, "", 512, sizes={"tiny": {"hidden_size": 64, "num_hidden_layers": 1}})
    MambaConfig(num_hidden_layers=2, state_size=8).save_pretrained(tmp_path)
    outside = case_for_model(str(tmp_path), "clm").architecture
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 1_536
    for architecture, sizes in ((registered, registered.sizes["tiny"]), (outside, {"hidden_size": 64})):
        config = _sized_configuration(architecture, sizes)
        assert (config.hidden_size, config.intermediate_size, config.time_step_rank) == (64, 128, 4)
    assert (config.num_hidden_layers, config.state_size) == (2, 8)  # the file's own
    plain = ModelRequest(outside, TASKS["clm"], "tiny", VOCABULARY, 1, 0, 2, None, "scratch", 0.0, 0, size={"hidden_size": 64})
    assert build_model(plain).backbone.layers[0].mixer.in_proj.weight.shape == (256, 64)
    with pytest.raises(ModelError, match="--size n_embd is no size of mamba; allowed: .*conv_kernel.*hidden_size"):
        _sized_configuration(outside, {"n_embd": 64})


def test_a_size_that_the_library_does_not_take_is_refused(monkeypatch):
    fixed, take = Architecture("mamba", "Mamba", True, "", 512, sizes={"tiny": {"state_size": 8}}), MambaConfig.__post_init__
    monkeypatch.setattr(MambaConfig, "__post_init__", lambda c, **more: (take(c, **more), setattr(c, "state_size", 16)))
    with pytest.raises(ModelError, match="state_size of Mamba is not to be chosen: it is 16"):
        _sized_configuration(fixed, {"state_size": 8})


def test_a_mamba2_and_a_llama_follow_and_contradictions_are_one_line(tmp_path):
    Mamba2Config(num_hidden_layers=1, n_groups=1).save_pretrained(tmp_path)
    outside = case_for_model(str(tmp_path), "clm").architecture
    small = _sized_configuration(outside, {"hidden_size": 64, "num_heads": 8, "head_dim": 16})
    assert (small.time_step_rank, small.n_groups) == (4, 1)  # 256 of 4,096
    plain = ModelRequest(outside, TASKS["clm"], "tiny", VOCABULARY, 1, 0, 2, None, "scratch", 0.0, 0, size={"hidden_size": 64})
    with pytest.raises(ModelError, match="mamba2 cannot be trained for clm here: .*"):
        build_model(plain)
    LlamaConfig(num_attention_heads=8, hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    llama = _sized_configuration(case_for_model(str(tmp_path), "clm").architecture, {"num_attention_heads": 4})
    assert (llama.num_key_value_heads, llama.head_dim, llama.hidden_size) == (4, 16, 64)


def test_attention_is_what_ran(tmp_path):
    """FNet mixes by Fourier transforms; a router's softmax is no attention; a library's model without SDPA runs its own."""
    assert build_model(request()).attention == "sdpa"
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    assert case_of(tmp_path / "fnet", FNetConfig(**small), "mlm").attention is None
    assert case_of(tmp_path / "deberta", DebertaV2Config(**small), "mlm").attention == "eager"


def test_an_architecture_that_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(ModelError) as refused:
        case_of(tmp_path, T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8), "multi_cls")
    assert "t5 cannot be trained for multi_cls here" in str(refused.value) and "\n" not in str(refused.value)


def test_sequences_longer_than_the_weights_positions_are_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_layer=1, n_head=2, n_embd=16, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="seq_len 64 is longer than the 32 positions"):
        build_model(request(weights=str(tmp_path), seq_len=64))


def test_damaged_weights_are_one_line(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(WeightsUnavailable, match="cannot be loaded") as refused:
        build_model(request(weights=str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_an_unreachable_hub_is_quick_and_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment when it was imported
    with pytest.raises(WeightsUnavailable, match="--weights scratch") as refused:
        build_model(request(weights="nobody/nothing"))
    assert "\n" not in str(refused.value)
