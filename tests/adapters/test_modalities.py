"""Roles of other modalities than text and image, and `attach_mage` in a model that reads audio and writes text."""

from __future__ import annotations

import pytest
import torch
from adapters.test_attach_mage import model
from torch import nn

import cnext
from cnext import ops
from cnext.adapters import branch_parameters, branch_roles, layers, modalities_of, roles_of
from cnext.averaging import Pema
from cnext.errors import UserError

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
THREE = ("text", "image", "audio")


def names(modalities: tuple[str, ...]) -> list[str]:
    return [role.name for role in branch_roles(modalities)]


@pytest.mark.parametrize(
    ("modalities", "expected"),
    [
        (("text", "image"), "text-general image-general text-expert image-expert"),
        (("image", "text"), "text-general image-general text-expert image-expert"),
        (THREE, "text-general image-general text-expert image-expert audio-general audio-expert"),
        (("audio", "text"), "text-general text-expert audio-general audio-expert"),
        (("text",), "text-general text-expert"),
    ],
)
def test_roles_of_text_and_image_come_first_in_the_released_order(modalities: tuple, expected: str) -> None:
    assert names(modalities) == expected.split()
    assert set(modalities_of(names(modalities)) or ()) == set(modalities)


def test_branches_of_something_else_have_no_modalities() -> None:
    for branches in (["lora"], ["text-general"], ["expert-0", "expert-1"], [*names(THREE), "lora"]):
        assert modalities_of(branches) is None


def test_a_task_trains_the_roles_of_its_modalities() -> None:
    assert [role.name for role in roles_of(["audio"], ["text"], THREE)] == ["text-expert", "audio-general"]


@pytest.mark.parametrize(
    ("modalities", "match"),
    [
        ("audio", "modalities must be a list of names, got the text 'audio'"),
        ((), "at least one"),
        (("text", "text"), "different names"),
        (("text", "Audio.x"), r"lowercase letters, digits and underscores.*got 'Audio.x'"),
        (("text", 3), "got 3"),
    ],
)
def test_names_that_are_none_are_refused(modalities: tuple, match: str) -> None:
    with pytest.raises(UserError, match=match):
        cnext.attach_mage(nn.Sequential(nn.Linear(4, 4)), targets=["0"], modalities=modalities)


def audio_model() -> nn.Module:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

    torch.manual_seed(0)
    sound = Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=8, scale_embedding=False,
    )  # fmt: skip
    text = Qwen2Config(**TEXT, num_key_value_heads=2)
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=60)
    )


def heard() -> dict[str, torch.Tensor]:
    """Two rows of three tokens, four of audio and five of text."""
    torch.manual_seed(1)
    ids = torch.cat([torch.randint(50, (2, 3)), torch.full((2, 4), 60), torch.randint(50, (2, 5))], 1)
    labels = ids.where(torch.arange(12) > 7, -100)
    mask = torch.ones(2, 16, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "input_features": torch.randn(2, 8, 16), "feature_attention_mask": mask}  # fmt: skip


def test_a_model_that_reads_audio_trains_the_branches_of_its_task() -> None:
    model = audio_model()
    before = model(**heard()).loss
    handle = cnext.attach_mage(model, modalities=("text", "audio"), rank=4, dropout=0.0)
    assert list(next(iter(handle.layers.values())).branches) == names(("text", "audio"))
    assert all("audio_tower" not in name for name in handle.layers)
    torch.testing.assert_close(model(**heard()).loss, before, rtol=0, atol=1e-5)
    average = Pema()
    for reads in (["audio", "text"], ["text"]):
        parameters = handle.train_on(reads=reads, writes=["text"])
        trained = {f"{modality}-general" for modality in reads} | {"text-expert"}
        assert {name.split(".")[-2] for name in parameters} == trained
        kept = {n: p.detach().clone() for n, p in branch_parameters(model).items() if n not in parameters}
        optimizer, losses = torch.optim.AdamW(parameters.values(), 1e-2), []
        with average.task(parameters, steps=4, untrained=True):
            for _ in range(4):
                loss = model(**heard()).loss
                loss.backward()
                losses.append(loss.item())
                average.update()
                optimizer.step()
                optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert all(torch.equal(branch_parameters(model)[name], value) for name, value in kept.items())
    with pytest.raises(UserError, match="unknown modality 'image'; valid: text, audio"):
        handle.train_on(reads=["image"], writes=["text"])
    with pytest.raises(UserError, match=r"reads must be a list of modalities, got the text 'audio'; write \['audio'\]"):
        handle.train_on(reads="audio", writes=["text"])


def test_six_branches_are_one_fused_call_of_their_total_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = audio_model().get_decoder()
    handle = cnext.attach_mage(model, modalities=THREE, rank=8, dropout=0.0)
    layer = layers(model)["layers.0.self_attn.o_proj"]
    for branch in layer.branches.values():
        nn.init.normal_(branch.B)
    x = torch.randn(3, 7, 32)
    expected = layer.base(x.double().float()).double()
    for branch in layer.branches.values():
        expected = expected + x.double() @ branch.A.double().T @ branch.B.double().T
    calls = []
    plain = ops.lora_branches
    monkeypatch.setattr(ops, "lora_branches", lambda *a, **k: calls.append(len(a[3])) or plain(*a, **k))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert calls == [6]
    assert sum(len(branch.A) for branch in layer.branches.values()) == 48
    handle.merge()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_list_of_modalities_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="modalities must be a list of names, got None"):
        cnext.attach_mage(model("llama"), modalities=None)  # pyright: ignore[reportArgumentType]
    handle = cnext.attach_mage(model("llama"))
    for reads, writes, verb in ((None, ["text"], "reads"), (["text"], 3, "writes")):
        with pytest.raises(UserError, match=f"{verb} must be a list of modalities, got"):
            handle.train_on(reads, writes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="train_on: expected a modality that the task reads or writes, got none"):
        handle.train_on([], [])
    assert handle.train_on([], ["text"])
