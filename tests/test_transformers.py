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


def mistral():
    """A sliding window in every layer."""
    return transformers.MistralForCausalLM, transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=7)


NAMES = {llama: "LlamaForCausalLM", gemma2: "Gemma2ForCausalLM", gpt_oss: "GptOssForCausalLM",
         mistral: "MistralForCausalLM"}
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
@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens_after_a_chunked_prefill(models, cache, padded):
    ids, mask = prompts(padded)
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache,
                   disable_compile=True, prefill_chunk_size=5)
    want, got = (model.generate(ids, **options) for model in models)
    assert torch.equal(got, want)


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
                                         (dict(cu_seq_lens_q=torch.tensor([0, 3]), position_bias=torch.zeros(1, 1, 3, 3)),
                                          "position_bias")],
                         ids=["weights", "packed with a bias"])
def test_what_it_cannot_do_is_refused(given, word):
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match=word):
        fused.attention_forward(torch.nn.Module(), x, x, x, None, **given)


# ---- packed sequences -----------------------------------------------------------------------------------------------

PACKED = [5, 1, 9, 12]


def packed():
    """Token ids (1, T) of sequences behind one another, their positions, and their bounds as transformers names them."""
    ids = torch.randint(2, 97, (1, sum(PACKED)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    cu = torch.tensor([0, *PACKED]).cumsum(0, dtype=torch.int32)
    return ids, positions, dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=max(PACKED), max_length_k=max(PACKED))


def one_by_one(model, ids):
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(PACKED, 1)], 1)


@pytest.fixture
def packed_calls(monkeypatch):
    """How often the packed attention has run, as a list that grows."""
    seen = []
    real = fused.packed_attention
    monkeypatch.setattr(fused, "packed_attention", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
    return seen


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences(models, packed_calls, use_cache):
    """Logits and gradients of sequences that a batch packs are those of the sequences alone."""
    ids, positions, bounds = packed()
    eager, ours = models
    want = one_by_one(eager, ids)
    got = ours(ids, position_ids=positions, use_cache=use_cache, **bounds).logits
    assert len(packed_calls) == 2, "a layer took the long way, by a mask over all tokens"
    close(got, want)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    for logits in (want, got):
        (logits * weights).sum().backward()
    exact, mine = (dict(model.named_parameters()) for model in models)
    for name in exact:
        if exact[name].grad is not None:
            torch.testing.assert_close(mine[name].grad, exact[name].grad, rtol=1e-3, atol=1e-4,
                                       msg=lambda m: f"{name}: {m}")


def test_packed_positions_alone(models):
    """Without the bounds, transformers makes a mask of the positions (in most models: not in gpt-oss)."""
    ids, positions, _ = packed()
    with torch.no_grad():
        want, got = (model(ids, position_ids=positions, use_cache=False).logits for model in models)
        close(got, want)
        if models[0].config.model_type != "gpt_oss":
            close(got, one_by_one(models[0], ids))


def test_packed_sequences_with_a_mask_that_says_more(packed_calls):
    """A mask that hides a token as well is heard, and so are the bounds."""
    eager, ours = twins(*llama())
    ids, positions, bounds = packed()
    mask = torch.ones_like(ids)
    mask[0, 7] = 0  # a token of the third sequence
    with torch.no_grad():
        got = ours(ids, position_ids=positions, attention_mask=mask, use_cache=False, **bounds).logits
        third = slice(PACKED[0] + PACKED[1], sum(PACKED[:3]))
        want = eager(ids[:, third], attention_mask=mask[:, third], position_ids=positions[:, third]).logits
        close(got[:, third][mask[:, third].bool()], want[mask[:, third].bool()])
        close(got[:, :third.start], one_by_one(eager, ids)[:, :third.start])
    assert not packed_calls


# ---- continuous batching --------------------------------------------------------------------------------------------

TOKENS = 10


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]


def alone(model, prompts):
    """The tokens that a model adds to each prompt by itself."""
    return [model.generate(torch.tensor([p]), max_new_tokens=TOKENS, do_sample=False)[0, len(p):].tolist()
            for p in prompts]


def batching(**options):
    """The settings of a small cache, and greedy generation without an end token."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = dict(page_size=16, num_blocks=64, max_batch_tokens=48)
    return dict(continuous_batching_config=ContinuousBatchingConfig(**{**settings, **options}),
                generation_config=GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1,
                                                   pad_token_id=0))


@pytest.mark.parametrize("page_size", [4, 16])
def test_continuous_batching(models, packed_calls, page_size):
    """Prompts of 1 to 90 tokens in batches of at most 48: long ones are cut, and prefill and decode share a batch."""
    eager, ours = models
    prompts = prompts_of([3, 40, 17, 1, 90, 8])
    fused.enable_continuous_batching(ours)
    fused.enable_continuous_batching(ours)  # a second time changes nothing
    outputs = ours.generate_batch(prompts, **batching(page_size=page_size))
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    assert [output.generated_tokens for output in outputs.values()] == alone(eager, prompts)
    assert packed_calls


def test_continuous_batching_reads_the_pages_in_place(monkeypatch):
    from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

    copied = []
    real = FullAttentionCacheAllocator.update
    monkeypatch.setattr(FullAttentionCacheAllocator, "update",
                        lambda *a: (copied.append(len(a[4])), real(*a))[1])
    _, ours = twins(*llama())
    fused.enable_continuous_batching(ours)
    ours.generate_batch(prompts_of([30, 5]), **batching())
    assert copied and not any(copied), f"tokens copied out of the cache: {copied}"


def arriving_over_time(model, prompts, settings):
    """The tokens for each prompt, where the next prompt comes only when an earlier one has given tokens."""
    found = {}

    def receive(manager):
        result = manager.get_result(timeout=120)
        assert result is not None and result.error is None, "no token within two minutes" if result is None else (
            result.error)
        found[result.request_id] = result

    with model.continuous_batching_context_manager(**settings) as manager:
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=TOKENS, streaming=True)
            receive(manager)
        while not all(str(i) in found and found[str(i)].is_finished() for i in range(len(prompts))):
            receive(manager)
    return [found[str(i)].generated_tokens for i in range(len(prompts))]


def test_continuous_batching_of_prompts_that_arrive_over_time(models):
    eager, ours = models
    prompts = prompts_of([60, 2, 33, 7])
    fused.enable_continuous_batching(ours)
    assert arriving_over_time(ours, prompts, batching()) == alone(eager, prompts)


@pytest.mark.slow
def test_continuous_batching_of_a_real_model(monkeypatch):
    """The demo's model: prompts of very different lengths, arriving over time, give the tokens of eager attention."""
    import pathlib

    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
    smollm = pytest.importorskip("smollm")
    try:
        folder = smollm.ensure_cached()
    except smollm.ModelMissing as missing:
        pytest.skip(str(missing))
    from pydoc_data.topics import topics

    tokenizer = smollm.load_tokenizer(folder)
    text = tokenizer(topics["with"] + topics["class"] + topics["for"])["input_ids"]
    prompts = [text[:20], text[20:620], text[620:623], text[1000:1300], text[1300:1420]]
    eager = smollm.load_model(folder, "eager")
    eager.generation_config.eos_token_id = None
    want = alone(eager, prompts)
    ours = smollm.load_model(folder, "sdpa")
    fused.enable_continuous_batching(ours)
    before = fused.calls()
    assert arriving_over_time(ours, prompts, batching(page_size=64, max_batch_tokens=512)) == want
    assert fused.calls() > before


def test_a_shared_prefix_in_continuous_batching():
    """Pages that two prompts share are computed once and read by both."""
    eager, ours = twins(*llama())
    start = prompts_of([40])[0]
    prompts = [start + more for more in prompts_of([5, 9, 1])]
    fused.enable_continuous_batching(ours)
    outputs = ours.generate_batch(prompts, **batching(page_size=8, max_requests_per_batch=1))
    assert [output.generated_tokens for output in outputs.values()] == alone(eager, prompts)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_ordinary_use_after_continuous_batching(models, padded):
    eager, ours = models
    fused.enable_continuous_batching(ours)
    ours.generate_batch(prompts_of([5]), **batching())
    ids, mask = prompts(padded)
    with torch.no_grad():
        close(ours(ids, attention_mask=mask).logits[mask.bool()], eager(ids, attention_mask=mask).logits[mask.bool()])
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))
    ids, positions, _ = packed()
    with torch.no_grad():
        want, got = (model(ids, position_ids=positions, use_cache=False).logits for model in models)
    close(got, want)


def test_the_way_back_from_continuous_batching():
    eager, ours = twins(*llama())
    fused.enable_continuous_batching(ours)
    ours.set_attn_implementation(fused.NAME)
    ids, _ = prompts(False)
    with torch.no_grad():
        close(ours(ids).logits, eager(ids).logits)


def test_continuous_batching_in_bfloat16():
    """The cache holds bfloat16; a token may differ where two logits are nearly equal, the first may not."""
    eager, ours = twins(*llama())
    prompts = prompts_of([30, 4])
    want = alone(eager, prompts)
    fused.enable_continuous_batching(ours.bfloat16())
    outputs = ours.generate_batch(prompts, **batching())
    assert [output.error for output in outputs.values()] == [None, None]
    assert [len(output.generated_tokens) for output in outputs.values()] == [TOKENS, TOKENS]
    assert sum(o.generated_tokens[0] == w[0] for o, w in zip(outputs.values(), want)) >= 1
