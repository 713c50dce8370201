"""The joint RBM against enumeration, inference of one side from the other, retrieval recall."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from support.errors import raises
from support.pairs import check_candidate_scores_are_those_of_all_pairs
from support.statistics import assert_chi_square, assert_mean
from torch import Tensor

pytest.importorskip("PIL")

from support.enumeration import all_states, state_number

from blip_integration import joint_rbm as matching
from blip_integration.joint_rbm import (
    FUNCTION_WORDS,
    JointRBM,
    Vocabulary,
    hidden_similarities,
    infer_image,
    infer_words,
)
from blip_integration.ranker_training import retrieval_recall

D, T, H = 3, 4, 5


def small_rbm(spread: float = 0.9) -> JointRBM:
    """A joint RBM whose two sides depend on each other, with features that need standardizing."""
    g = torch.Generator().manual_seed(0)
    model = JointRBM(D, T, H, init_std=spread, generator=g)
    with torch.no_grad():
        for parameter in (model.b_image, model.b_words, model.c, model.log_var):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
        model.mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        model.scale.copy_(torch.tensor([2.0, 0.5, 1.5]))
    return model


def images(n: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * torch.tensor([2.0, 0.5, 1.5]) + 1.0


@dataclass(frozen=True)
class ExactJoint:
    """The mixed model from the definition of its energy alone, in float64."""

    Wv: Tensor
    Wt: Tensor
    b: Tensor
    bt: Tensor
    c: Tensor
    var: Tensor

    @classmethod
    def of(cls, model: JointRBM) -> ExactJoint:
        names = ("W_image", "W_words", "b_image", "b_words", "c")
        parameters = [getattr(model, name).detach().double() for name in names]
        return cls(*parameters, model.log_var.detach().double().exp())

    def image_energy(self, z: Tensor) -> Tensor:
        """The part of E(v, h) that v has, [N, 2**H]."""
        own = ((z - self.b) ** 2 / (2 * self.var)).sum(1, keepdim=True)
        return own - (z / self.var) @ self.Wv @ all_states(H).T

    def word_energy(self, t: Tensor) -> Tensor:
        return -(t @ self.bt)[:, None] - t @ self.Wt @ all_states(H).T

    def hidden_energy(self) -> Tensor:
        return -all_states(H) @ self.c

    def free_energy(self, z: Tensor | None, t: Tensor | None) -> Tensor:
        energy = self.hidden_energy()[None]
        if z is not None:
            energy = energy + self.image_energy(z)
        if t is not None:
            energy = energy + self.word_energy(t)
        return -(-energy).logsumexp(1)

    def p_words_given_image(self, z: Tensor) -> Tensor:
        """p(t | v) for each of the states of t, [N, 2**T]."""
        t = all_states(T)
        joint = self.image_energy(z)[:, None] + self.word_energy(t)[None] + self.hidden_energy()
        return (-joint).logsumexp(2).softmax(1)

    def log_image_integral(self) -> Tensor:
        """log of the integral of exp(-E) over v for each state of h, [2**H]."""
        mean = self.b + all_states(H) @ self.Wv.T
        quadratic = ((mean**2 - self.b**2) / (2 * self.var)).sum(1)
        return quadratic + 0.5 * (2 * math.pi * self.var).log().sum()

    def p_hidden_given_words(self, t: Tensor) -> Tensor:
        """p(h | t) with v integrated out, [N, 2**H]."""
        return (self.log_image_integral() - self.word_energy(t) - self.hidden_energy()).softmax(1)

    def mean_image_given_words(self, t: Tensor) -> Tensor:
        return self.p_hidden_given_words(t) @ (self.b + all_states(H) @ self.Wv.T)

    def p_words(self) -> Tensor:
        """The marginal p(t), [2**T]."""
        exponent = self.log_image_integral() - self.word_energy(all_states(T))
        return (exponent - self.hidden_energy()).logsumexp(1).softmax(0)

    def log_likelihood(self, z: Tensor, t: Tensor) -> Tensor:
        exponent = self.log_image_integral() - self.word_energy(all_states(T))
        log_z = (exponent - self.hidden_energy()).flatten().logsumexp(0)
        return (-self.free_energy(z, t) - log_z).mean()


def test_free_energy_of_both_and_of_either_by_enumeration() -> None:
    model, exact = small_rbm(), ExactJoint.of(small_rbm())
    features = images(16)
    words = all_states(T)
    z = model.standardize(features).double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    both = model.free_energy(features, words.bool()).double()
    torch.testing.assert_close(both, exact.free_energy(z, words), **close)
    of_image = model.free_energy(features).double()
    torch.testing.assert_close(of_image, exact.free_energy(z, None), **close)
    of_words = model.free_energy(words=words.float()).double()
    torch.testing.assert_close(of_words, exact.free_energy(None, words), **close)


def test_free_energy_keeps_its_digits_with_rare_words() -> None:
    model = JointRBM(2, 1000, 3)
    with torch.no_grad():
        model.b_words.fill_(-8.0)
    words = torch.zeros(1, 1000, dtype=torch.bool)
    words[0, :3] = True
    features = torch.zeros(1, 2)
    plain = 24.0 - torch.nn.functional.softplus(model.word_part(words)).sum()
    assert abs(model.free_energy(features, words) - plain).item() < 1e-4


def test_score_is_the_pmi_of_enumerated_free_energies() -> None:
    model, exact = small_rbm(), ExactJoint.of(small_rbm())
    features, words = images(6), all_states(T)
    z = model.standardize(features).double()
    empty = -(-exact.hidden_energy()).logsumexp(0)
    rows, columns = torch.arange(6).repeat_interleave(16), torch.arange(16).repeat(6)
    pmi = (
        -exact.free_energy(z[rows], words[columns])
        + exact.free_energy(z, None)[rows]
        + exact.free_energy(None, words)[columns]
        - empty
    ).view(6, 16)
    scores = model(features, words.bool()).double()
    torch.testing.assert_close(scores, pmi, rtol=1e-4, atol=1e-5)
    assert scores[:, 0].abs().max() < 1e-5  # a caption without known words


def test_pairs_are_formed_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_rbm()
    seen = []
    combine = model.combine
    monkeypatch.setattr(model, "combine", lambda a, g: seen.append(a.shape[0]) or combine(a, g))
    monkeypatch.setattr(matching, "_PAIR_BLOCK", 3 * 16 * H)
    with torch.no_grad():
        model(images(8), all_states(T).bool())
    assert seen == [3, 3, 2]


def test_gibbs_with_the_image_clamped_draws_words_given_it() -> None:
    model, exact = small_rbm(), ExactJoint.of(small_rbm())
    features = images(1).expand(20000, D)
    start = torch.zeros(20000, T, dtype=torch.bool)
    held, words = model.gibbs(features, start, 15, clamp="image", seed=3)
    assert torch.equal(held, features)
    p = exact.p_words_given_image(model.standardize(features[:1]).double())[0]
    assert_chi_square(torch.bincount(state_number(words.double()), minlength=16), p)


def test_gibbs_with_the_words_clamped_draws_images_given_them() -> None:
    model, exact = small_rbm(), ExactJoint.of(small_rbm())
    words = all_states(T)[6:7].bool()
    many = words.expand(20000, T)
    features, held = model.gibbs(images(20000), many, 30, clamp="words", seed=4)
    assert torch.equal(held, many)
    assert_mean(model.standardize(features), exact.mean_image_given_words(words.double())[0])


def test_gibbs_unclamped_draws_from_the_joint_distribution() -> None:
    model, exact = small_rbm(0.6), ExactJoint.of(small_rbm(0.6))
    start = torch.zeros(20000, T, dtype=torch.bool)
    _, words = model.gibbs(images(20000), start, 40, seed=5)
    assert_chi_square(torch.bincount(state_number(words.double()), minlength=16), exact.p_words())


def test_gibbs_is_reproducible_and_advances_a_seed_tensor() -> None:
    model, words = small_rbm(), all_states(T).bool()
    first = model.gibbs(images(16), words, 2, seed=9)
    stream = torch.tensor([9, 0])
    again = model.gibbs(images(16), words, 2, seed=stream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert stream.tolist() == [9, 6]  # three draws a sweep: no two share their random numbers
    other = model.gibbs(images(16), words, 2, seed=stream)
    assert not torch.equal(other[0], first[0])


def test_cd_gradient_is_that_of_the_free_energies() -> None:
    model = small_rbm()
    features, words = images(16), all_states(T).bool()
    model.cd_loss(features, words, 2, seed=11).backward()
    chain = model.gibbs(features, words, 2, seed=11)

    def plain(f: Tensor, t: Tensor) -> Tensor:
        z, t = model.standardize(f), t.float()
        x = model.c + (z / model.log_var.exp()) @ model.W_image + t @ model.W_words
        own = ((z - model.b_image) ** 2 / (2 * model.log_var.exp())).sum(1) - t @ model.b_words
        return (own - torch.nn.functional.softplus(x).sum(1)).mean()

    expected = torch.autograd.grad(plain(features, words) - plain(*chain), list(model.parameters()))
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_persistent_chains_advance_in_place() -> None:
    model = small_rbm()
    chains = (images(5, seed=7), torch.zeros(5, T, dtype=torch.bool))
    expected = model.gibbs(*(chain.clone() for chain in chains), 3, seed=2)
    model.cd_loss(images(16), all_states(T).bool(), 3, chains=chains, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(chains, expected, strict=True))


def test_contrastive_divergence_raises_the_exact_likelihood() -> None:
    g = torch.Generator().manual_seed(0)
    words = torch.rand(400, T, generator=g) < 0.4
    features = words[:, :D].float() * 2 + 0.5 * torch.randn(400, D, generator=g)
    model = JointRBM(D, T, H, init_std=0.05, generator=g)
    model.initialize_from_data(features, words)
    z, t = model.standardize(features).double(), words.double()
    before = ExactJoint.of(model).log_likelihood(z, t)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    seed = torch.tensor([0, 0])
    for _ in range(150):
        optimizer.zero_grad()
        model.cd_loss(features, words, 1, seed=seed).backward()
        optimizer.step()
    # Independent units are where it started; what is left to learn is what ties the sides.
    assert ExactJoint.of(model).log_likelihood(z, t) > before + 0.5


def test_initialization_from_data() -> None:
    features = torch.cat([images(50), torch.full((50, 1), 7.0)], 1)
    words = torch.zeros(20, 2, dtype=torch.bool)
    words[:5, 0] = True
    model = JointRBM(D + 1, 2, H)
    model.initialize_from_data(features, words)
    z = model.standardize(features)
    torch.testing.assert_close(z.mean(0), torch.zeros(D + 1), rtol=0, atol=1e-5)
    assert z.var(0).mean().item() == pytest.approx(1.0)
    ratio = features.std(0)[:D] / z.std(0)[:D]
    torch.testing.assert_close(ratio, ratio[:1].expand(D))  # one number for all
    torch.testing.assert_close(model.b_words, torch.tensor([5.5 / 15.5, 0.5 / 20.5]).log())
    model.initialize_from_data(features, words, whiten=True)
    z = model.standardize(features)
    torch.testing.assert_close(z[:, :D].std(0), torch.ones(D))
    assert torch.equal(z[:, D], torch.zeros(50))  # a constant feature says nothing


def test_mean_field_inference_is_a_fixed_point() -> None:
    model = small_rbm(0.5)
    features, words = images(4), all_states(T)[3:7].bool()
    t = infer_words(model, features, sweeps=200)
    h = torch.sigmoid(model.c + model.image_part(features) + t @ model.W_words)
    torch.testing.assert_close(t, torch.sigmoid(model.b_words + h @ model.W_words.T))
    v = infer_image(model, words, sweeps=200)
    h = model.hidden(v, words)
    torch.testing.assert_close(model.standardize(v), model.b_image + h @ model.W_image.T)


def test_gibbs_inference_by_enumeration() -> None:
    model, exact = small_rbm(), ExactJoint.of(small_rbm())
    image, caption = images(1), all_states(T)[7:8]
    chains = {"method": "gibbs", "sweeps": 10, "burn_in": 25, "seed": 1}
    t = infer_words(model, image.expand(2000, D), **chains)
    p = exact.p_words_given_image(model.standardize(image).double()) @ all_states(T)
    assert_mean(t, p[0])
    v = infer_image(model, caption.bool().expand(2000, T), **chains)
    assert_mean(model.standardize(v), exact.mean_image_given_words(caption)[0])


def test_inference_finds_what_was_learnt_together() -> None:
    # Hidden unit j ties feature j to word j.
    model = JointRBM(3, 3, 3)
    with torch.no_grad():
        model.W_image.copy_(4 * torch.eye(3))
        model.W_words.copy_(8 * torch.eye(3))
        model.b_words.fill_(-4)
        model.c.fill_(-4)
    features = torch.eye(3) * 4
    assert torch.equal(infer_words(model, features).round(), torch.eye(3))
    assert torch.equal(infer_image(model, torch.eye(3).bool()).argmax(1), torch.arange(3))


def test_hidden_similarities_against_enumeration_and_scipy() -> None:
    model = small_rbm()
    features, words = images(5), all_states(T)[5:10].bool()
    found = hidden_similarities(model, features, words)
    p, q = model.hidden(features).double(), model.hidden(words=words).double()
    on = all_states(H)

    def product(units: Tensor) -> Tensor:  # p(h state), [5, 2**H]
        return torch.where(on[None] > 0, units[:, None], 1 - units[:, None]).prod(2)

    kl = (product(p) * (product(p) / product(q)).log()).sum(1)
    torch.testing.assert_close(found["kl"].double(), kl, rtol=1e-4, atol=1e-6)
    units = jensenshannon(
        torch.stack([p, 1 - p]).detach(), torch.stack([q, 1 - q]).detach(), axis=0
    )
    np.testing.assert_allclose(found["jensen_shannon"], (units**2).mean(1), rtol=1e-3, atol=1e-6)
    assert found["jensen_shannon"].max() <= math.log(2)
    codes = [set(np.flatnonzero(row > 0.5)) for row in (p[0].detach(), q[0].detach())]
    jaccard = len(codes[0] & codes[1]) / max(1, len(codes[0] | codes[1]))
    assert found["jaccard"][0].item() == pytest.approx(jaccard)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (5,) for name in ("kl", "jensen_shannon", "cosine", "euclidean", "jaccard", "overlap")
    }


def test_retrieval_recall_against_sorting() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 30, generator=g)
    owner = torch.cat([torch.arange(9), torch.randint(0, 9, (21,), generator=g)])
    recall = retrieval_recall(scores, owner, at=(1, 3, 20))
    for k in (1, 3, 20):
        found = [
            bool((owner[row.argsort(descending=True)[:k]] == i).any())
            for i, row in enumerate(scores)
        ]
        assert recall.image_to_text[k] == pytest.approx(sum(found) / 9)
        found = [
            owner[j].item() in scores[:, j].argsort(descending=True)[:k].tolist() for j in range(30)
        ]
        assert recall.text_to_image[k] == pytest.approx(sum(found) / 30)
    values = [*recall.image_to_text.values(), *recall.text_to_image.values()]
    assert recall.mean == pytest.approx(sum(values) / 6)


def test_a_constant_score_retrieves_nothing() -> None:
    recall = retrieval_recall(torch.zeros(4, 4), torch.arange(4), at=(1, 3))
    assert recall.mean == 0


def test_vocabulary_takes_frequent_content_words() -> None:
    captions = ["A Dog and a dog.", "The cat is on the t-shirt", "a cat", "zebra", "ape"]
    vocabulary = Vocabulary.from_captions(captions, 4)
    assert vocabulary.words == ("cat", "dog", "ape", "t-shirt")  # equals by alphabet
    assert not FUNCTION_WORDS & set(Vocabulary.from_captions(captions).words)
    bags = vocabulary.encode(["dog DOG cat!", "", "zebra"])
    assert bags.tolist() == [[True, True, False, False], [False] * 4, [False] * 4]
    assert bags.dtype == torch.bool
    assert vocabulary.encode([]).shape == (0, 4)


def test_errors_name_what_came() -> None:
    model, words = small_rbm(), all_states(T).bool()
    raises(ValueError, "features must be [N, D] = [N, 3]", "[2, 4]")(
        lambda: model(torch.zeros(2, 4), words)
    )
    raises(ValueError, "words must be [M, T] = [M, 4]", "[2, 5]")(
        lambda: model(images(2), torch.zeros(2, 5, dtype=torch.bool))
    )
    raises(ValueError, "[N, n, T]", "N = 2")(lambda: model.candidate_scores(images(2), words))
    raises(ValueError, "got neither")(lambda: model.free_energy())
    raises(ValueError, "as many rows", "2 and 16")(lambda: model.free_energy(images(2), words))
    raises(ValueError, "clamp", "'text'")(lambda: model.gibbs(images(16), words, clamp="text"))
    raises(ValueError, "k must be 1", "0")(lambda: model.gibbs(images(16), words, 0))
    raises(ValueError, "n_hidden", "0")(lambda: JointRBM(2, 2, 0))
    raises(ValueError, "2 images", "1 and 16")(lambda: model.initialize_from_data(images(1), words))
    raises(ValueError, "finite")(
        lambda: model.initialize_from_data(images(2) * float("nan"), words)
    )
    raises(ValueError, "method", "'exact'")(lambda: infer_words(model, images(2), method="exact"))
    raises(ValueError, "sweeps", "0")(lambda: infer_image(model, words, sweeps=0))
    raises(ValueError, "5 and 16")(lambda: hidden_similarities(model, images(5), words))
    raises(ValueError, "owner must be [M] = [3]", "[2]")(
        lambda: retrieval_recall(torch.zeros(2, 3), torch.arange(2))
    )
    raises(ValueError, "each of the 2 images", "1 different")(
        lambda: retrieval_recall(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    )
    raises(ValueError, "each once", "2 of which 1")(lambda: Vocabulary(("a", "a")))
    raises(ValueError, "size", "0")(lambda: Vocabulary.from_captions(["dog"], 0))
    raises(ValueError, "got 0")(lambda: Vocabulary.from_captions(["of the"]))


def test_candidate_scores_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_candidate_scores_are_those_of_all_pairs(JointRBM, monkeypatch)


def test_a_failing_loss_leaves_chains_and_seed() -> None:
    """Chains of which one cannot be written, data that are refused, weights that are not finite."""
    model, words = small_rbm(), all_states(T).bool()
    with torch.inference_mode():
        inferred = torch.zeros(16, T, dtype=torch.bool)
    for features, second in ((images(16), inferred), (images(16)[:, :2], words.clone())):
        chains, seed = (images(16, seed=2), second), torch.tensor([3, 4])
        before = [x.clone() for x in chains]
        with pytest.raises(ValueError, match=r"cd_loss: chains|features"):
            model.cd_loss(features, words, 2, chains=chains, seed=seed)
        assert all(map(torch.equal, chains, before)) and seed.tolist() == [3, 4]
    with torch.no_grad():
        model.b_words[0] = math.nan
    seed = torch.tensor([3, 4])
    with pytest.raises(ValueError, match="finite"):
        model.gibbs(images(16), words, 2, seed=seed)
    assert seed.tolist() == [3, 4]
