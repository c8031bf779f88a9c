# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="pentad" in small, randomly initialised models, against transformers' own."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import pentad.integrations.transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # scores that are far from equal
}
DECODER = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    integration.register()


def build(config, model_class, implementation, training=False):
    """The same weights for every implementation."""
    torch.manual_seed(5)
    model = model_class._from_config(config, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    return model.train(training)


def llama(implementation, training=False):
    config = transformers.LlamaConfig(**DECODER)
    return build(config, transformers.LlamaForCausalLM, implementation, training)


def mistral(implementation, window=7, **options):
    config = transformers.MistralConfig(**DECODER, sliding_window=window)
    return build(config, transformers.MistralForCausalLM, implementation, **options)


def gemma2(implementation):
    config = transformers.Gemma2Config(
        **DECODER, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0
    )
    return build(config, transformers.Gemma2ForCausalLM, implementation)


def gpt_oss(implementation):
    config = transformers.GptOssConfig(
        **DECODER, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = build(config, transformers.GptOssForCausalLM, implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 2.0, len(parameter)))
    return model


def bert(implementation):
    config = transformers.BertConfig(**SIZES)
    return build(config, transformers.BertModel, implementation)


def modernbert(implementation):
    config = transformers.ModernBertConfig(**SIZES, local_attention=8, cls_token_id=1)
    return build(config, transformers.ModernBertModel, implementation)


def tokens(batch=3, length=21):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)


def padding(side, batch=3, length=21):
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, hidden in enumerate((0, 4, 9)):
        if side == "left":
            mask[row, :hidden] = 0
        elif side == "right":
            mask[row, length - hidden :] = 0
    return mask


@pytest.fixture
def masks(monkeypatch):
    """The masks that reached attention_forward."""
    seen = []
    forward = integration.attention_forward

    def record(module, query, key, value, attention_mask, **options):
        seen.append(attention_mask)
        return forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(integration, "attention_forward", record)
    integration.register()
    yield seen
    monkeypatch.undo()
    integration.register()


# The model, and the implementation that knows all of its options.
MODELS = [
    (llama, "sdpa"),
    (mistral, "sdpa"),
    (gemma2, "eager"),
    (gpt_oss, "eager"),
    (bert, "sdpa"),
    (modernbert, "sdpa"),
]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("make", "peer"), MODELS, ids=[make.__name__ for make, _ in MODELS])
@torch.no_grad()
def test_outputs_are_the_peers(make, peer, side, masks):
    ids, mask = tokens(), padding(side)
    theirs = make(peer)(input_ids=ids, attention_mask=mask)[0]
    ours = make("pentad")(input_ids=ids, attention_mask=mask)[0]
    valid = mask.bool()
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-4)
    assert len(masks) == SIZES["num_hidden_layers"]
    # No mask of all pairs was formed.
    assert all(m is None or m.ndim == 2 or m.shape[2] == 1 for m in masks)
    if side == "none" and make in (llama, bert):
        assert masks == [None, None]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    ("make", "peer"), MODELS[:4], ids=[make.__name__ for make, _ in MODELS[:4]]
)
@torch.no_grad()
def test_generated_tokens_are_the_peers(make, peer, side, cache):
    options = {
        "attention_mask": padding(side),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    theirs = make(peer).generate(tokens(), **options)
    ours = make("pentad").generate(tokens(), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(
        torch.stack(ours.scores), torch.stack(theirs.scores), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [llama, mistral], ids=["llama", "mistral"])
@torch.no_grad()
def test_a_prompt_in_pieces(make, masks):
    """Several queries after a cache: the last query is aligned with the last key."""
    ids, model = tokens(), make("pentad")
    whole = model(ids).logits
    cache = transformers.DynamicCache(config=model.config)
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 14))]
    pieces.append(model(ids[:, 14:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert all(m is None or m.ndim == 2 for m in masks)
    theirs = make("sdpa")(ids).logits
    torch.testing.assert_close(whole, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("make", [llama, mistral, bert], ids=["llama", "mistral", "bert"])
@torch.no_grad()
def test_compiled(make, side):
    """One graph, the values of the padding unread."""
    ids, mask = tokens(), padding(side)
    model = make("pentad")
    options = {} if make is bert else {"use_cache": False}
    expected = model(ids, attention_mask=mask, **options)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(ids, attention_mask=mask, **options)[0]
    valid = mask.bool()
    torch.testing.assert_close(out[valid], expected[valid], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mask_of_ones_own():
    ids = tokens()
    allowed = torch.rand(3, 1, 21, 21) < 0.6
    allowed |= torch.eye(21, dtype=torch.bool)
    theirs = llama("sdpa")(ids, attention_mask=allowed).logits
    torch.testing.assert_close(
        llama("pentad")(ids, attention_mask=allowed).logits, theirs, rtol=1e-4, atol=1e-4
    )
    added = torch.zeros(3, 1, 21, 21).masked_fill(~allowed, -1e4)
    torch.testing.assert_close(
        llama("pentad")(ids, attention_mask=added).logits, theirs, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_packed_sequences():
    """Position ids that start again: transformers hides the sequences from one another."""
    ids = tokens(1, 20)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = llama("pentad")(ids, position_ids=positions, use_cache=False).logits
    apart = [llama("sdpa")(ids[:, part]).logits for part in (slice(8), slice(8, 20))]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("make", [llama, mistral], ids=["llama", "mistral"])
def test_gradients_of_a_training_step(make, side):
    ids, mask = tokens(), padding(side)
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for implementation in ("sdpa", "pentad"):
        model = make(implementation, training=True)
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    theirs, ours = gradients
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = float(grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_gradients_of_sinks():
    gradients = []
    for implementation in ("eager", "pentad"):
        model = gpt_oss(implementation)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if n.endswith("sinks")])
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_dropout_acts_in_training_only():
    config = transformers.LlamaConfig(**DECODER, attention_dropout=0.5)
    model = build(config, transformers.LlamaForCausalLM, "pentad", training=True)
    with torch.no_grad():
        assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
        model.eval()
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("left", [0, 1, 3, 4])
def test_chunks_are_not_taken_for_windows(size, left):
    """The two patterns have the same arguments; every pair of positions has to be right."""
    from transformers import masking_utils

    config = transformers.MistralConfig(**DECODER, sliding_window=size)
    config._attn_implementation = "pentad"
    config.attention_chunk_size = size
    embeds = torch.zeros(1, 12, 8)
    padded = torch.ones(1, 12)
    padded[:, :left] = 0
    for make in ("create_sliding_window_causal_mask", "create_chunked_causal_mask"):
        options = {"inputs_embeds": embeds, "attention_mask": padded, "past_key_values": None}
        ours = getattr(masking_utils, make)(config, **options)
        config._attn_implementation = "sdpa"
        theirs = getattr(masking_utils, make)(config, **options)
        config._attn_implementation = "pentad"
        q = k = torch.zeros(1, 1, 12, 12)
        v = torch.eye(12).expand(1, 1, 12, 12)
        weights = integration.attention_forward(torch.nn.Module(), q, k, v, ours)[0]
        assert torch.equal(weights[0, :, 0] > 0, theirs[0, 0])


@pytest.mark.parametrize(("q_offset", "kv_offset"), [(5, 0), (0, 3)])
def test_lengths_that_do_not_fit_together(q_offset, kv_offset):
    """Queries past the last key, or before the first: the dense mask says it."""
    from transformers.masking_utils import sdpa_mask

    lengths = {"batch_size": 1, "q_length": 4, "kv_length": 6}
    lengths.update(q_offset=q_offset, kv_offset=kv_offset)
    expected = sdpa_mask(**lengths, allow_is_causal_skip=False)
    assert torch.equal(integration.mask(**lengths), expected)


def test_position_bias():
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    added = torch.randn(1, 4, 9, 9, requires_grad=True)
    hidden = torch.ones(2, 9, dtype=torch.bool)
    hidden[1, 6:] = False
    for mask in (None, hidden, hidden[:, None, None].float().log()):
        causal = torch.ones(9, 9).tril().bool()
        expected = (q @ k.mT) * 8**-0.5 + added
        if mask is None or mask.ndim == 2:
            expected = expected.masked_fill(~causal, -torch.inf)
        if mask is not None:
            expected = expected.masked_fill(~hidden[:, None, None], -torch.inf)
        expected = (expected.softmax(-1) @ v).transpose(1, 2)
        out, weights = integration.attention_forward(
            torch.nn.Module(), q, k, v, mask, position_bias=added
        )
        assert weights is None
        torch.testing.assert_close(out, expected)
        (ours,) = torch.autograd.grad(out.square().sum(), added)
        (theirs,) = torch.autograd.grad(expected.square().sum(), added)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
