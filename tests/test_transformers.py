"""attn_implementation="fused_ext" in tiny random models: generation, padding, caches, training, all as eager does."""

import copy

import pytest
import torch

import flashattn_ext as fa

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
fused = pytest.importorskip("flashattn_ext.integrations.transformers")

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def llama():
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)


def gemma2():
    """Softcap on the scores, a scale that is not 1 / sqrt(D), and a sliding window in every second layer."""
    return transformers.Gemma2ForCausalLM, transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=10)


def gpt_oss():
    """Sinks, sliding and full layers, experts."""
    return transformers.GptOssForCausalLM, transformers.GptOssConfig(
        **SIZES, head_dim=16, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)


NAMES = {llama: "LlamaForCausalLM", gemma2: "Gemma2ForCausalLM", gpt_oss: "GptOssForCausalLM"}
MODELS = {f.__name__: f for f in NAMES if hasattr(transformers, NAMES[f])}


@pytest.fixture(scope="module", autouse=True)
def registered():
    fused.register()
    fused.register()  # a second time changes nothing


@pytest.fixture(params=sorted(MODELS))
def models(request):
    """The same random weights twice: (eager, ours)."""
    return twins(*MODELS[request.param]())


def twins(kind, config):
    torch.manual_seed(0)
    eager, ours = (kind._from_config(copy.deepcopy(config), attn_implementation=name).eval()
                   for name in ("eager", fused.NAME))
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(eager.state_dict())
    assert [model.config._attn_implementation for model in (eager, ours)] == ["eager", "fused_ext"]
    return eager, ours


def prompts(padded):
    """Token ids (3, 17) and their attention mask; padded on the left by 0, 5 and 16 tokens."""
    ids = torch.randint(2, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(17)[None] >= torch.tensor([[0], [5], [16]])).long()
    return ids * mask, mask


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_logits(models, padded):
    ids, mask = prompts(padded)
    before = fused.calls()
    with torch.no_grad():
        want, got = (model(ids, attention_mask=mask).logits for model in models)
    assert fused.calls() - before == 2, "not every layer came through the fused attention"
    close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens(models, cache, padded):
    ids, mask = prompts(padded)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache,
                   disable_compile=True)
    before = fused.calls()
    want, got = (model.generate(ids, **options) for model in models)
    assert fused.calls() - before == 2 * 12
    assert torch.equal(got, want)


def test_chunked_prefill(models):
    """Queries that start in the middle of the cache: more keys than queries, and a mask that says so."""
    ids, _ = prompts(False)
    results = []
    with torch.no_grad():
        for model in models:
            first = model(ids[:, :9], use_cache=True)
            results.append(model(ids[:, 9:], past_key_values=first.past_key_values).logits)
    close(results[1], results[0])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_training_step(models, padded):
    """Loss and every parameter's gradient, sinks included."""
    ids, mask = prompts(padded)
    # The last padding token would predict the first real one, from a row that sees nothing: eager gives a mean, we 0.
    labels = ids.masked_fill(mask * mask.roll(1, 1) == 0, -100)
    losses = []
    for model in models:
        model.train()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    close(losses[1], losses[0])
    eager, ours = (dict(model.named_parameters()) for model in models)
    for name in eager:
        if eager[name].grad is None:
            assert ours[name].grad is None, name
        else:
            torch.testing.assert_close(ours[name].grad, eager[name].grad, rtol=1e-3,
                                       atol=2e-5, msg=lambda m: f"{name}: {m}")


def test_bfloat16(models):
    """As close to the float32 model as eager bfloat16 is, times two."""
    ids, mask = prompts(True)
    eager, ours = models
    with torch.no_grad():
        exact = eager(ids, attention_mask=mask).logits[mask.bool()]
        theirs, mine = (model.bfloat16()(ids, attention_mask=mask).logits[mask.bool()].float() for model in models)
    assert (mine - exact).square().mean() <= 4 * (theirs - exact).square().mean() + 1e-6


def test_an_encoder():
    """Bidirectional, with right padding: no causal mask may sneak in."""
    config = transformers.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=64)
    eager, ours = twins(transformers.BertModel, config)
    ids = torch.randint(2, 97, (2, 13))
    mask = (torch.arange(13)[None] < torch.tensor([[13], [7]])).long()
    before = fused.calls()
    with torch.no_grad():
        want, got = (model(ids, attention_mask=mask).last_hidden_state for model in (eager, ours))
    assert fused.calls() - before == 2
    close(got[mask.bool()], want[mask.bool()])


def test_switching_an_existing_model(models):
    eager, ours = models
    ids, _ = prompts(False)
    ours.set_attn_implementation("eager")
    before = fused.calls()
    with torch.no_grad():
        want = ours(ids).logits
        assert fused.calls() == before
        ours.set_attn_implementation(fused.NAME)
        close(ours(ids).logits, want)
    assert fused.calls() > before


def test_use_as_sdpa_in_an_unchanged_model():
    """The other way in: attn_implementation="sdpa" inside use_as_sdpa()."""
    model, _ = twins(*llama())
    ids, mask = prompts(True)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        with fa.use_as_sdpa():
            got = model(ids, attention_mask=mask).logits
    close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("given, word", [(dict(output_attentions=True), "output_attentions"),
                                         (dict(cu_seq_lens_q=torch.tensor([0, 3])), "cu_seq_lens_q")],
                         ids=["weights", "packed"])
def test_what_it_cannot_do_is_refused(given, word):
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match=word):
        fused.attention_forward(torch.nn.Module(), x, x, x, None, **given)
