"""Contrastive, matching and language-modelling losses against their formulas, term by term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from blip_integration.losses import contrastive_loss, hard_negatives, itc_loss, itm_loss, lm_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_way_itc(image: torch.Tensor, text: torch.Tensor, temperature: float) -> float:
    """Equation (1) of the loss, with plain numbers."""
    total = 0.0
    for i, x in enumerate(image):
        terms = [math.exp(float(x @ y / (x.norm() * y.norm())) / temperature) for y in text]
        total -= math.log(terms[i] / sum(terms))
    return total / len(image)


def test_itc():
    image, text = random(5, 3), random(5, 3, seed=1)
    to_text, to_image = one_way_itc(image, text, 0.2), one_way_itc(text, image, 0.2)
    assert itc_loss(image, text, 0.2, one_way=True).item() == pytest.approx(to_text)
    assert itc_loss(image, text, 0.2).item() == pytest.approx((to_text + to_image) / 2)
    assert to_text != pytest.approx(to_image)
    # Cosines: lengths do not matter. The default temperature is CLIP's.
    assert itc_loss(3 * image, text / 7) == pytest.approx(itc_loss(image, text, 0.07))


def test_itc_of_one_group():
    """Two captions of one image are each other's positives, with half of the target each."""
    scores = random(4, 4)
    groups = torch.tensor([8, 5, 8, 9])
    rows, columns = scores.log_softmax(1), scores.log_softmax(0)
    to_text = -((rows[0, 0] + rows[0, 2] + rows[2, 0] + rows[2, 2]) / 2 + rows[1, 1] + rows[3, 3])
    to_image = -(
        (columns[0, 0] + columns[0, 2] + columns[2, 0] + columns[2, 2]) / 2
        + columns[1, 1]
        + columns[3, 3]
    )
    one_way = contrastive_loss(scores, groups=groups, one_way=True)
    assert one_way.item() == pytest.approx(to_text.item() / 4)
    both = contrastive_loss(scores, groups=groups)
    assert both.item() == pytest.approx((to_text + to_image).item() / 8)
    image, text = random(4, 3), random(4, 3, seed=1)
    assert itc_loss(image, text, groups=torch.arange(4)) == itc_loss(image, text)
    assert itc_loss(image, text, groups=groups) != itc_loss(image, text)


def test_itc_gradients():
    image, text = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda *values: itc_loss(*values, groups=groups), (image, text, temperature)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Computed in float32: only the inputs' own rounding is left."""
    image, text = random(6, 8).to(dtype), random(6, 8, seed=1).to(dtype)
    loss = itc_loss(image, text, 0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, itc_loss(image.float(), text.float(), 0.01))
    logits, labels = random(2, 5, 9).to(dtype), torch.arange(10).reshape(2, 5) % 9
    assert lm_loss(logits, labels).item() == pytest.approx(lm_loss(logits.double(), labels).item())


def test_hard_negatives_are_drawn_by_similarity():
    scores = random(4, 4)
    groups = torch.tensor([0, 1, 0, 2])
    own = groups[:, None] == groups
    generator = torch.Generator().manual_seed(3)
    draws = [hard_negatives(scores, groups=groups, generator=generator) for _ in range(1000)]
    for side, logits in enumerate((scores, scores.T)):
        weights = (logits.softmax(1) + 1e-4).masked_fill(own, 0)
        expected = 1000 * weights / weights.sum(1, keepdim=True)
        drawn = torch.stack([draw[side] for draw in draws])  # [1000, 4]
        for i in range(4):
            counts = torch.bincount(drawn[:, i], minlength=4)
            assert not counts[own[i]].any()
            possible = ~own[i]
            p = stats.chisquare(counts[possible], expected[i][possible]).pvalue
            assert p > 1e-4, (side, i)


def test_hard_negatives_where_the_softmax_underflows():
    scores = torch.eye(3) * 1e4
    texts, images = hard_negatives(scores, generator=torch.Generator().manual_seed(0))
    assert (texts != torch.arange(3)).all() and (images != torch.arange(3)).all()


def test_hard_negatives_are_reproducible():
    scores = random(32, 32)
    first = hard_negatives(scores, generator=torch.Generator().manual_seed(1))
    again = hard_negatives(scores, generator=torch.Generator().manual_seed(1))
    other = hard_negatives(scores, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_itm():
    """One call with the true pairs and two wrong ones each; the loss is their cross-entropy."""
    scores, table = random(5, 5), random(5, 5, 2, seed=1)
    calls = []

    def match(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        calls.append((images, texts))
        return table[images, texts]

    loss = itm_loss(match, scores, generator=torch.Generator().manual_seed(4))
    [(images, texts)] = calls
    wrong_texts, wrong_images = hard_negatives(scores, generator=torch.Generator().manual_seed(4))
    index = torch.arange(5)
    assert torch.equal(images, torch.cat([index, index, wrong_images]))
    assert torch.equal(texts, torch.cat([index, wrong_texts, index]))
    probability = table[images, texts].softmax(-1)[:, 1]
    matching = images == texts
    expected = -torch.where(matching, probability.log(), (1 - probability).log()).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_itm_extremes():
    scores = random(6, 6)

    def perfect(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return 50.0 * F.one_hot((images == texts).long(), 2)

    assert itm_loss(perfect, scores) < 1e-6
    ignorant = itm_loss(lambda images, texts: torch.zeros(len(images), 2), scores)
    assert ignorant.item() == pytest.approx(math.log(2))


def test_negatives_do_not_carry_gradients():
    scores = random(4, 4).requires_grad_()
    weight = torch.tensor(0.5, requires_grad=True)
    itm_loss(lambda images, texts: weight * torch.ones(len(images), 2), scores).backward()
    assert scores.grad is None and weight.grad is not None


def token_nll(logits: torch.Tensor, labels: torch.Tensor, ignored: set[int]) -> list[float]:
    """The negative log-probability of each predicted token."""
    return [
        -float(row[t].log_softmax(0)[tokens[t + 1]])
        for row, tokens in zip(logits, labels, strict=True)
        for t in range(len(tokens) - 1)
        if int(tokens[t + 1]) not in ignored
    ]


def test_lm():
    logits = random(3, 6, 9)
    labels = torch.tensor([[1, 4, 5, 2, 0, 0], [1, 7, 2, -100, -100, -100], [1, 8, 8, 8, 8, 2]])
    terms = token_nll(logits, labels, {-100})
    assert lm_loss(logits, labels).item() == pytest.approx(sum(terms) / len(terms))
    terms = token_nll(logits, labels, {-100, 0})
    assert len(terms) == 3 + 2 + 5
    assert lm_loss(logits, labels, pad=0).item() == pytest.approx(sum(terms) / len(terms))
    summed = lm_loss(logits, labels, pad=0, reduction="sequence")
    assert summed.item() == pytest.approx(sum(terms) / 3)
    assert labels[0, 4] == 0  # The caller's labels stay as they were.


def test_lm_smoothing():
    """A share of the target is spread evenly over the vocabulary."""
    logits, labels = random(2, 4, 5), torch.tensor([[1, 2, 3, 0], [1, 4, 4, 0]])
    log_p = logits[:, :-1].log_softmax(-1)
    target = F.one_hot(labels[:, 1:], 5) * 0.9 + 0.1 / 5
    expected = -(target * log_p).sum(-1).mean()
    assert lm_loss(logits, labels, label_smoothing=0.1).item() == pytest.approx(expected.item())


def test_lm_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BlipTextConfig(
        vocab_size=20,
        hidden_size=16,
        encoder_hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    )
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    torch.manual_seed(0)
    decoder = BlipTextLMHeadModel(config).eval()
    tokens = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    labels = tokens.masked_fill(tokens == 0, -100)
    output = decoder(input_ids=tokens, labels=labels)
    torch.testing.assert_close(lm_loss(output.logits, tokens, pad=0), output.loss)


def test_nothing_to_predict():
    logits = random(2, 3, 5).requires_grad_()
    for labels in (torch.full((2, 3), -100), torch.tensor([[1, -100, -100]] * 2)):
        loss = lm_loss(logits, labels)
        assert loss == 0.0
        loss.backward()
    assert lm_loss(random(2, 1, 5), torch.ones(2, 1, dtype=torch.long)) == 0.0


def test_bad_arguments():
    image = random(4, 3)
    with pytest.raises(ValueError, match=r"itc_loss: .* \[N, D\], got \[4, 3\] and \[3, 3\]"):
        itc_loss(image, image[:3])
    with pytest.raises(ValueError, match="itc_loss: temperature must be positive, got 0"):
        itc_loss(image, image, 0)
    with pytest.raises(ValueError, match=r"contrastive_loss: scores must be \[N, N\]"):
        contrastive_loss(random(4, 3))
    with pytest.raises(ValueError, match=r"groups must be \[N\] = \[4\], got \[3\]"):
        itc_loss(image, image, groups=torch.arange(3))
    for groups in (torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 0, 0])):
        with pytest.raises(ValueError, match="hard_negatives: scores must have pairs of differ"):
            hard_negatives(random(4, 4), groups=groups)
    with pytest.raises(ValueError, match="got 1 pair"):
        hard_negatives(random(1, 1))
    with pytest.raises(ValueError, match=r"itm_loss: match must return .* = \[12, 2\], got \[12\]"):
        itm_loss(lambda images, texts: torch.zeros(len(images)), random(4, 4))
    logits = random(2, 3, 5)
    with pytest.raises(ValueError, match=r"lm_loss: logits .* got \[2, 3, 5\] and \[2, 4\]"):
        lm_loss(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction must be 'token' or 'sequence', got 'mean'"):
        lm_loss(logits, torch.zeros(2, 3, dtype=torch.long), reduction="mean")
